"""COCO's twelve metrics: any ids, no output, no guesses."""

import json
import math
import threading
from typing import Any

import numpy as np
import pytest

from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.metrics.average_precision import AP_NAMES
from mal_train.core.metrics.coco_ap import coco_ap
from tests.mal_train.core.metrics.ground_truths import run_pycocotools, square


class TestCocoAp:
    def data(self, image_id: Any, annotation_id: Any, category_id: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        ids = {"image_id": image_id, "category_id": category_id}
        truth = {
            "images": [{"id": image_id, "height": 40, "width": 60}],
            "annotations": [{**ids, "id": annotation_id, "segmentation": square(0, 0, 8).to_coco()}],
        }
        return truth, [{**ids, "segmentation": square(0, 0, 8).to_coco(), "score": 0.5}]

    @pytest.mark.parametrize("ids", [(0, 0, 0), ("x", "y", "z"), (1.5, "1", -3)])
    def test_ids_of_any_type_work_and_zero_is_an_id(self, ids: tuple[Any, Any, Any]) -> None:
        assert coco_ap(*self.data(*ids))["AP"] == pytest.approx(1.0)

    def test_no_results_is_zero_not_a_crash(self) -> None:
        truth, _ = self.data(1, 1, 1)
        assert coco_ap(truth, [])["AP"] == 0.0

    def test_metrics_without_instances_are_none(self) -> None:
        metrics = coco_ap(*self.data(1, 1, 1))
        assert metrics["APl"] is None
        assert metrics["APs"] == pytest.approx(1.0)

    def test_a_result_for_an_unknown_image_is_named(self) -> None:
        truth, results = self.data(1, 1, 1)
        with pytest.raises(BadDataset, match="result 1: image_id 7"):
            coco_ap(truth, [{**results[0], "image_id": 7}])

    def test_a_result_of_a_category_without_ground_truth_is_ignored(self) -> None:
        truth, results = self.data(1, 1, 1)
        assert coco_ap(truth, [*results, {**results[0], "category_id": 9}])["AP"] == pytest.approx(1.0)

    def test_a_bad_result_is_named_by_its_number_in_the_file(self) -> None:
        truth, results = self.data(1, 1, 1)
        other = {**results[0], "category_id": 9}
        with pytest.raises(BadDataset, match="result 3: image_id 7"):
            coco_ap(truth, [other, other, {**results[0], "image_id": 7}])

    def test_malformed_run_lengths_are_rejected(self) -> None:
        truth, results = self.data(1, 1, 1)
        results[0]["segmentation"] = {"size": [40, 60], "counts": [5]}
        with pytest.raises(BadDataset, match=r"result 1: .*5"):
            coco_ap(truth, results)

    def test_arguments_are_not_changed(self) -> None:
        truth, results = self.data(1, 1, 1)
        before = json.dumps([truth, results])
        coco_ap(truth, results)
        assert json.dumps([truth, results]) == before

    def test_no_output_is_printed_and_other_threads_keep_theirs(self, capsys: pytest.CaptureFixture[str]) -> None:
        truth, results = self.data(1, 1, 1)
        threads = [threading.Thread(target=coco_ap, args=(truth, results)) for _ in range(4)]
        for thread in threads:
            thread.start()
        print("mine")
        for thread in threads:
            thread.join()
        assert capsys.readouterr().out == "mine\n"


def boxes_and_masks(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random ground truth and results: crowds, ties of score and of overlap, categories on one side only."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    sides = np.array([3, 7, 40, 70, 110])
    for number in range(60):
        ids = {"image_id": int(rng.integers(4)), "category_id": int(rng.integers(5))}
        w, h = (int(side) for side in rng.choice(sides, 2))
        x, y = int(rng.integers(0, 130 - w)), int(rng.integers(0, 130 - h))
        mask = rle.encode_region(np.ones((h, w), dtype=np.bool_), y, x, (130, 130))
        form = {"segmentation": mask.to_coco(), "bbox": [x, y, w, h]}
        area = float(w * h) if rng.random() < 0.8 else 32.0**2
        if ids["category_id"] != 3:
            annotations.append({**ids, **form, "id": number + 1, "iscrowd": int(rng.random() < 0.2), "area": area})
        for _ in range(int(rng.integers(0, 3))):
            dx, dy = (int(d) for d in rng.integers(-2, 3, 2))
            x2, y2 = min(max(x + dx, 0), 130 - w), min(max(y + dy, 0), 130 - h)
            moved = rle.encode_region(np.ones((h, w), dtype=np.bool_), y2, x2, (130, 130))
            score = float(rng.choice([0.1, 0.5, 0.9]))
            results.append({**ids, "segmentation": moved.to_coco(), "bbox": [x2, y2, w, h], "score": score})
    images = [{"id": n, "height": 130, "width": 130} for n in range(4)]
    return {"images": images, "annotations": annotations, "categories": [{"id": n} for n in range(5)]}, results


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(12))
def test_metrics_equal_those_of_pycocotools_with_crowds_ties_and_all_sizes(seed: int, iou_type: Any) -> None:
    truth, results = boxes_and_masks(seed)
    assert coco_ap(truth, results, "score", iou_type) == named(run_pycocotools(truth, results, iou_type))
    ones = [{**row, "score": 1.0} for row in results]
    assert coco_ap(truth, results, "one", iou_type) == named(run_pycocotools(truth, ones, iou_type))


@pytest.mark.parametrize("seed", range(6))
def test_metrics_equal_those_of_pycocotools_with_more_crowds_than_objects_and_many_detections(seed: int) -> None:
    truth, results = boxes_and_masks(100 + seed)
    rng = np.random.default_rng(seed)
    for row in truth["annotations"]:
        row["iscrowd"] = int(rng.random() < 0.6)
        row["image_id"] = row["category_id"] = 0
    for row in results:
        row["image_id"] = row["category_id"] = 0
    # Detections equal to objects that lie in crowd regions have ties of overlap 1; more than 100 of them.
    copies = [{**row, "score": float(rng.choice([0.2, 0.5]))} for row in truth["annotations"]]
    results = [{k: row[k] for k in results[0]} for row in [*results, *copies, *copies]]
    assert len(results) > 120
    assert coco_ap(truth, results) == named(run_pycocotools(truth, results))
    ones = [{**row, "score": 1.0} for row in results]
    assert coco_ap(truth, results, "one") == named(run_pycocotools(truth, ones))


@pytest.mark.parametrize("area", [None, "large", True, math.nan, math.inf, 10**400, [1]])
def test_an_area_that_is_no_finite_number_is_that_of_the_mask(area: Any) -> None:
    truth, results = boxes_and_masks(0)
    bare = {**truth, "annotations": [{k: v for k, v in row.items() if k != "area"} for row in truth["annotations"]]}
    odd = {**truth, "annotations": [{**row, "area": area} for row in truth["annotations"]]}
    assert coco_ap(odd, results) == coco_ap(bare, results)


def test_only_the_best_hundred_detections_of_a_category_in_an_image_count() -> None:
    truth, _ = boxes_and_masks(0)
    rng = np.random.default_rng(1)
    results = []
    for n in range(150):
        near = truth["annotations"][n % 3]
        results.append({**{k: near[k] for k in ("image_id", "category_id", "segmentation", "bbox")}, "score": n / 150})
    rng.shuffle(results)
    assert coco_ap(truth, results) == named(run_pycocotools(truth, results))


def named(stats: list[float]) -> dict[str, float | None]:
    return {name: None if value < 0 else value for name, value in zip(AP_NAMES, stats, strict=True)}
