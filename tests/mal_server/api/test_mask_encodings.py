"""The forms in which masks leave the server, and what is done to them on request."""

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


def test_masks_come_in_every_asked_format_in_order_and_are_the_same_mask() -> None:
    request = label_request(DISC_BOX, content=ring_png(), formats=ALL_FORMATS)
    (found,) = with_server(lambda running: label(running, request))
    assert [mask.WhichOneof("encoding") for mask in found.masks] == ["png", "polygons", "uncompressed_rle", "coco_rle"]
    codes = [decoded(mask) for mask in found.masks]
    assert codes == [codes[0]] * 4
    assert rle.area(codes[0]) == found.area_px
    assert [ring.is_hole for ring in found.masks[1].polygons.rings] == [False, True]


def test_no_format_means_the_compressed_code() -> None:
    (found,) = with_server(lambda running: label(running, label_request(DISC_BOX)))
    assert [mask.WhichOneof("encoding") for mask in found.masks] == ["coco_rle"]


def test_a_tolerance_thins_polygons_and_nothing_else() -> None:
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


def test_specks_are_taken_out_on_request() -> None:
    image = bright_disc()
    image[2:9, 2:9] = 230
    ask: dict[str, Any] = {"content": encoded(image)}

    async def work(running: Running) -> list[types_pb2.InstanceResult]:
        return [
            *await label(running, label_request((0, 0, 60, 40), **ask)),
            *await label(running, label_request((0, 0, 60, 40), **ask, min_component_area_px=90)),
        ]

    all_of_it, without = with_server(work)
    assert types_pb2.MASK_FLAG_MULTI_PART in all_of_it.flags
    assert types_pb2.MASK_FLAG_MULTI_PART not in without.flags
    assert without.area_px == rle.area(decoded(without.masks[0])) < all_of_it.area_px


def test_contested_pixels_go_to_one_instance_on_request() -> None:
    whole, part, beside = (0, 0, 60, 40), (20, 10, 10, 20), (1000, 1000, 5, 5)
    asked: list[dict[str, Any]] = [
        {},
        {"resolve_overlaps": True},
        {"resolve_overlaps": True, "compute_agreement": True},
    ]

    async def work(running: Running) -> list[list[types_pb2.InstanceResult]]:
        return [
            await label(running, label_request(whole, part, beside, content=encoded(bright_disc()), **options))
            for options in asked
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
