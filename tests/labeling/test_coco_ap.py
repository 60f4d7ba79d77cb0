"""COCO's twelve figures: any ids, nothing printed, nothing guessed."""

import json
import threading
from typing import Any

import pytest

from mal_train.errors import BadDataset
from mal_train.labeling.coco_ap import coco_ap
from tests.labeling.truths import square


class TestCocoAp:
    def data(self, image_id: Any, annotation_id: Any, category_id: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        where = {"image_id": image_id, "category_id": category_id}
        truth = {
            "images": [{"id": image_id, "height": 40, "width": 60}],
            "annotations": [{**where, "id": annotation_id, "segmentation": square(0, 0, 8).to_coco()}],
        }
        return truth, [{**where, "segmentation": square(0, 0, 8).to_coco(), "score": 0.5}]

    @pytest.mark.parametrize("ids", [(0, 0, 0), ("x", "y", "z"), (1.5, "1", -3)])
    def test_ids_of_any_type_work_and_zero_is_an_id(self, ids: tuple[Any, Any, Any]) -> None:
        assert coco_ap(*self.data(*ids))["AP"] == pytest.approx(1.0)

    def test_no_results_is_zero_not_a_crash(self) -> None:
        truth, _ = self.data(1, 1, 1)
        assert coco_ap(truth, [])["AP"] == 0.0

    def test_figures_without_instances_are_none(self) -> None:
        figures = coco_ap(*self.data(1, 1, 1))
        assert figures["APl"] is None
        assert figures["APs"] == pytest.approx(1.0)

    def test_result_for_an_unknown_image_is_named(self) -> None:
        truth, results = self.data(1, 1, 1)
        with pytest.raises(BadDataset, match="result 1: image_id 7"):
            coco_ap(truth, [{**results[0], "image_id": 7}])

    def test_result_of_a_class_without_ground_truth_does_not_matter(self) -> None:
        truth, results = self.data(1, 1, 1)
        assert coco_ap(truth, [*results, {**results[0], "category_id": 9}])["AP"] == pytest.approx(1.0)

    def test_malformed_run_lengths_are_refused_not_guessed(self) -> None:
        truth, results = self.data(1, 1, 1)
        results[0]["segmentation"] = {"size": [40, 60], "counts": [5]}
        with pytest.raises(BadDataset, match="result 1: runs sum to 5"):
            coco_ap(truth, results)

    def test_arguments_are_not_changed(self) -> None:
        truth, results = self.data(1, 1, 1)
        before = json.dumps([truth, results])
        coco_ap(truth, results)
        assert json.dumps([truth, results]) == before

    def test_nothing_is_printed_and_other_threads_keep_their_output(self, capsys: pytest.CaptureFixture[str]) -> None:
        truth, results = self.data(1, 1, 1)
        threads = [threading.Thread(target=coco_ap, args=(truth, results)) for _ in range(4)]
        for thread in threads:
            thread.start()
        print("mine")
        for thread in threads:
            thread.join()
        assert capsys.readouterr().out == "mine\n"
