"""Claims about answers that the protocol does not allow: they fail their box or the call, and cost little."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from mal.v1 import evaluation_pb2, labeling_pb2, types_pb2
from mal_client.bulk.stream import BulkStream, ItemResult
from mal_client.bulk.work_queue import WorkItem, WorkQueue
from mal_client.cli.common import EXIT_SOME_FAILED
from mal_client.cli.main import main
from mal_client.client import Client
from mal_client.errors import MAX_RETRY_AFTER_S, MAX_TEXT_CHARS, ServerError, ServerUnavailable, item_error, rpc_details
from mal_client.evaluation.stream import RetryBudget
from mal_client.images.image_input import EncodedImage
from mal_client.transport.image_call import RETRY_PAUSES_S, ImageCall, Prompts
from mal_client.transport.serialization.labeling_messages import box_labels
from mal_client.types import SERVER_DEFAULTS, ServerLimits

from mal_train.core.images.decoder import encode_png
from tests.mal_client.datasets import make_dataset, with_masks
from tests.mal_client.fake_server import FakeServer, serving

WIDTH, HEIGHT = 40, 30
BOX = (1.0, 2.0, 10.0, 8.0)
PNG = encode_png(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
LIMITS = ServerLimits(
    max_request_bytes=1 << 26,
    max_response_bytes=1 << 26,
    max_boxes=100,
    max_pixels=1 << 26,
    max_side=1 << 14,
    max_image_bytes=1 << 25,
    max_items_in_flight=4,
    image_cache_bytes=0,
)
IDLE_S = 60.0


def code(height: int = HEIGHT, width: int = WIDTH, counts: bytes | None = None) -> types_pb2.CocoRle:
    return types_pb2.CocoRle(height=height, width=width, counts=b"`U1" if counts is None else counts)


def result(**change: Any) -> types_pb2.InstanceResult:
    fields: dict[str, Any] = {
        "instance_id": 0,
        "masks": [types_pb2.Mask(coco_rle=change.pop("rle", code()))],
        "score": 0.5,
        "area_px": 0,
    }
    return types_pb2.InstanceResult(**fields | change)


def answer(*results: types_pb2.InstanceResult) -> labeling_pb2.LabelImageResponse:
    return labeling_pb2.LabelImageResponse(results=results)


def retry(seconds: int, message: str = "later") -> status_pb2.Status:
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message=message)
    info = error_details_pb2.RetryInfo()
    info.retry_delay.seconds = seconds
    status.details.add().Pack(info)
    return status


def test_a_good_result_is_a_label() -> None:
    ((_, label),) = box_labels(answer(result()), {0: BOX}, lambda: (WIDTH, HEIGHT))
    assert label.error is None
    assert label.mask.shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "change",
    [
        {"rle": code(HEIGHT + 1)},
        {"rle": code(1 << 20, 1 << 20)},
        {"rle": code(0, 0)},
        {"rle": code(-1, WIDTH)},
        {"rle": code(counts=b"")},
        {"rle": code(counts=b"`2")},
        {"rle": code(counts=b"\xff" * 10)},
        {"rle": code(counts=b"o" * 10_000)},
        {"score": math.nan},
        {"score": math.inf},
        {"score": -0.1},
        {"score": 1.1},
        {"agreement": math.nan},
        {"area_px": -1},
        {"area_px": HEIGHT * WIDTH + 1},
        {"mask_box": types_pb2.Box(x=math.nan, y=0, width=1, height=1)},
        {"mask_box": types_pb2.Box(x=0, y=0, width=math.inf, height=1)},
        {"flags": [types_pb2.MASK_FLAG_FULL_BOX] * 10_000},
    ],
    ids=lambda change: str(change)[:40],
)
def test_an_invalid_result_fails_its_box_alone(change: dict[str, Any]) -> None:
    bad, good = box_labels(answer(result(**change), result(instance_id=1)), {0: BOX, 1: BOX}, lambda: (WIDTH, HEIGHT))
    assert bad[1].error is not None
    assert bad[1].error.reason == "INVALID_RESULT"
    assert bad[1].rle is None
    assert good[1].ok


def call(**change: Any) -> ImageCall:
    fields: dict[str, Any] = {
        "image": EncodedImage(PNG),
        "prompts": Prompts([BOX, BOX]),
        "options": SERVER_DEFAULTS,
        "limits": LIMITS,
        "timeout_s": None,
    }
    return ImageCall("host:1", **fields | change)


def test_a_mask_must_have_the_size_in_the_header_of_the_image() -> None:
    one = call()
    one.request()
    (label,) = one.on_response(answer(result(rle=code(HEIGHT, WIDTH * 2, b"`Uf0"))))
    assert label.error is not None
    assert label.error.reason == "INVALID_RESULT"


@pytest.mark.parametrize("number", [2, -1, 1 << 62])
def test_a_result_that_nobody_asked_for_ends_the_call(number: int) -> None:
    one = call()
    one.request()
    with pytest.raises(ServerError):
        one.on_response(answer(result(instance_id=number)))


def test_a_second_result_for_a_box_ends_the_call() -> None:
    one = call()
    one.request()
    one.on_response(answer(result()))
    with pytest.raises(ServerError):
        one.on_response(answer(result()))


@pytest.mark.parametrize("seconds", [10**9, 2**62, -5, int(MAX_RETRY_AFTER_S) + 1])
def test_a_retry_time_of_years_is_no_retry(seconds: int) -> None:
    one = call()
    one.request()
    labels = one.on_response(answer(*(result(instance_id=n, status=retry(seconds)) for n in (0, 1))))
    assert [label.ok for label in labels] == [False, False]
    assert one.done


class Failure(grpc.RpcError):
    """A failed call with trailers."""

    def __init__(self, status: status_pb2.Status | None = None, pushback: str | None = None) -> None:
        self._status, self._pushback = status, pushback

    def code(self) -> grpc.StatusCode:
        """Returns the status."""
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        """Returns the message."""
        return "x" * 10**6

    def trailing_metadata(self) -> Any:
        """Returns the trailers."""
        packed = [] if self._status is None else [("grpc-status-details-bin", self._status.SerializeToString())]
        return (*packed, *([] if self._pushback is None else [("grpc-retry-pushback-ms", self._pushback)]))


@pytest.mark.parametrize("pushback", ["9" * 400, "9" * 5000, "1e9", "-1", "", "99999999999"])
def test_a_pushback_of_any_text_is_read_or_ignored(pushback: str) -> None:
    assert rpc_details(Failure(pushback=pushback)).retry_after_s is None


def test_a_failed_call_with_a_retry_time_of_years_ends_at_once() -> None:
    one = call()
    one.request()
    one.on_response(answer(result()))
    pauses = [one.on_error(Failure(retry(10**9))) for _ in RETRY_PAUSES_S]
    assert sum(pauses) < 60
    with pytest.raises(ServerUnavailable) as caught:
        one.on_error(Failure(retry(10**9)))
    assert len(str(caught.value)) < 2 * MAX_TEXT_CHARS


def test_texts_of_a_server_are_shortened() -> None:
    status = retry(1, "m" * 10**6)
    info = error_details_pb2.ErrorInfo(reason="r" * 10**6)
    status.details.add().Pack(info)
    bad = error_details_pb2.BadRequest()
    for _ in range(10_000):
        bad.field_violations.add(field="f" * 100, description="d" * 100)
    status.details.add().Pack(bad)
    error = item_error(status)
    assert error is not None
    assert len(str(error)) < 3 * MAX_TEXT_CHARS
    assert len(error.reason) < 2 * MAX_TEXT_CHARS


class Bulk:
    """A bulk stream to one server, with a clock that stands still."""

    def __init__(self) -> None:
        self.now = 0.0
        items = iter([WorkItem("0", {0: BOX}), WorkItem("1", {1: BOX})])
        self.queue = WorkQueue(items, clock=lambda: self.now)
        failures: list[ItemResult] = []
        self.stream = BulkStream(
            address="host:1",
            queue=self.queue,
            load=lambda _: EncodedImage(PNG),
            on_failure=failures.append,
            options=SERVER_DEFAULTS,
            max_items=1,
            idle_timeout_s=IDLE_S,
        )
        self.requests = self.stream.requests()

    def answer(self, *results: types_pb2.InstanceResult, **more: Any) -> ItemResult | None:
        """Takes the next request, and this answer to it."""
        item_id = next(self.requests).item_id
        fields: dict[str, Any] = {"item_id": item_id, "response": answer(*results)}
        return self.stream.on_response(labeling_pb2.LabelImagesResponse(**fields | more))


@pytest.mark.parametrize("seconds", [int(IDLE_S) + 1, 10**9, 2**62])
def test_an_item_with_a_retry_time_of_years_is_final(seconds: int) -> None:
    bulk = Bulk()
    outcome = bulk.answer(status=retry(seconds))
    assert outcome is not None
    assert outcome.error is not None
    outcome = bulk.answer(result(instance_id=1, status=retry(seconds)))
    assert outcome is not None
    assert outcome.labels[1].error is not None
    assert next(bulk.requests, None) is None
    assert bulk.stream.done


def test_a_server_that_sends_a_retry_time_of_years_is_given_up() -> None:
    bulk = Bulk()
    next(bulk.requests)
    with pytest.raises(ServerUnavailable):
        bulk.stream.on_error(Failure(retry(int(IDLE_S) + 1)))


@pytest.mark.parametrize("item_id", ["7", "", "0.0", "x" * 10**6])
def test_a_response_for_an_item_that_nobody_asked_for_ends_the_stream(item_id: str) -> None:
    with pytest.raises(ServerError) as caught:
        Bulk().answer(item_id=item_id)
    assert len(str(caught.value)) < 1000


def test_a_bulk_mask_must_have_the_size_of_the_image() -> None:
    outcome = Bulk().answer(result(rle=code(HEIGHT, WIDTH * 2, b"`Uf0")))
    assert outcome is not None
    assert outcome.labels[0].error is not None
    assert outcome.labels[0].error.reason == "INVALID_RESULT"


def test_a_retry_time_beyond_the_timeout_ends_an_evaluation() -> None:
    budget = RetryBudget(60.0, clock=lambda: 0.0)
    assert budget.spend(59.0, has_progress=True)
    assert not budget.spend(61.0, has_progress=True)


class HostileServer(FakeServer):
    """Answers with escapes for a terminal in every text, and with masks of another size."""

    def _result(self, instance: types_pb2.Instance, image_hw: tuple[int, int]) -> types_pb2.InstanceResult:
        if instance.instance_id % 2:
            status = status_pb2.Status(code=code_pb2.INTERNAL, message="\x1b]0;title\x07\nmal-client: done\x9b2J")
            return types_pb2.InstanceResult(instance_id=instance.instance_id, status=status)
        return result(instance_id=instance.instance_id, rle=code(1 << 20, 1 << 20))


def test_label_prints_no_control_characters_and_lists_every_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path)
    dataset.coco["images"][0]["file_name"] = "\x1b[2J\u202egone.png"
    dataset.save()
    files = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    with serving(HostileServer()) as address:
        assert main(["label", "--server", address, *files, "--output", str(dataset.output)]) == EXIT_SOME_FAILED
        assert main(["check", *files]) == EXIT_SOME_FAILED
        assert main(["review", *files[:1], str(dataset.output), *files[2:]]) == 0
    printed = "".join(capfd.readouterr())
    assert "title" in printed
    assert "gone.png" in printed
    assert [character for character in printed if not character.isprintable() and character not in "\n\t"] == []
    assert "\nmal-client: done" not in printed
    assert all("error" in row for row in dataset.labeled().values())


class HostileEvaluation(FakeServer):
    """Answers an evaluation with a script."""

    def __init__(self, *responses: evaluation_pb2.EvaluateResponse, endless: bool = False) -> None:
        super().__init__()
        self._script = responses
        self._endless = endless
        self.sent = 0

    def Evaluate(self, request_iterator: Any, context: Any) -> Iterator[evaluation_pb2.EvaluateResponse]:
        """Ignores the requests."""
        while True:
            for response in self._script:
                self.sent += 1
                yield response
            if not self._endless:
                return


def progress(**fields: Any) -> evaluation_pb2.EvaluateResponse:
    return evaluation_pb2.EvaluateResponse(progress=evaluation_pb2.EvaluateProgress(**fields))


def worst(**fields: Any) -> evaluation_pb2.EvaluateResponse:
    return evaluation_pb2.EvaluateResponse(
        result=evaluation_pb2.EvaluateResult(worst=[evaluation_pb2.InstanceIou(**fields)])
    )


@pytest.mark.parametrize(
    ("response", "endless"),
    [
        (worst(item_id="0", instance_id=10**6), False),
        (worst(item_id="0", instance_id=-1), False),
        (worst(item_id="nowhere", instance_id=0), False),
        (progress(item_id="nowhere", record=b"r", resume_token=b"t"), True),
        (progress(item_id="0", record=b"r", resume_token=b"t"), True),
        (progress(images_total=2**31 - 1), True),
    ],
    ids=["index", "negative", "image", "progress of no image", "progress without end", "empty without end"],
)
def test_an_evaluation_with_ids_that_were_not_sent_or_without_end_is_one_error(
    tmp_path: Path, response: evaluation_pb2.EvaluateResponse, endless: bool
) -> None:
    dataset = with_masks(make_dataset(tmp_path))
    fake = HostileEvaluation(response, endless=endless)
    with serving(fake) as address, Client(address, timeout_s=60) as client, pytest.raises(ServerError):
        client.evaluate(dataset.json_path, dataset.images_dir)
    # What gRPC buffers between the two ends is not read.
    assert fake.sent < 100_000


@pytest.mark.parametrize(
    "responses",
    [
        [progress(images_total=2**31 - 1)],
        [progress(images_total=2**31 - 1, images_done=7), progress(images_total=2**31 - 1, images_done=6)],
        [progress(images_total=number, images_done=number) for number in (1, 2)],
    ],
    ids=["no image", "fewer images", "growing total"],
)
def test_an_evaluation_on_the_server_without_end_is_one_error(
    responses: list[evaluation_pb2.EvaluateResponse],
) -> None:
    fake = HostileEvaluation(*responses, endless=True)
    with serving(fake) as address, Client(address, timeout_s=60) as client, pytest.raises(ServerError):
        client.evaluate_on_server("sets/truth.json", "sets/images")
    assert fake.sent < 100_000
