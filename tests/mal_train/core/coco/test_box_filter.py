"""Selection of the boxes to train on."""

import json
from typing import Any

import pytest

from mal_train.core.coco.annotations import Reason
from mal_train.core.coco.box_filter import tao_keeps, training_exclusion
from mal_train.core.settings import Compat
from tests.mal_train.core.coco.coco_rows import dataset, only, row
from tests.reference import fixture


class TestTrainingFilter:
    def test_the_published_filter_is_reproduced(self) -> None:
        data = json.loads(fixture("l_filter.json").read_text())
        size = (data["width"], data["height"])
        for kept, low, high in ((data["train_kept"], 2048, 1e10), (data["test_kept"], 0, 1e9)):
            ours = [n for n, box in enumerate(data["bboxes"], start=1) if tao_keeps(box, size, low, high)]
            assert ours == kept

    def test_boxes_beyond_the_image_edge_are_clipped_not_discarded(self) -> None:
        annotation = only(dataset(row(bbox=[-5, 0, 25, 20])))
        bounds = {"min_area": 300.0, "max_area": 1e10}
        assert training_exclusion(annotation, (0, 0, 20, 20), (64, 48), **bounds, compat=Compat.NONE) is None
        excluded = training_exclusion(annotation, (0, 0, 20, 20), (64, 48), **bounds, compat=Compat.TAO)
        assert excluded is Reason.BOX_OUT_OF_BOUNDS

    @pytest.mark.parametrize("compat", list(Compat))
    def test_crowds_are_never_trained_on(self, compat: Compat) -> None:
        annotation = only(dataset(row(iscrowd=1)))
        excluded = training_exclusion(annotation, (1, 2, 10, 20), (64, 48), min_area=0, max_area=1e10, compat=compat)
        assert excluded is Reason.CROWD

    @pytest.mark.parametrize(
        ("clipped", "expected"),
        [
            (None, Reason.BAD_BOX),
            ((0.0, 0.0, 10.0, 10.0), Reason.BOX_TOO_SMALL),
            ((0.0, 0.0, 10.0, 10.5), None),
            ((0.0, 0.0, 20.0, 10.0), Reason.BOX_TOO_LARGE),
        ],
    )
    def test_area_bounds_are_exclusive_and_use_the_clipped_box(self, clipped: Any, expected: Reason | None) -> None:
        annotation = only(dataset(row()))
        excluded = training_exclusion(annotation, clipped, (64, 48), min_area=100, max_area=200, compat=Compat.NONE)
        assert excluded is expected

    def test_invalid_rows_keep_their_reason(self) -> None:
        annotation = only(dataset(row(bbox=None)))
        excluded = training_exclusion(annotation, None, (64, 48), min_area=0, max_area=9, compat=Compat.NONE)
        assert excluded is Reason.BAD_BOX
