"""The RPCs through a real channel, around a predictor without a network."""

import asyncio
import dataclasses
import io
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from mal.v1 import labeling_pb2, labeling_pb2_grpc, model_pb2, types_pb2
from PIL import Image

from mal_server.batcher import Batcher
from mal_server.selftest import picture
from mal_train.errors import DeviceError
from mal_train.labeling import rle
from mal_train.labeling.labeler import Label
from mal_train.labeling.polygons import fill
from mal_train.labeling.rle import Rle, decode_mask
from tests.server.fakes import (
    DISC_BOX,
    DISC_PNG,
    BrightPredictor,
    Running,
    bright_disc,
    encoded,
    label,
    label_request,
    serving,
)

Work = Callable[[Running], Awaitable[Any]]


def with_server(work: Work, predictor: BrightPredictor | None = None, **settings: Any) -> Any:
    async def run() -> Any:
        async with serving(predictor, **settings) as running:
            return await asyncio.wait_for(work(running), 60)

    return asyncio.run(run())


def refusal(
    call: Callable[[Running], Awaitable[Any]], predictor: BrightPredictor | None = None, **settings: Any
) -> Any:
    """(code, status with details, trailers) of a call that must fail; the server must answer after it."""

    async def work(running: Running) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(running)
        await running.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        return raised.value

    error = with_server(work, predictor, **settings)
    return error.code(), status_details(error), dict(error.trailing_metadata())


def status_details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The rich status; an empty one when gRPC itself refused."""
    trailers: dict[str, Any] = dict(error.trailing_metadata())  # type: ignore[arg-type]
    return status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))


def reason_of(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in status.details if detail.Unpack(info)), "")


def fields_of(status: status_pb2.Status) -> list[str]:
    bad = error_details_pb2.BadRequest()
    return [violation.field for detail in status.details if detail.Unpack(bad) for violation in bad.field_violations]


def mask_of(result: types_pb2.InstanceResult) -> Any:
    code = result.masks[0].coco_rle
    return decode_mask(Rle(code.height, code.width, code.counts))


def test_the_mask_is_the_kernels_own() -> None:
    predictor = BrightPredictor()
    (result,) = with_server(lambda running: label(running, label_request(DISC_BOX)), predictor)
    (own,) = predictor.label(bright_disc(), [DISC_BOX])
    assert isinstance(own, Label)
    code = result.masks[0].coco_rle
    assert (code.height, code.width, code.counts) == (own.rle.height, own.rle.width, own.rle.counts)
    assert (result.score, result.area_px) == (own.score, own.area)
    assert (result.mask_box.x, result.mask_box.width) == (own.mask_box or (0, 0, 0))[0:3:2]
    assert mask_of(result)[20, 30]
    assert not mask_of(result)[9, 19]


def test_an_answer_says_which_weights_made_it_and_where_the_time_went() -> None:
    async def work(running: Running) -> list[labeling_pb2.LabelImageResponse]:
        call = running.labeling.LabelImage(label_request(DISC_BOX, branch=types_pb2.BRANCH_TEACHER))
        return [answer async for answer in call]

    (answer,) = with_server(work, BrightPredictor(wait_s=0.02))
    assert (answer.model.name, answer.model.branch) == ("disc", types_pb2.BRANCH_TEACHER)
    assert len(answer.model.checkpoint_sha256) == 64
    assert answer.timing.batch_size == 1
    assert answer.timing.infer.ToMilliseconds() >= 20
    assert answer.timing.decode.ToMicroseconds() > 0
    assert answer.timing.finish.ToMicroseconds() > 0


def test_a_large_request_streams_one_message_for_each_batch() -> None:
    async def work(running: Running) -> list[labeling_pb2.LabelImageResponse]:
        return [answer async for answer in running.labeling.LabelImage(label_request(*[DISC_BOX] * 20))]

    answers = with_server(work, max_batch_size=8)
    assert [answer.timing.batch_size for answer in answers] == [8, 8, 4]
    assert sorted(result.instance_id for answer in answers for result in answer.results) == list(range(20))


def test_a_request_without_boxes_gets_one_empty_answer() -> None:
    async def work(running: Running) -> list[labeling_pb2.LabelImageResponse]:
        return [answer async for answer in running.labeling.LabelImage(label_request())]

    (answer,) = with_server(work)
    assert len(answer.results) == 0
    assert answer.model.name == "disc"


def test_options_reach_the_network_and_the_threshold() -> None:
    async def work(running: Running) -> tuple[types_pb2.InstanceResult, types_pb2.InstanceResult]:
        request = label_request(DISC_BOX, branch=types_pb2.BRANCH_MIXED, compute_agreement=True, flip_test=True)
        (asked,) = await label(running, request)
        (low,) = await label(running, label_request(DISC_BOX, threshold=0.01))
        return asked, low

    predictor = BrightPredictor()
    asked, low = with_server(work, predictor)
    options = predictor.batches[0][0]
    assert (str(options.branch), options.agreement, options.flip) == ("mixed", True, True)
    assert asked.HasField("agreement")
    assert not low.HasField("agreement")
    assert low.area_px == 24 * 24 > asked.area_px
    assert types_pb2.MASK_FLAG_FULL_BOX in low.flags
    assert types_pb2.MASK_FLAG_LOW_AGREEMENT in asked.flags


def decoded(mask: types_pb2.Mask) -> Rle:
    """The run-length code of a mask as a client of any language would read it from its message."""
    if mask.HasField("coco_rle"):
        return Rle(mask.coco_rle.height, mask.coco_rle.width, mask.coco_rle.counts)
    if mask.HasField("uncompressed_rle"):
        runs = mask.uncompressed_rle
        return rle.encode_runs(list(runs.counts), runs.height, runs.width)
    if mask.HasField("polygons"):
        rings = [np.reshape(ring.points, (-1, 2)) for ring in mask.polygons.rings]
        return rle.encode_mask(fill(rings, mask.polygons.height, mask.polygons.width))
    png = mask.png
    with Image.open(io.BytesIO(png.content)) as picture:
        return rle.encode_region(np.asarray(picture), png.y, png.x, (png.height, png.width))


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


def test_the_servers_branch_answers_where_a_request_names_none() -> None:
    predictor = BrightPredictor()
    with_server(lambda running: label(running, label_request(DISC_BOX)), predictor, branch="teacher")
    assert str(predictor.batches[0][0].branch) == "teacher"


@pytest.mark.parametrize(
    ("box", "text"),
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
def test_a_bad_box_fails_alone(box: tuple[float, float, float, float], text: str) -> None:
    bad, good = with_server(lambda running: label(running, label_request(box, DISC_BOX)))
    assert bad.status.code == code_pb2.INVALID_ARGUMENT
    assert reason_of(bad.status) == "BAD_BOX"
    assert text in bad.status.message.lower()
    assert len(bad.masks) == 0
    assert good.status.code == code_pb2.OK
    assert good.area_px > 300


def test_only_bad_boxes_still_get_an_answer_each() -> None:
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
    results = with_server(lambda running: label(running, label_request(DISC_BOX, (0, 0, -1, 1))), OutOfRoom())
    assert [(r.status.code, reason_of(r.status)) for r in results] == [
        (code, oom),
        (code_pb2.INVALID_ARGUMENT, "BAD_BOX"),
    ]


class OutOfRoom(BrightPredictor):
    """Fits crops in its self-test, none afterwards."""

    def predict(self, crops: Any, options: Any = None) -> Any:
        self.fits = 10_000 if crops[0].image_hw == picture().shape[:2] else 0
        return super().predict(crops, options)


def violating(**changes: Any) -> labeling_pb2.LabelImageRequest:
    request = label_request(DISC_BOX)
    request.MergeFrom(labeling_pb2.LabelImageRequest(**changes))
    return request


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (labeling_pb2.LabelImageRequest(), "image.content"),
        (label_request(DISC_BOX, DISC_BOX, ids=[4, 4]), "instances[1].instance_id"),
        (violating(instances=[types_pb2.Instance(instance_id=9)]), "instances[1].box"),
        (violating(options=types_pb2.LabelOptions(threshold=0.0)), "options.threshold"),
        (violating(options=types_pb2.LabelOptions(polygon_tolerance_px=-1.0)), "options.polygon_tolerance_px"),
        (violating(options=types_pb2.LabelOptions(polygon_tolerance_px=float("nan"))), "options.polygon_tolerance_px"),
        (violating(options=types_pb2.LabelOptions(polygon_tolerance_px=float("inf"))), "options.polygon_tolerance_px"),
        (violating(options=types_pb2.LabelOptions(min_component_area_px=-1)), "options.min_component_area_px"),
        (violating(options=types_pb2.LabelOptions(formats=[types_pb2.MASK_FORMAT_UNSPECIFIED])), "options.formats"),
        (violating(options=types_pb2.LabelOptions(formats=[types_pb2.MASK_FORMAT_PNG] * 2)), "options.formats"),
        (violating(options=types_pb2.LabelOptions(threshold=float("nan"))), "options.threshold"),
        (violating(options=types_pb2.LabelOptions(branch=17)), "options.branch"),  # type: ignore[arg-type]
        (violating(image=types_pb2.ImageSource(expected_width=60)), "image.expected_width"),
        (violating(image=types_pb2.ImageSource(expected_width=-60, expected_height=-40)), "image.expected_width"),
        (label_request(*[DISC_BOX] * 6), "instances"),
    ],
)
def test_a_field_that_breaks_the_contract_is_named(request_: labeling_pb2.LabelImageRequest, field: str) -> None:
    code, status, _ = refusal(lambda running: label(running, request_), limits={"max_boxes": 5})
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields_of(status) == [field]


def test_all_wrong_fields_are_named_at_once() -> None:
    request = label_request(DISC_BOX, DISC_BOX, ids=[1, 1], threshold=2.0)
    _, status, _ = refusal(lambda running: label(running, request))
    assert fields_of(status) == ["instances[1].instance_id", "options.threshold"]


def test_a_rotated_picture_is_an_error_and_no_shifted_mask() -> None:
    request = label_request(DISC_BOX)
    request.image.expected_width, request.image.expected_height = 40, 60
    code, status, _ = refusal(lambda running: label(running, request))
    assert (code, reason_of(status)) == (grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_SIZE_MISMATCH")


def test_a_full_queue_is_unavailable_with_the_time_to_come_back() -> None:
    gate = threading.Event()

    async def call(running: Running) -> None:
        first = asyncio.create_task(label(running, label_request(*[DISC_BOX] * 5)))
        while not running.predictor.batches:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(label(running, label_request(*[DISC_BOX] * 5)))
        await until(lambda: waiting(running) == 5)
        try:
            await label(running, label_request(DISC_BOX))
        finally:
            gate.set()
            assert len(await first) == len(await second) == 5

    code, status, trailers = refusal(
        call, BrightPredictor(gate=gate), max_batch_size=5, max_queue_crops=5, limits={"max_boxes": 5}
    )
    assert (code, reason_of(status)) == (grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert int(trailers["grpc-retry-pushback-ms"]) == retry.retry_delay.ToMilliseconds() > 0


def test_an_unexpected_error_is_an_id_for_the_client_and_a_trace_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    predictor = BrightPredictor(error=ZeroDivisionError("secret detail"))
    code, status, _ = refusal(lambda running: label(running, label_request(DISC_BOX)), predictor)
    assert (code, reason_of(status)) == (grpc.StatusCode.INTERNAL, "UNEXPECTED")
    assert "secret" not in status.message
    error_id = status.message.split()[-1]
    record = next(record for record in caplog.records if error_id in record.getMessage())
    assert record.exc_info is not None


def test_a_device_that_fails_on_a_batch_is_logged_once_and_told_box_by_box(caplog: pytest.LogCaptureFixture) -> None:
    predictor = BrightPredictor(error=DeviceError("the card is on fire"))
    results = with_server(lambda running: label(running, label_request(*[DISC_BOX] * 3, (0, 0, 0, 0))), predictor)
    assert [result.status.code for result in results] == [code_pb2.INTERNAL] * 3 + [code_pb2.INVALID_ARGUMENT]
    assert len({result.status.message for result in results[:3]}) == 1
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_eight_clients_with_one_box_each_share_batches() -> None:
    gate = threading.Event()

    async def work(running: Running) -> list[int]:
        async def client(_: int) -> list[int]:
            async with grpc.aio.insecure_channel(running.server.address) as channel:
                stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
                return [a.timing.batch_size async for a in stub.LabelImage(label_request(DISC_BOX))]

        clients = [asyncio.create_task(client(number)) for number in range(8)]
        await until(lambda: sum(size for _, size in running.predictor.batches) + waiting(running) == 8)
        gate.set()
        return [size for sizes in await asyncio.gather(*clients) for size in sizes]

    sizes = with_server(work, BrightPredictor(gate=gate))
    # What came while the first batch ran is the second one.
    first = min(sizes)
    assert sorted(sizes) in ([first] * first + [8 - first] * (8 - first), [8] * 8)


def test_boxes_of_different_images_in_one_batch_get_their_own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, queued, inner = threading.Event(), list[int](), Batcher.enqueue

    def noticed(batcher: Any, ticket: Any, key: Any, items: Any) -> None:
        inner(batcher, ticket, key, items)
        queued.append(len(items))

    monkeypatch.setattr(Batcher, "enqueue", noticed)

    async def work(running: Running) -> list[list[types_pb2.InstanceResult]]:
        blocker = asyncio.create_task(label(running, label_request(DISC_BOX)))
        await until(lambda: running.predictor.batches)
        before = len(queued)
        shifted = np.roll(bright_disc(), 12, axis=1)
        requests = [label_request(DISC_BOX), label_request((30.0, 8.0, 24.0, 24.0), content=encoded(shifted))]
        tasks = [asyncio.create_task(label(running, request)) for request in requests]
        await until(lambda: len(queued) == before + 2)
        gate.set()
        await blocker
        return list(await asyncio.gather(*tasks))

    predictor = BrightPredictor(gate=gate)
    (here,), (there,) = with_server(work, predictor)
    assert [size for _, size in predictor.batches] == [1, 2]
    assert (there.mask_box.x - here.mask_box.x, there.area_px) == (12, here.area_px)


def test_a_client_that_leaves_does_not_stall_the_others() -> None:
    gate = threading.Event()

    async def work(running: Running) -> list[types_pb2.InstanceResult]:
        leaving = running.labeling.LabelImage(label_request(*[DISC_BOX] * 3))
        reader = asyncio.create_task(leaving.read())
        while not running.predictor.batches:
            await asyncio.sleep(0.001)
        queued = [running.labeling.LabelImage(label_request(*[DISC_BOX] * 3)) for _ in range(10)]
        readers = [asyncio.create_task(call.read()) for call in queued]
        await until(lambda: waiting(running) == 30)
        for call in (leaving, *queued):
            call.cancel()
        await asyncio.gather(reader, *readers, return_exceptions=True)
        await until(lambda: waiting(running) == 0)
        gate.set()
        return await label(running, label_request(DISC_BOX))

    predictor = BrightPredictor(gate=gate)
    (result,) = with_server(work, predictor)
    assert result.area_px > 0
    assert [size for _, size in predictor.batches] == [3, 1]


def test_a_call_past_its_deadline_is_dropped() -> None:
    gate = threading.Event()

    async def work(running: Running) -> grpc.StatusCode:
        first = asyncio.create_task(label(running, label_request(DISC_BOX)))
        while not running.predictor.batches:
            await asyncio.sleep(0.001)
        call = running.labeling.LabelImage(label_request(*[DISC_BOX] * 3), timeout=0.1)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        await until(lambda: waiting(running) == 0)
        gate.set()
        await first
        await label(running, label_request(DISC_BOX))
        return raised.value.code()

    predictor = BrightPredictor(gate=gate)
    assert with_server(work, predictor) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert [size for _, size in predictor.batches] == [1, 1]


def items(
    *requests: labeling_pb2.LabelImageRequest,
) -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
    async def stream() -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
        for index, request in enumerate(requests):
            yield labeling_pb2.LabelImagesRequest(item_id=f"item {index}", request=request)

    return stream()


async def bulk(running: Running, *requests: labeling_pb2.LabelImageRequest) -> dict[str, Any]:
    answers = [answer async for answer in running.labeling.LabelImages(items(*requests))]
    assert len(answers) == len({answer.item_id for answer in answers})
    return {answer.item_id: answer for answer in answers}


def test_every_item_of_a_stream_is_answered_once_and_errors_are_its_own() -> None:
    good = label_request(DISC_BOX, (0, 0, -1, 1))
    requests = [good, label_request(DISC_BOX, content=b"no picture"), label_request(DISC_BOX, threshold=3.0), good]
    found = with_server(lambda running: bulk(running, *requests))
    assert sorted(found) == [f"item {i}" for i in range(4)]
    assert [found[f"item {i}"].status.code for i in range(4)] == [0, 3, 3, 0]
    assert reason_of(found["item 1"].status) == "IMAGE_FORMAT"
    assert fields_of(found["item 2"].status) == ["request.options.threshold"]
    assert [len(found[f"item {i}"].response.results) for i in range(4)] == [2, 0, 0, 2]


def test_a_whole_item_comes_in_one_message() -> None:
    found = with_server(lambda running: bulk(running, label_request(*[DISC_BOX] * 20)), max_batch_size=8)
    response = found["item 0"].response
    assert len(response.results) == 20
    assert response.timing.batch_size == 8


def test_a_long_item_id_is_refused_as_an_item() -> None:
    async def work(running: Running) -> Any:
        async def stream() -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
            yield labeling_pb2.LabelImagesRequest(item_id="é" * 200, request=label_request(DISC_BOX))

        return [answer async for answer in running.labeling.LabelImages(stream())]

    (answer,) = with_server(work)
    assert fields_of(answer.status) == ["item_id"]
    assert answer.item_id == "é" * 128


def test_a_stream_reads_no_further_than_its_window() -> None:
    gate = threading.Event()
    sent: list[int] = []

    async def work(running: Running) -> int:
        async def stream() -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
            for index in range(40):
                sent.append(index)
                yield labeling_pb2.LabelImagesRequest(item_id=str(index), request=label_request(DISC_BOX))

        call = running.labeling.LabelImages(stream())
        answers = asyncio.create_task(collect(call))
        await until(lambda: running.predictor.batches and len(sent) > 3)
        await until(lambda: sum(size for _, size in running.predictor.batches) + waiting(running) >= 3)
        for _ in range(50):  # the server has time for others, and would have had it for further items
            await running.model.ListModels(model_pb2.ListModelsRequest())
        started = running.predictor.batches[0][1] + waiting(running)
        gate.set()
        assert len(await answers) == 40
        return started

    assert with_server(work, BrightPredictor(gate=gate), limits={"max_items_in_flight": 3}) == 3


async def until(condition: Callable[[], object]) -> None:
    """Waits for it, however slow the machine is; the test's own time limit ends what never comes."""
    while not condition():
        await asyncio.sleep(0.001)


async def collect(call: Any) -> list[Any]:
    return [answer async for answer in call]


def waiting(running: Running) -> int:
    return running.server.waiting


def test_items_finish_in_any_order() -> None:
    gate = threading.Event()

    async def work(running: Running) -> list[str]:
        async def stream() -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
            yield labeling_pb2.LabelImagesRequest(item_id="slow", request=label_request(*[DISC_BOX] * 40))
            yield labeling_pb2.LabelImagesRequest(item_id="refused", request=label_request(content=b""))

        found = []
        async for answer in running.labeling.LabelImages(stream()):
            found.append(answer.item_id)
            gate.set()
        return found

    assert with_server(work, BrightPredictor(gate=gate), max_batch_size=4) == ["refused", "slow"]


def test_a_client_that_leaves_a_stream_frees_its_work() -> None:
    gate = threading.Event()

    async def work(running: Running) -> list[int]:
        call = running.labeling.LabelImages(items(*[label_request(DISC_BOX, DISC_BOX)] * 8))
        reader = asyncio.create_task(call.read())
        await until(lambda: waiting(running) == 14)
        call.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await until(lambda: waiting(running) == 0)  # the device is still in its first batch
        gate.set()
        await label(running, label_request(DISC_BOX))
        return [size for _, size in running.predictor.batches]

    assert with_server(work, BrightPredictor(gate=gate), max_batch_size=2) == [2, 1]


def test_a_large_request_that_is_cancelled_gives_its_room_in_the_queue_back() -> None:
    """Through the whole path: with it waiting a second one is refused, and taken once the first one has left."""
    gate = threading.Event()
    large = label_request(*[DISC_BOX] * 40)

    async def work(running: Running) -> tuple[str, int, list[int]]:
        blocker = asyncio.create_task(label(running, label_request(DISC_BOX)))
        await until(lambda: running.predictor.batches)
        first = running.labeling.LabelImage(large)
        reading = asyncio.create_task(first.read())
        await until(lambda: waiting(running) == 40)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await label(running, large)
        first.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: waiting(running) == 0)
        second = asyncio.create_task(label(running, large))
        await until(lambda: waiting(running) == 40)
        gate.set()
        await blocker
        found = len(await second)
        return reason_of(status_details(raised.value)), found, [size for _, size in running.predictor.batches]

    settings: dict[str, Any] = {"max_queue_crops": 40, "max_batch_size": 40, "limits": {"max_boxes": 40}}
    assert with_server(work, BrightPredictor(gate=gate), **settings) == ("QUEUE_FULL", 40, [1, 40])


class LongWinded(BrightPredictor):
    """Its masks take 100 kB each."""

    def finish(self, crop: Any, probability: Any, **options: Any) -> Label:
        label = super().finish(crop, probability, **options)
        return dataclasses.replace(label, rle=Rle(label.rle.height, label.rle.width, bytes(100_000)))


def test_an_item_whose_answer_is_too_large_says_so() -> None:
    requests = [label_request(*[DISC_BOX] * 11), label_request(DISC_BOX)]
    found = with_server(lambda running: bulk(running, *requests), LongWinded(), limits={"max_response_bytes": 1 << 20})
    assert fields_of(found["item 0"].status) == ["request.instances"]
    assert len(found["item 1"].response.results) == 1


def test_server_info_tells_model_and_limits() -> None:
    async def work(running: Running) -> model_pb2.GetServerInfoResponse:
        answer: model_pb2.GetServerInfoResponse = await running.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        return answer

    info = with_server(work, branch="mixed", model_name="discs", limits={"max_boxes": 77})
    assert (info.model.ref.name, info.model.ref.branch) == ("discs", types_pb2.BRANCH_MIXED)
    assert (info.model.arch, info.model.crop_size) == ("bright/1", 16)
    assert info.model.mask_thresholds.large == 0.5
    assert not info.model.score_calibrated
    assert [(c.category_id, c.name) for c in info.model.categories] == [(7, "disc"), (2, "")]
    assert (info.limits.max_boxes, info.limits.max_request_bytes) == (77, 32 * 1024 * 1024)
    assert (list(info.devices), info.precision) == (["cpu"], "float32")
    assert info.version


def test_a_message_above_the_limit_is_the_only_resource_exhausted() -> None:
    content = DISC_PNG + bytes(1024 * 1024)
    code, _, _ = refusal(
        lambda running: label(running, label_request(DISC_BOX, content=content)),
        limits={"max_request_bytes": 1024 * 1024},
    )
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x0a\x05ab"])
@pytest.mark.parametrize(
    "method", ["LabelingService/LabelImage", "LabelingService/LabelImages", "ModelService/GetServerInfo"]
)
def test_bytes_that_are_no_message_are_an_invalid_argument(method: str, data: bytes) -> None:
    async def call(running: Running) -> None:
        path = f"/mal.v1.{method}"
        if method.endswith("Info"):
            await running.channel.unary_unary(path)(data)
        elif method.endswith("Image"):
            await collect(running.channel.unary_stream(path)(data))
        else:
            await collect(running.channel.stream_stream(path)(iter([data])))

    code, status, _ = refusal(call)
    assert (code, fields_of(status)) == (grpc.StatusCode.INVALID_ARGUMENT, [""])


FLOATS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-300, 0.5, 1.0, 59.5, 60.0, 1e9, -1e9, 1e300]),
)
REQUESTS = st.builds(
    label_request,
    st.tuples(FLOATS, FLOATS, FLOATS, FLOATS),
    st.tuples(FLOATS, FLOATS, FLOATS, FLOATS),
    content=st.one_of(st.just(DISC_PNG), st.binary(max_size=40)),
    ids=st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 3)),
    threshold=st.one_of(st.none(), FLOATS),
    branch=st.integers(-5, 8),
    flip_test=st.booleans(),
    formats=st.lists(st.integers(-1, 6), max_size=4),
    polygon_tolerance_px=st.one_of(st.none(), FLOATS),
    min_component_area_px=st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
)


@given(st.lists(REQUESTS, min_size=20, max_size=20))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_no_request_is_a_fault_of_the_server(requests: list[labeling_pb2.LabelImageRequest]) -> None:
    answers = with_server(lambda running: bulk(running, *requests)).values()
    inner = {result.status.code for answer in answers for result in answer.response.results}
    assert {answer.status.code for answer in answers} | inner <= {code_pb2.OK, code_pb2.INVALID_ARGUMENT}
