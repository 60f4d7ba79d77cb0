"""Evaluation metrics against pycocotools, the published outputs and the anchors of the real subset."""

import gc
import json
import math
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.demo.baselines import box_filled, ellipse
from mal_train.core.coco.annotations import Annotation, CocoFile, JsonId, Reason, parse_coco, read_coco
from mal_train.core.coco.output import error_fields, label_fields, labeled_file
from mal_train.core.masks import rle
from mal_train.core.masks.rle import Rle
from mal_train.core.metrics.average_precision import AP_NAMES
from mal_train.core.metrics.coco_ap import coco_ap
from mal_train.core.metrics.evaluator import Evaluator, evaluate_labels, memory_of
from mal_train.core.metrics.miou import class_mean
from tests.mal_train.core.masks.hostile_runs import compressed, wrapping_runs
from tests.mal_train.core.metrics.ground_truths import frame_of, run_pycocotools, square, truth_of, val_dev
from tests.reference import fixture, shared


class TestAgainstThePublishedOutputs:
    @pytest.mark.parametrize(("metrics", "predictions"), [("s21", "crop128_s21"), ("s22", "crop64_s22")])
    def test_ious_and_class_balanced_metrics_agree(self, metrics: str, predictions: str) -> None:
        # The published code computes metrics by size correctly only for a batch of one: with more, each IoU counts for
        # every class.
        expected = json.loads(fixture(f"g_miou_{metrics}.json").read_text())
        labels = {row["id"]: row for row in json.loads(fixture(f"f_paste_{predictions}.json").read_text())}
        evaluator = Evaluator({1: "a", 2: "b", 3: "c", 4: "d"})
        for row in expected["gt"]:
            label = labels[row["id"]]
            annotation = Annotation(row["id"], row["image_id"], row["compact_category_id"], label["bbox"], False, row)
            evaluator.add(annotation, Rle.from_coco(label["segmentation"]), 1.0)
        report = evaluator.report(ap=False)

        by_id = {row.annotation_id: row.iou for row in report.worst}
        assert [by_id[label] for label in labels] == pytest.approx(expected["bs1"]["ious"], abs=1e-6)
        assert report.class_miou == pytest.approx(expected["bs1"]["mIoU"], abs=1e-6)
        ours = list(report.class_miou_by_box_size.values())
        assert ours == pytest.approx(expected["bs1"]["area_mIoU"], abs=1e-6)

    def test_mean_of_class_means_and_pair_ious_agree(self) -> None:
        expected = json.loads(fixture("g_metric_class.json").read_text())
        classes, ious = zip(*expected["pairs"], strict=True)
        assert class_mean(classes, ious) == pytest.approx(expected["mIoU"], abs=1e-6)
        for seg, gt, iou in zip(expected["seg"], expected["gt"], expected["iou"], strict=True):
            assert rle.iou(rle.encode_mask(np.array(seg)), rle.encode_mask(np.array(gt))) == pytest.approx(
                iou, abs=1e-6
            )


class TestAnchors:
    """The metrics of the two trivial labelers on the real subset."""

    @pytest.mark.parametrize(
        ("baseline", "overall", "by_size", "ap", "ap50"),
        [
            (box_filled, 0.567, [0.593, 0.538, 0.565], 0.262, 0.639),
            (ellipse, 0.597, [0.614, 0.578, 0.596], 0.333, 0.695),
        ],
    )
    def test_trivial_labelers_have_their_anchors(
        self, baseline: Any, overall: float, by_size: list[float], ap: float, ap50: float
    ) -> None:
        coco = val_dev()
        evaluator = Evaluator(coco.category_names)
        rows = list(coco.annotations)
        # Any order must work: a server returns results in the order in which they finish.
        random.Random(3).shuffle(rows)
        for annotation in rows:
            frame = frame_of(coco, annotation)
            evaluator.add(annotation, None if annotation.iscrowd else baseline(annotation.box_xywh, frame), 0.5)
        report = evaluator.report()
        assert report.overall.miou == pytest.approx(overall, abs=5e-4)
        assert [group.miou for group in report.by_size.values()] == pytest.approx(by_size, abs=5e-4)
        assert {name: group.count for name, group in report.by_size.items()} == {
            "small": 246,
            "medium": 218,
            "large": 158,
        }
        assert report.ap_at_1["AP"] == pytest.approx(ap, abs=5e-4)
        assert report.ap_at_1["AP50"] == pytest.approx(ap50, abs=5e-4)
        # A constant score is equal to no score.
        assert report.ap_at_score == report.ap_at_1
        assert report.skipped == {"CROWD": 4}

    def test_all_metrics_equal_those_of_pycocotools(self) -> None:
        coco = val_dev()
        rng = np.random.default_rng(5)
        evaluator = Evaluator(coco.category_names)
        results = []
        for annotation in sorted(coco.annotations, key=lambda a: (a.image_id, a.id)):
            mask = ellipse(annotation.box_xywh, frame_of(coco, annotation))
            score = float(rng.random())
            evaluator.add(annotation, mask, score)
            if not annotation.iscrowd:
                ids = {"image_id": annotation.image_id, "category_id": annotation.category_id}
                results.append({**ids, "segmentation": mask.to_coco(), "score": score})
        report = evaluator.report()
        expected = run_pycocotools(coco.raw, results)
        assert list(report.ap_at_score.values()) == expected
        assert list(coco_ap(coco.raw, results, "score").values()) == expected
        ones = run_pycocotools(coco.raw, [{**row, "score": 1.0} for row in results])
        assert list(report.ap_at_1.values()) == ones
        assert list(coco_ap(coco.raw, results, "one").values()) == ones

    def test_a_labeled_file_gives_the_same_report_as_its_masks(self) -> None:
        coco = val_dev()
        rows = [a for a in coco.annotations if not a.iscrowd and a.id is not None][:60]
        masks = {a.id: box_filled(a.box_xywh, frame_of(coco, a)) for a in rows}
        fields = {a.id: label_fields(masks[a.id].to_coco(), 1, 0.5) for a in rows if a.id is not None}
        evaluator = Evaluator(coco.category_names)
        for annotation in rows:
            evaluator.add(annotation, masks[annotation.id], 0.5)
        report = evaluate_labels(coco, parse_coco(labeled_file(coco, fields)), ap=False)
        expected = evaluator.report(ap=False)
        assert (report.overall, report.by_size, report.class_miou) == (
            expected.overall,
            expected.by_size,
            expected.class_miou,
        )
        assert report.skipped == {"NOT_ANSWERED": 562, "CROWD": 4}


class TestEvaluator:
    def test_an_evaluator_without_instances_gives_a_report_without_metrics(self) -> None:
        report = Evaluator({}).report()
        assert report.overall.count == 0
        assert report.overall.miou is None
        assert report.ap_at_1 == dict.fromkeys(AP_NAMES)
        assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["mIoU"] is None
        assert report.table().startswith("nothing was measured")

    def test_report_does_not_depend_on_the_order_of_the_instances(self) -> None:
        rng = np.random.default_rng(0)
        instances = []
        for number in range(40):
            truth_row, mask_row = rng.integers(0, 20, 2)
            annotation = truth_of(
                number, square(int(truth_row), 5, 9), image_id=f"i{number % 7}", category_id=number % 3
            )
            instances.append((annotation, square(int(mask_row), 5, 9), float(rng.random())))
        reports = []
        for order in (instances, instances[::-1]):
            evaluator = Evaluator({0: "a", 1: "b", 2: "c"})
            for item in order:
                evaluator.add(*item)
            reports.append(evaluator.report())
        assert reports[0] == reports[1]

    def test_polygons_are_compared_on_the_frame_of_the_prediction(self) -> None:
        evaluator = Evaluator({1: "cup"})
        polygon = [[5.0, 10.0, 13.0, 10.0, 13.0, 18.0, 5.0, 18.0]]
        evaluator.add(truth_of(1, None, segmentation=polygon), square(10, 5, 8), 1.0)
        assert evaluator.running_miou == 1.0

    @pytest.mark.parametrize(
        ("annotation", "prediction", "reason"),
        [
            (truth_of(1, None), square(0, 0, 4), Reason.NO_GROUND_TRUTH),
            (truth_of(1, None, segmentation=[]), square(0, 0, 4), Reason.NO_GROUND_TRUTH),
            (truth_of(1, None, segmentation=[[1, 2]]), square(0, 0, 4), Reason.BAD_GROUND_TRUTH),
            (truth_of(1, None, segmentation={"size": [4, 4], "counts": [3]}), square(0, 0, 4), Reason.BAD_GROUND_TRUTH),
            (truth_of(1, None, segmentation="x"), square(0, 0, 4), Reason.BAD_GROUND_TRUTH),
            (truth_of(1, square(0, 0, 4, (50, 50))), square(0, 0, 4), Reason.BAD_GROUND_TRUTH),
            (truth_of(1, square(0, 0, 4)), None, Reason.NOT_ANSWERED),
            (truth_of(1, square(0, 0, 4), iscrowd=1), square(0, 0, 4), Reason.CROWD),
            (truth_of(None, square(0, 0, 4)), square(0, 0, 4), Reason.BAD_ID),
            (
                Annotation(1, 1, 1, (0, 0, 1, 1), False, {}, "annotation 1: odd", Reason.BAD_BOX),
                square(0, 0, 4),
                Reason.BAD_BOX,
            ),
        ],
    )
    def test_a_row_that_cannot_be_counted_is_skipped_once_with_its_reason(
        self, annotation: Annotation, prediction: Rle | None, reason: Reason
    ) -> None:
        evaluator = Evaluator({1: "cup"})
        evaluator.add(annotation, prediction, 0.5)
        evaluator.add(truth_of("good", square(3, 3, 5), image_id="other"), square(3, 3, 5), 0.5)
        report = evaluator.report()
        assert report.overall.count == 1
        assert report.overall.miou == 1.0
        assert report.skipped == {str(reason): 1}
        assert report.to_dict()["skipped"][0]["message"]

    def test_a_second_mask_of_an_annotation_is_not_counted(self) -> None:
        evaluator = Evaluator({1: "cup"})
        for side in (4, 2):
            evaluator.add(truth_of(1, square(0, 0, 4)), square(0, 0, side), 0.5)
        evaluator.add(truth_of(1, square(0, 0, 4), image_id=2), square(0, 0, 4), 0.5)
        report = evaluator.report(ap=False)
        assert (report.overall.count, report.overall.miou) == (2, 1.0)
        assert report.skipped == {"REPEATED": 1}

    def test_a_mask_of_another_size_than_its_image_is_not_counted(self) -> None:
        evaluator = Evaluator({1: "cup"})
        evaluator.add(truth_of(1, square(0, 0, 4)), square(0, 0, 4), 0.5)
        evaluator.add(truth_of(2, square(0, 0, 4, (50, 50))), square(0, 0, 4, (50, 50)), 0.5)
        assert evaluator.report().skipped == {"FRAME_MISMATCH": 1}

    def test_an_empty_prediction_counts_as_wrong(self) -> None:
        evaluator = Evaluator({1: "cup"})
        evaluator.add(truth_of(1, square(0, 0, 4)), rle.encode_mask(np.zeros((40, 60))), 0.0)
        report = evaluator.report()
        assert (report.overall.miou, report.ap_at_1["AP"]) == (0.0, 0.0)

    @pytest.mark.parametrize(
        "segmentation",
        [
            {"size": [40, 60], "counts": [2400]},
            rle.encode_mask(np.zeros((40, 60))).to_coco(),
            [[100, 100, 110, 100, 110, 110]],
            [[-9, 5, -5, 5, -5, 9]],
            [[3, 3, 3, 3, 3, 3]],
        ],
    )
    def test_an_empty_ground_truth_is_named_and_not_measured(self, segmentation: object) -> None:
        evaluator = Evaluator({1: "cup"})
        evaluator.add(replace(truth_of(1, None), raw={"segmentation": segmentation}), square(0, 0, 4), 0.5)
        report = evaluator.report()
        assert (report.measured, report.failed_count, report.empty_ground_truth) == (0, 1, 1)
        assert report.to_dict()["empty_ground_truth"] == 1
        (row,) = report.skipped_rows
        assert (row.annotation_id, row.reason) == (1, "EMPTY_GROUND_TRUTH")
        assert "60x40" in row.message

    def test_a_row_without_a_mask_or_a_prediction_lacks_its_ground_truth(self) -> None:
        evaluator = Evaluator({1: "cup"})
        evaluator.add(truth_of(1, None), None, 0.0)
        assert evaluator.report().skipped == {"NO_GROUND_TRUTH": 1}

    def test_a_score_that_is_not_finite_raises(self) -> None:
        with pytest.raises(ValueError, match="score nan"):
            Evaluator({}).add(truth_of(1, None), None, math.nan)

    @pytest.mark.parametrize("is_first", [False, True])
    def test_a_crowd_region_gives_the_same_report_as_polygon_and_as_run_lengths(self, is_first: bool) -> None:
        polygon = [[29.0, 9.0, 51.0, 9.0, 51.0, 31.0, 29.0, 31.0]]
        aps = []
        for segmentation in (None, polygon, rle.from_segmentation(polygon, 40, 60).to_coco()):
            crowd = (truth_of(3, None, iscrowd=1, segmentation=segmentation), None, 0.0)
            rows: list[Any] = [
                (truth_of(1, square(0, 0, 8)), square(0, 0, 8), 0.5),
                (truth_of(2, square(0, 15, 4)), square(12, 32, 8), 0.9),
            ]
            evaluator = Evaluator({1: "cup"})
            for row in [crowd, *rows] if is_first else [*rows, crowd]:
                evaluator.add(*row)
            aps.append(evaluator.report().ap_at_score["AP"])
        without, as_polygon, as_runs = aps
        assert as_polygon == as_runs != without

    @pytest.mark.parametrize(
        "segmentation", [[[0, 0, 4, 4]], square(0, 0, 4, (50, 50)).to_coco(), {"size": [40, 60], "counts": [9]}, "x", 5]
    )
    @pytest.mark.parametrize("is_first", [False, True])
    def test_a_crowd_region_that_does_not_fit_its_image_is_explained_once(
        self, segmentation: Any, is_first: bool
    ) -> None:
        evaluator = Evaluator({1: "cup"})
        crowd = (truth_of(3, None, iscrowd=1, segmentation=segmentation), None, 0.0)
        rows: list[Any] = [(truth_of(1, square(0, 0, 8)), square(0, 0, 8), 0.5)]
        for row in [crowd, *rows] if is_first else [*rows, crowd]:
            evaluator.add(*row)
        (skipped,) = evaluator.report().skipped_rows
        assert skipped.reason == "CROWD"
        assert skipped.message.count("cannot be read") == 1

    def test_a_code_whose_sum_wraps_around_is_no_ground_truth_and_no_crowd_region(self) -> None:
        runs = wrapping_runs(np.random.default_rng(0), 40 * 60)
        for number, counts in enumerate((runs, compressed(runs), compressed(runs).decode())):
            segmentation = {"size": [40, 60], "counts": counts}
            evaluator = Evaluator({1: "cup"})
            evaluator.add(truth_of(number, None, segmentation=segmentation), square(0, 0, 4), 0.5)
            evaluator.add(truth_of(9, None, iscrowd=1, segmentation=segmentation), None, 0.0)
            assert evaluator.report().skipped == {"BAD_GROUND_TRUTH": 1, "CROWD": 1}

    def test_an_unreadable_crowd_region_is_skipped_with_the_cause(self) -> None:
        evaluator = Evaluator({1: "cup"})
        evaluator.add(truth_of(1, None, iscrowd=1, segmentation={"size": [4, 4], "counts": "?"}), None, 0.0)
        (row,) = evaluator.report().skipped_rows
        assert row.reason == "CROWD"
        assert len(row.message) > len("annotation 1: crowd regions are not counted")

    def test_category_rows_keep_the_order_of_the_data_set_and_omit_absent_categories(self) -> None:
        evaluator = Evaluator({"b": "mug", "a": "cup", "c": "jug"})
        evaluator.add(truth_of(1, square(0, 0, 4), category_id="a"), square(0, 0, 4), 0.75)
        evaluator.add(truth_of(2, square(9, 0, 4), category_id="b"), square(20, 0, 4), 0.25)
        rows = evaluator.report().categories
        assert [(r.name, r.count, r.miou, r.share_good, r.mean_score) for r in rows] == [
            ("mug", 1, 0.0, 0.0, 0.25),
            ("cup", 1, 1.0, 1.0, 0.75),
        ]

    def test_worst_lists_every_instance_by_iou(self) -> None:
        evaluator = Evaluator({1: "cup"})
        for number, side in enumerate((8, 2, 5)):
            evaluator.add(truth_of(number, square(0, 0, 8)), square(0, 0, side), 0.5)
        report = evaluator.report()
        assert [row.annotation_id for row in report.worst] == [1, 2, 0]
        assert [row["annotation_id"] for row in report.to_dict(worst=2)["worst_first"]] == [1, 2]

    def test_the_report_is_json_and_its_table_names_the_metrics(self) -> None:
        evaluator = Evaluator({1: "cup"})
        evaluator.add(truth_of(1, square(0, 0, 8)), square(0, 0, 7), 0.5)
        evaluator.add(truth_of(2, square(0, 0, 8)), None, 0.5)
        report = evaluator.report()
        json.dumps(report.to_dict(), allow_nan=False)
        table = report.table()
        for text in ("mIoU", "small", "mIoU_class", "AP50", "ARmax100", "Spearman", "cup", "1 NOT_ANSWERED"):
            assert text in table

    def test_the_table_states_no_fraction_of_bad_masks_where_there_are_none(self) -> None:
        evaluator = Evaluator({1: "cup"})
        evaluator.add(truth_of(1, square(0, 0, 8)), square(0, 0, 8), 0.5)
        good = evaluator.report().table()
        evaluator.add(truth_of(2, square(0, 0, 8)), square(0, 0, 1), 0.25)
        assert ("worst-scored" in good, "worst-scored" in evaluator.report().table()) == (False, True)


class TestEvaluateLabels:
    def files(self, label: dict[str, Any] | None) -> tuple[CocoFile, CocoFile]:
        row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 8, 8]}
        frame = {"images": [{"id": 1, "file_name": "a", "width": 60, "height": 40}], "categories": [{"id": 1}]}
        truth = parse_coco({**frame, "annotations": [{**row, "segmentation": square(0, 0, 8).to_coco()}]})
        labels = parse_coco({**frame, "annotations": [] if label is None else [{**row, **label}]})
        return truth, labels

    @pytest.mark.parametrize(
        ("label", "reason"),
        [
            (None, "NOT_ANSWERED"),
            ({}, "NOT_ANSWERED"),
            (error_fields("IMAGE_NOT_FOUND", "gone"), "IMAGE_NOT_FOUND"),
            ({"error": "odd"}, "NOT_ANSWERED"),
            ({"segmentation": {"size": [3, 3], "counts": [9]}}, "NOT_ANSWERED"),
            ({"segmentation": square(0, 0, 8).to_coco(), "score": "high"}, "NOT_ANSWERED"),
            ({"segmentation": square(0, 0, 8).to_coco(), "score": math.nan}, "NOT_ANSWERED"),
            ({"segmentation": square(0, 0, 8).to_coco(), "score": 10**400}, "NOT_ANSWERED"),
            ({"segmentation": square(0, 0, 8).to_coco(), "score": True}, "NOT_ANSWERED"),
            ({"segmentation": square(0, 0, 8).to_coco(), "score": 1.7e308}, "NOT_ANSWERED"),
            ({"segmentation": square(0, 0, 8).to_coco(), "score": -1e10}, "NOT_ANSWERED"),
        ],
    )
    def test_a_label_that_cannot_be_compared_is_counted_by_reason(self, label: Any, reason: str) -> None:
        report = evaluate_labels(*self.files(label))
        assert report.overall.count == 0
        assert report.skipped == {reason: 1}

    def test_a_label_without_score_counts_with_score_one(self) -> None:
        report = evaluate_labels(*self.files({"segmentation": square(0, 0, 8).to_coco()}))
        assert (report.overall.miou, report.score.mean_score) == (1.0, 1.0)

    def test_a_label_without_ground_truth_is_counted_by_reason(self) -> None:
        truth, labels = self.files({"id": 2, "segmentation": square(0, 0, 8).to_coco()})
        assert evaluate_labels(truth, labels).skipped == {"NOT_ANSWERED": 1, "NO_GROUND_TRUTH": 1}


def test_polygons_of_the_real_set_have_full_iou_with_themselves(tmp_path: Path) -> None:
    coco = read_coco(shared("data", "coco_train_mini", "annotations.json"))
    rows = coco.annotations[:200]
    evaluator = Evaluator(coco.category_names)
    for annotation in rows:
        frame = frame_of(coco, annotation)
        mask = rle.from_segmentation(annotation.raw["segmentation"], *frame)
        evaluator.add(annotation, mask, 1.0)
    report = evaluator.report()
    assert report.overall.miou == 1.0
    assert report.ap_at_1["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("images", "categories", "crowds"),
    [(1500, 1, 0), (1500, 1, 500), (1, 1, 0), (1, 1, 500), (15, 3, 200), (1, 1, 1300), (100, 300, 0)],
)
def test_an_evaluation_and_its_report_take_no_more_memory_than_estimated(
    images: int, categories: int, crowds: int
) -> None:
    Evaluator({1: "a"}).report()  # its imports do not count
    count, codes = 1500, [ellipse((n, n, 20.0 + n, 30.0), (90, 120)) for n in range(40)]
    tracemalloc.start()
    try:
        evaluator = Evaluator({1: "a"})
        for n in range(count):
            raw = {"segmentation": codes[n % 40].to_coco()}
            ids = 1000 + n, f"image {n % images}", n % categories
            row = Annotation(*ids, (1.0, 2.0, 20.0, 30.0), n >= count - crowds, raw)
            code = codes[(n + 1) % 40]
            copy = Rle(code.height, code.width, bytes(bytearray(code.counts)))
            evaluator.add(row, copy if n % 3 else None, n / count)
        evaluator.report()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= evaluator.memory < 2.5 * peak
    code_bytes = 2 * count * max(len(code.counts) for code in codes)
    assert evaluator.memory <= memory_of(count - crowds, crowds, code_bytes, categories)


def test_compared_and_skipped_rows_are_nothing_to_the_garbage_collector() -> None:
    """A collection stops all threads for about 0.3 us for each object that it tracks."""
    mask, count = ellipse((30, 30, 20, 30), (90, 120)), 1000
    evaluator = Evaluator({1: "a"})
    gc.collect()
    before = len(gc.get_objects())
    for n in range(2 * count):
        row = Annotation(n, n // 7, 1, (1.0, 2.0, 20.0, 30.0), False, {"segmentation": mask.to_coco()})
        evaluator.add(row, mask if n % 2 else None, 0.5)
    del row
    gc.collect()
    assert (evaluator.count, len(evaluator.skipped)) == (count, count)
    assert len(gc.get_objects()) - before < 100


@pytest.mark.parametrize("ids", [int, str, lambda n: 2**70 + n])
def test_a_report_lists_the_worst_rows_in_id_order(ids: Callable[[int], JsonId]) -> None:
    mask = ellipse((30, 30, 20, 30), (90, 120))
    evaluator = Evaluator({1: "a"})
    for n in (3, 1, 2):
        row = Annotation(ids(n), ids(9 - n), 1, (1.0, 2.0, 20.0, 30.0), False, {"segmentation": mask.to_coco()})
        evaluator.add(row, mask, 0.5)
        evaluator.skip(row, "TEST", str(n))
    assert [row.annotation_id for row in evaluator.report().worst] == [ids(3), ids(2), ids(1)]
    short = evaluator.report(listed=1)
    assert ([row.annotation_id for row in short.worst], len(short.skipped_rows)) == ([ids(3)], 1)
    assert short.skipped == {"TEST": 3}


@pytest.mark.parametrize("crowds", [10, 4000])
def test_memory_of_crowd_regions_does_not_grow_with_the_detections(crowds: int) -> None:
    evaluator = Evaluator({1: "a"})
    mask = square(0, 0, 8)
    for n in range(300):
        evaluator.add(truth_of(n, mask), mask, 0.5)
    for n in range(crowds):
        evaluator.add(truth_of(1000 + n, mask, iscrowd=1), None, 0.0)
    tracemalloc.start()
    try:
        evaluator.report()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000 + 1000 * crowds
