"""LabelImage and GetServerInfo over a real channel, with a predictor that has no network."""

import threading
from typing import Any

import pytest
from mal.v1 import labeling_pb2, model_pb2, types_pb2

from mal_server.api.serialization.labeling_messages import write_item, write_response
from mal_train.kernel.labeler.types import Label
from tests.mal_server.calls import bulk, mask_of, with_server
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, Running, bright_disc, label, label_request


def test_the_mask_equals_that_of_the_labeler() -> None:
    predictor = BrightPredictor()
    (result,) = with_server(lambda running: label(running, label_request(DISC_BOX)), predictor)
    (expected,) = predictor.label(bright_disc(), [DISC_BOX])
    assert isinstance(expected, Label)
    code = result.masks[0].coco_rle
    assert (code.height, code.width, code.counts) == (expected.rle.height, expected.rle.width, expected.rle.counts)
    assert (result.score, result.area_px) == (expected.score, expected.area)
    assert (result.mask_box.x, result.mask_box.width) == (expected.mask_box or (0, 0, 0))[0:3:2]
    assert mask_of(result)[20, 30]
    assert not mask_of(result)[9, 19]


def test_a_response_has_its_weights_and_its_durations() -> None:
    async def work(running: Running) -> list[labeling_pb2.LabelImageResponse]:
        call = running.labeling.LabelImage(label_request(DISC_BOX, branch=types_pb2.BRANCH_TEACHER))
        return [response async for response in call]

    (response,) = with_server(work, BrightPredictor(wait_s=0.02))
    assert (response.model.name, response.model.branch) == ("disc", types_pb2.BRANCH_TEACHER)
    assert len(response.model.checkpoint_sha256) == 64
    assert response.timing.batch_size == 1
    assert response.timing.infer.ToMilliseconds() >= 20
    assert response.timing.decode.ToMicroseconds() > 0
    assert response.timing.finish.ToMicroseconds() > 0


def test_a_large_request_streams_one_message_for_each_batch() -> None:
    async def work(running: Running) -> list[labeling_pb2.LabelImageResponse]:
        return [response async for response in running.labeling.LabelImage(label_request(*[DISC_BOX] * 20))]

    responses = with_server(work, max_batch_size=8)
    assert [response.timing.batch_size for response in responses] == [8, 8, 4]
    assert sorted(result.instance_id for response in responses for result in response.results) == list(range(20))


def test_a_request_without_boxes_gets_one_empty_response() -> None:
    async def work(running: Running) -> list[labeling_pb2.LabelImageResponse]:
        return [response async for response in running.labeling.LabelImage(label_request())]

    (response,) = with_server(work)
    assert len(response.results) == 0
    assert response.model.name == "disc"


def test_options_reach_the_network_and_the_threshold() -> None:
    async def work(running: Running) -> tuple[types_pb2.InstanceResult, types_pb2.InstanceResult]:
        request = label_request(DISC_BOX, branch=types_pb2.BRANCH_MIXED, compute_agreement=True, flip_test=True)
        (compared,) = await label(running, request)
        (low,) = await label(running, label_request(DISC_BOX, threshold=0.01))
        return compared, low

    predictor = BrightPredictor()
    compared, low = with_server(work, predictor)
    options = predictor.batches[0][0]
    assert (str(options.branch), options.agreement, options.flip) == ("mixed", True, True)
    assert compared.HasField("agreement")
    assert not low.HasField("agreement")
    assert low.area_px == 24 * 24 > compared.area_px
    assert types_pb2.MASK_FLAG_FULL_BOX in low.flags
    assert types_pb2.MASK_FLAG_LOW_AGREEMENT in compared.flags


def test_a_request_without_a_branch_uses_the_branch_of_the_server() -> None:
    predictor = BrightPredictor()
    with_server(lambda running: label(running, label_request(DISC_BOX)), predictor, branch="teacher")
    assert str(predictor.batches[0][0].branch) == "teacher"


def test_server_info_has_the_model_and_the_limits() -> None:
    async def work(running: Running) -> model_pb2.GetServerInfoResponse:
        response: model_pb2.GetServerInfoResponse = await running.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        return response

    info = with_server(work, branch="mixed", model_name="discs", limits={"max_boxes": 77})
    assert (info.model.ref.name, info.model.ref.branch) == ("discs", types_pb2.BRANCH_MIXED)
    assert (info.model.arch, info.model.crop_size) == ("bright/1", 16)
    assert info.model.mask_thresholds.large == 0.5
    assert not info.model.score_calibrated
    assert list(info.model.branches) == [types_pb2.BRANCH_STUDENT, types_pb2.BRANCH_TEACHER, types_pb2.BRANCH_MIXED]
    assert [(c.category_id, c.name) for c in info.model.categories] == [(7, "disc"), (2, "")]
    assert (info.limits.max_boxes, info.limits.max_request_bytes) == (77, 32 * 1024 * 1024)
    assert (list(info.devices), info.precision, info.model.network_engine) == (["cpu"], "float32", "torch")
    assert info.version


@pytest.mark.parametrize("is_long", [False, True])
def test_a_response_of_many_numbers_is_written_outside_the_event_loop(
    is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[str] = []
    inner: dict[str, Any] = {"write_response": write_response, "write_item": write_item}

    def recorded(name: str) -> Any:
        def write(*args: Any) -> Any:
            writers.append(threading.current_thread().name)
            return inner[name](*args)

        return write

    for name in inner:
        monkeypatch.setattr(f"mal_server.api.serialization.labeling_messages.{name}", recorded(name))
    polygons = types_pb2.MASK_FORMAT_POLYGONS
    request = label_request(DISC_BOX, formats=[polygons])
    (expected,) = with_server(lambda running: label(running, request))
    writers.clear()
    if is_long:
        numbers = sum(len(ring.points) for ring in expected.masks[0].polygons.rings)
        monkeypatch.setattr("mal_server.api.service.MAX_NUMBERS_IN_LOOP", numbers)

    async def work(running: Running) -> Any:
        (result,) = await label(running, request)
        return result, (await bulk(running, request))["item 0"]

    streamed, item = with_server(work)
    assert streamed == item.response.results[0] == expected
    assert len(writers) == 2
    assert all(name.startswith("cpu") == is_long for name in writers)
