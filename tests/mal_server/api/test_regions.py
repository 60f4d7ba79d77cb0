"""Parts of larger images: the masks of the complete image, and regions of any place and size."""

import numpy as np
import pytest
from google.rpc import code_pb2
from mal.v1 import labeling_pb2, types_pb2

from mal_train.core.images.decoder import encode_png
from mal_train.core.images.header import MAX_FRAME_PIXELS
from tests.mal_server.calls import fields_of, reason_of, refusal, with_server
from tests.mal_server.fakes import label, label_request

SIDE = 120
PIXELS = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
BOX = (50.0, 60.0, 30.0, 25.0)


def part(
    x: int, y: int, side: int, *boxes: tuple[float, float, float, float], frame: tuple[int, int] = (SIDE, SIDE)
) -> labeling_pb2.LabelImageRequest:
    """Returns a request with the part of the image at (x, y)."""
    request = label_request(*boxes)
    request.image.content = encode_png(np.ascontiguousarray(PIXELS[y : y + side, x : x + side]))
    request.image.region.CopyFrom(types_pb2.ImageRegion(x=x, y=y, image_width=frame[0], image_height=frame[1]))
    return request


def test_the_result_of_a_part_is_that_of_the_complete_image() -> None:
    whole = label_request(BOX)
    whole.image.content = encode_png(PIXELS)
    (expected,) = with_server(lambda running: label(running, whole))
    (found,) = with_server(lambda running: label(running, part(40, 50, 60, BOX)))
    assert found == expected
    assert found.masks[0].coco_rle.width == SIDE


def test_boxes_outside_their_part_fail_alone() -> None:
    boxes = (BOX, (5.0, 5.0, 20.0, 20.0), (0.0, 0.0, 0.0, 3.0), (0.0, 0.0, float(SIDE), float(SIDE)))
    found = with_server(lambda running: label(running, part(40, 50, 60, *boxes)))
    assert [result.status.code == code_pb2.OK for result in found] == [True, False, False, False]
    assert {reason_of(result.status) for result in found[1:]} == {"BAD_BOX"}


@pytest.mark.parametrize("place", [(-(2**31), 2**31 - 1), (2**31 - 1, -(2**31)), (0, 0)])
def test_a_part_may_lie_anywhere(place: tuple[int, int]) -> None:
    request = part(0, 0, 60, (1e9, 1e9, 1e9, 1e9), (-1e9, -1e9, 2e9, 2e9), frame=(1 << 15, 1 << 15))
    request.image.region.x, request.image.region.y = place
    found = with_server(lambda running: label(running, request))
    assert {reason_of(result.status) for result in found} == {"BAD_BOX"}


@pytest.mark.parametrize("frame", [(0, 10), (10, 0), (-5, 10), (MAX_FRAME_PIXELS, 2), (2**31 - 1, 2**31 - 1)])
def test_a_frame_without_pixels_or_of_too_many_is_refused(frame: tuple[int, int]) -> None:
    _, status, _ = refusal(lambda running: label(running, part(0, 0, 60, BOX, frame=frame)))
    assert fields_of(status) == ["image.region"]


def test_overlaps_of_parts_are_refused() -> None:
    request = part(40, 50, 60, BOX)
    request.options.resolve_overlaps = True
    _, status, _ = refusal(lambda running: label(running, request))
    assert fields_of(status) == ["image.region"]
