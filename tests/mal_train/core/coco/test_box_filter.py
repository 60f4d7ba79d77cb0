"""Which boxes are trained on."""

import json
from typing import Any

import pytest

from mal_train.core.coco.annotations import Reason
from mal_train.core.coco.box_filter import tao_keeps, training_refusal
from mal_train.core.settings import Compat
from tests.mal_train.core.coco.coco_rows import dataset, only, row
from tests.reference import fixture


class TestTrainingFilter:
    def test_published_filter_keeps_the_same_boxes(self) -> None:
        data = json.loads(fixture("l_filter.json").read_text())
        size = (data["width"], data["height"])
        for kept, low, high in ((data["train_kept"], 2048, 1e10), (data["test_kept"], 0, 1e9)):
            ours = [n for n, box in enumerate(data["bboxes"], start=1) if tao_keeps(box, size, low, high)]
            assert ours == kept

    def test_boxes_over_the_edge_are_clipped_not_dropped(self) -> None:
        annotation = only(dataset(row(bbox=[-5, 0, 25, 20])))
        bounds = {"min_area": 300.0, "max_area": 1e10}
        assert training_refusal(annotation, (0, 0, 20, 20), (64, 48), **bounds, compat=Compat.NONE) is None
        refused = training_refusal(annotation, (0, 0, 20, 20), (64, 48), **bounds, compat=Compat.TAO)
        assert refused is Reason.BOX_OUT_OF_BOUNDS

    @pytest.mark.parametrize("compat", list(Compat))
    def test_crowds_are_never_trained_on(self, compat: Compat) -> None:
        annotation = only(dataset(row(iscrowd=1)))
        refused = training_refusal(annotation, (1, 2, 10, 20), (64, 48), min_area=0, max_area=1e10, compat=compat)
        assert refused is Reason.CROWD

    @pytest.mark.parametrize(
        ("clipped", "expected"),
        [
            (None, Reason.BAD_BOX),
            ((0.0, 0.0, 10.0, 10.0), Reason.BOX_TOO_SMALL),
            ((0.0, 0.0, 10.0, 10.5), None),
            ((0.0, 0.0, 20.0, 10.0), Reason.BOX_TOO_LARGE),
        ],
    )
    def test_area_bounds_are_strict_and_on_the_clipped_box(self, clipped: Any, expected: Reason | None) -> None:
        annotation = only(dataset(row()))
        refused = training_refusal(annotation, clipped, (64, 48), min_area=100, max_area=200, compat=Compat.NONE)
        assert refused is expected

    def test_rows_with_a_problem_keep_their_reason(self) -> None:
        annotation = only(dataset(row(category_id=8)))
        refused = training_refusal(annotation, None, (64, 48), min_area=0, max_area=9, compat=Compat.NONE)
        assert refused is Reason.CATEGORY_UNKNOWN
