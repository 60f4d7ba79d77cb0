"""The encodings of masks, and the options that change masks."""

from typing import Any

from mal.v1 import types_pb2

from mal_train.core.masks import rle
from tests.mal_server.calls import decoded, with_server
from tests.mal_server.fakes import DISC_BOX, Running, bright_disc, encoded, label, label_request

ALL_FORMATS = [
    types_pb2.MASK_FORMAT_PNG,
    types_pb2.MASK_FORMAT_POLYGONS,
    types_pb2.MASK_FORMAT_UNCOMPRESSED_RLE,
    types_pb2.MASK_FORMAT_COCO_RLE,
]


def ring_png() -> bytes:
    """A bright ring on a dark image: a mask with a hole."""
    image = bright_disc()
    image[17:23, 26:34] = 20
    return encoded(image)


def test_masks_have_every_requested_format_in_order_and_are_equal() -> None:
    request = label_request(DISC_BOX, content=ring_png(), formats=ALL_FORMATS)
    (result,) = with_server(lambda running: label(running, request))
    assert [mask.WhichOneof("encoding") for mask in result.masks] == ["png", "polygons", "uncompressed_rle", "coco_rle"]
    codes = [decoded(mask) for mask in result.masks]
    assert codes == [codes[0]] * 4
    assert rle.area(codes[0]) == result.area_px
    assert [ring.is_hole for ring in result.masks[1].polygons.rings] == [False, True]


def test_without_formats_masks_are_compressed_run_lengths() -> None:
    (result,) = with_server(lambda running: label(running, label_request(DISC_BOX)))
    assert [mask.WhichOneof("encoding") for mask in result.masks] == ["coco_rle"]


def test_a_tolerance_reduces_only_the_points_of_polygons() -> None:
    async def work(running: Running) -> list[types_pb2.InstanceResult]:
        return [
            *await label(running, label_request(DISC_BOX, formats=ALL_FORMATS)),
            *await label(running, label_request(DISC_BOX, formats=ALL_FORMATS, polygon_tolerance_px=1.5)),
        ]

    exact, thin = with_server(work)
    (many,), (few,) = exact.masks[1].polygons.rings, thin.masks[1].polygons.rings
    assert len(few.points) < len(many.points)
    del exact.masks[1], thin.masks[1]
    assert exact == thin


def test_small_parts_are_removed_on_request() -> None:
    image = bright_disc()
    image[2:9, 2:9] = 230
    fields: dict[str, Any] = {"content": encoded(image)}

    async def work(running: Running) -> list[types_pb2.InstanceResult]:
        return [
            *await label(running, label_request((0, 0, 60, 40), **fields)),
            *await label(running, label_request((0, 0, 60, 40), **fields, min_component_area_px=90)),
        ]

    complete, without = with_server(work)
    assert types_pb2.MASK_FLAG_MULTI_PART in complete.flags
    assert types_pb2.MASK_FLAG_MULTI_PART not in without.flags
    assert without.area_px == rle.area(decoded(without.masks[0])) < complete.area_px


def test_overlapping_pixels_are_assigned_to_one_instance_on_request() -> None:
    large, small_box, outside = (0, 0, 32, 40), (29, 10, 16, 20), (1000, 1000, 5, 5)
    requested: list[dict[str, Any]] = [
        {},
        {"resolve_overlaps": True},
        {"resolve_overlaps": True, "compute_agreement": True},
    ]

    async def work(running: Running) -> list[list[types_pb2.InstanceResult]]:
        return [
            await label(running, label_request(large, small_box, outside, content=encoded(bright_disc()), **options))
            for options in requested
        ]

    plain, shared, compared = with_server(work)
    (big, small), (big_left, small_left) = (
        [rle.decode_mask(decoded(result.masks[0])) for result in results[:2]] for results in (plain, shared)
    )
    assert (big & small).any()
    assert not (big_left & small_left).any()
    assert ((big_left | small_left) == (big | small)).all()
    assert small_left.sum() > 0.8 * small.sum()
    assert all(results[2].status.code != 0 for results in (plain, shared, compared))
    assert compared[0].HasField("agreement")


def test_of_two_boxes_of_one_object_the_second_is_flagged_as_dominated_if_overlaps_are_resolved() -> None:
    async def work(running: Running) -> list[list[types_pb2.InstanceResult]]:
        return [
            await label(running, label_request(*boxes, resolve_overlaps=resolve))
            for boxes, resolve in (([DISC_BOX] * 2, True), ([DISC_BOX] * 2, False), ([DISC_BOX], True))
        ]

    flagged = [[types_pb2.MASK_FLAG_DOMINATED in one.flags for one in results] for results in with_server(work)]
    assert flagged == [[False, True], [False, False], [False]]
