"""Boxes that cannot be labeled, extend beyond their image, or do not fit into memory: each fails alone."""

from typing import Any

import numpy as np
import pytest
from google.rpc import code_pb2
from mal.v1 import types_pb2

from mal_server.models.warmup import synthetic_image
from tests.mal_server.calls import reason_of, with_server
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, label, label_request


@pytest.mark.parametrize(
    ("box", "named"),
    [
        ((float("nan"), 0, 5, 5), "nan"),
        ((0, 0, float("inf"), 5), "inf"),
        ((0, 0, 0, 5), "width"),
        ((0, 0, 5, -2), "height"),
        ((100, 100, 5, 5), ""),
        ((-50, 0, 50, 5), ""),
        ((1e9, 1e9, 1e9, 1e9), ""),
    ],
)
def test_a_bad_box_fails_alone(box: tuple[float, float, float, float], named: str) -> None:
    bad, good = with_server(lambda running: label(running, label_request(box, DISC_BOX)))
    assert bad.status.code == code_pb2.INVALID_ARGUMENT
    assert reason_of(bad.status) == "BAD_BOX"
    assert named in bad.status.message.lower()
    assert len(bad.masks) == 0
    assert good.status.code == code_pb2.OK
    assert good.area_px > 300


def test_a_request_with_only_bad_boxes_has_a_result_for_each() -> None:
    results = with_server(lambda running: label(running, label_request((0, 0, 0, 0), (0, 0, -1, 1))))
    assert [reason_of(result.status) for result in results] == ["BAD_BOX", "BAD_BOX"]


@pytest.mark.parametrize(
    "box",
    [(0, 0, 30, 30), (30, 0, 30, 30), (0, 10, 30, 30), (30, 10, 30, 30), (0, 0, 60, 40)],
    ids=["top left", "top right", "bottom left", "bottom right", "all"],
)
def test_a_box_that_touches_the_border_is_not_clipped(box: tuple[float, float, float, float]) -> None:
    (result,) = with_server(lambda running: label(running, label_request(box)))
    assert result.area_px > 0
    assert types_pb2.MASK_FLAG_BOX_CLIPPED not in result.flags


def test_a_huge_box_is_clipped_and_flagged() -> None:
    (result,) = with_server(lambda running: label(running, label_request((-1e9, -1e9, 2e9, 2e9))))
    assert result.status.code == code_pb2.OK
    assert types_pb2.MASK_FLAG_BOX_CLIPPED in result.flags
    assert result.area_px == pytest.approx(np.pi * 144, rel=0.15)


def test_one_crop_out_of_memory_fails_alone() -> None:
    code, oom = code_pb2.INTERNAL, "OUT_OF_MEMORY"
    results = with_server(
        lambda running: label(running, label_request(DISC_BOX, DISC_BOX)), BrightPredictor(fits=1), max_batch_size=8
    )
    assert [result.status.code for result in results] == [code_pb2.OK, code_pb2.OK]
    results = with_server(lambda running: label(running, label_request(DISC_BOX, (0, 0, -1, 1))), OutOfMemory())
    assert [(r.status.code, reason_of(r.status)) for r in results] == [
        (code, oom),
        (code_pb2.INVALID_ARGUMENT, "BAD_BOX"),
    ]


class OutOfMemory(BrightPredictor):
    """A predictor whose device has memory for its self-test, and for no crop afterwards."""

    def predict(self, crops: Any, options: Any = None) -> Any:
        self.fits = 10_000 if crops[0].image_hw == synthetic_image().shape[:2] else 0
        return super().predict(crops, options)
