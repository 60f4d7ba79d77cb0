"""Fields are counted before a message is parsed, and before any loop over them."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mal.v1 import evaluation_pb2, labeling_pb2, model_pb2, types_pb2

from mal_server.api.serialization.bounded_parse import (
    MAX_ITEM_FIELDS,
    MAX_STRING_BYTES,
    bounded,
    check_fields,
    item_id_of,
    max_fields,
)
from mal_server.api.serialization.evaluation_messages import read_evaluate_options
from mal_server.api.serialization.labeling_messages import (
    MAX_ITEM_ID_BYTES,
    CallDefaults,
    Violations,
    read_output_options,
)
from mal_server.config.limits import MAX_CATEGORIES
from mal_server.errors import InvalidRequest
from mal_server.inference.allowed_dirs import suggest
from mal_server.scheduling.priority import Priority
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Branch
from tests.mal_server.calls import collect, fields_of, refusal, with_server
from tests.mal_server.evaluation.test_run import message_of, truth_of
from tests.mal_server.fakes import DISC_BOX, Running, label_request
from tests.mal_server.random_requests import REQUESTS

MAX_BOXES = 1000
MILLION = 1_000_000


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, content: bytes) -> bytes:
    """Returns an encoded field of length-delimited content."""
    return varint(number << 3 | 2) + varint(len(content)) + content


class Unparsed:
    """A message class that is never parsed."""

    def __init__(self, message_class: Any) -> None:
        self.DESCRIPTOR = message_class.DESCRIPTOR

    def parse(self, data: bytes) -> NoReturn:
        raise AssertionError(f"{len(data)} bytes were parsed")


HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "boxes": (labeling_pb2.LabelImageRequest, b"\x12\x00" * MILLION, "instances"),
    "boxes of an item": (labeling_pb2.LabelImagesRequest, field(2, b"\x12\x00" * MILLION), "request.instances"),
    "one option, repeated": (labeling_pb2.LabelImageRequest, b"\x1a\x00" * MILLION, "options"),
    "packed formats": (labeling_pb2.LabelImageRequest, field(3, field(6, b"\x63" * MILLION)), "options.formats"),
    "plain formats": (labeling_pb2.LabelImageRequest, field(3, b"\x30\x63" * MILLION), "options.formats"),
    "objects": (evaluation_pb2.EvaluateRequest, field(2, b"\x1a\x00" * MILLION), "image.ground_truth"),
    "masks of one object": (
        evaluation_pb2.EvaluateRequest,
        field(2, field(3, b"\x1a\x00" * MILLION)),
        "image.ground_truth.mask",
    ),
    "objects with repeated masks": (
        evaluation_pb2.EvaluateRequest,
        field(2, field(3, b"\x1a\x00" * 500) * 4000),
        "image.ground_truth",
    ),
    "categories": (evaluation_pb2.EvaluateRequest, field(1, field(2, b"\x08\x01") * MILLION), "options.categories"),
    "unknown fields": (labeling_pb2.LabelImageRequest, b"\x78\x00" * MILLION, ""),
    "unknown groups": (labeling_pb2.LabelImageRequest, b"\x7b\x7c" * MILLION, ""),
    "a long name": (labeling_pb2.LabelImageRequest, field(3, field(10, b"a" * MILLION)), "options.model"),
    "a long path": (model_pb2.LoadModelRequest, field(3, b"a" * MILLION), "path"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_message_of_millions_of_fields_is_refused_before_it_is_parsed(name: str) -> None:
    message_class, data, path = HOSTILE[name]
    with pytest.raises(InvalidRequest) as raised:
        bounded(Unparsed(message_class).parse, max_fields(MAX_BOXES))(data)
    assert [field for field, _ in raised.value.violations] == [path]


def test_the_largest_valid_requests_are_parsed() -> None:
    boxes = label_request(*[DISC_BOX] * MAX_BOXES, content=b"x" * MILLION)
    truths = [truth_of(index, DISC_BOX, 1, Rle(4000, 4000, b"x" * 2000)) for index in range(MAX_BOXES)]
    objects = message_of("a", b"x" * MILLION, truths)
    named = [types_pb2.Category(category_id=index, name="n" * 40) for index in range(MAX_CATEGORIES)]
    options = evaluation_pb2.EvaluateRequest(options=evaluation_pb2.EvaluateOptions(categories=named))
    for message in (boxes, objects, options):
        parse = bounded(type(message).FromString, max_fields(MAX_BOXES))
        assert parse(message.SerializeToString()) == message


@given(st.one_of(REQUESTS.map(lambda request: request.SerializeToString()), st.binary(max_size=300)))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_counting_leaves_small_and_malformed_messages_to_the_parser(data: bytes) -> None:
    for message_class in (labeling_pb2.LabelImageRequest, evaluation_pb2.EvaluateRequest):
        check_fields(data, message_class.DESCRIPTOR, max_fields(MAX_BOXES))


def test_a_varint_without_end_is_left_to_the_parser() -> None:
    check_fields(b"\x78" + b"\xff" * MILLION, labeling_pb2.LabelImageRequest.DESCRIPTOR, max_fields(MAX_BOXES))


@pytest.mark.parametrize(
    ("method", "data", "path"),
    [
        ("LabelingService/LabelImage", HOSTILE["boxes"][1], "instances"),
        ("EvaluationService/Evaluate", HOSTILE["objects"][1], "image.ground_truth"),
        ("ModelService/LoadModel", field(1, b"a" * MILLION), "name"),
    ],
)
def test_a_call_with_millions_of_fields_is_refused_and_names_the_field(method: str, data: bytes, path: str) -> None:
    code, status, _ = refusal(lambda running: collect(running.channel.stream_stream(f"/mal.v1.{method}")([data])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields_of(status) == [path]


ITEM = labeling_pb2.LabelImagesRequest(item_id="é 1").SerializeToString()
REFUSED = HOSTILE["boxes of an item"][1]


def test_a_refused_item_fails_alone_and_the_stream_continues() -> None:
    request = label_request(DISC_BOX)
    good = labeling_pb2.LabelImagesRequest(item_id="good", request=request)
    long = labeling_pb2.LabelImagesRequest(item_id="a" * (MAX_STRING_BYTES + 1), request=request)
    long.request.image.content = bytes(MILLION)
    sent = [ITEM + REFUSED, long.SerializeToString(), good.SerializeToString()]

    async def work(running: Running) -> list[bytes]:
        call: Any = running.channel.stream_stream("/mal.v1.LabelingService/LabelImages")
        return await collect(call(sent))

    responses = {one.item_id: one for one in map(labeling_pb2.LabelImagesResponse.FromString, with_server(work))}
    assert set(responses) == {"é 1", "a" * MAX_ITEM_ID_BYTES, "good"}
    assert fields_of(responses["é 1"].status) == ["request.instances"]
    assert fields_of(responses["a" * MAX_ITEM_ID_BYTES].status) == ["item_id"]
    assert len(responses["good"].response.results) == 1


@pytest.mark.parametrize(
    ("data", "item_id"),
    [
        (b"", ""),
        (ITEM + field(2, b""), "é 1"),
        (field(2, b"") + ITEM + b"\x78\x00", "é 1"),
        (field(1, b"first") + field(1, b"last"), "last"),
        (field(1, "é".encode() * MILLION), "é" * (MAX_STRING_BYTES // 2)),
        (field(1, b"\xff"), None),
        (ITEM + b"\x12\x05a", None),
        (ITEM + b"\x12", None),
        (b"\x78\x00" * (MAX_ITEM_FIELDS - 1) + ITEM, "é 1"),
        (b"\x78\x00" * MAX_ITEM_FIELDS + ITEM, None),
        (ITEM + b"\x78\x00" * MILLION, None),
    ],
)
def test_the_id_of_a_refused_item_is_read_from_a_few_fields(data: bytes, item_id: str | None) -> None:
    assert item_id_of(data, labeling_pb2.LabelImagesRequest.DESCRIPTOR) == item_id
    assert item_id_of(data, evaluation_pb2.EvaluateRequest.DESCRIPTOR) is None


def test_a_name_longer_than_any_is_not_compared_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def close(name: str, known: Sequence[str], **options: Any) -> list[str]:
        compared.append((len(name), len(known)))
        return []

    monkeypatch.setattr("mal_server.inference.allowed_dirs.difflib.get_close_matches", close)
    suggest("a" * MAX_STRING_BYTES, ["cats"])
    assert compared == []
    assert suggest("cat", [f"cats{index}" for index in range(1000)]).endswith(" and 968 more")
    assert compared == [(3, 32)]


def test_an_unknown_model_of_a_long_name_is_shown_truncated() -> None:
    request = label_request(DISC_BOX, model="a" * MAX_STRING_BYTES)
    code, status, _ = refusal(lambda running: collect(running.labeling.LabelImage(request)))
    assert code is grpc.StatusCode.NOT_FOUND
    assert len(status.message) < 300


class Unread(Sequence[int]):
    """Elements that nobody may look at."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError(f"element {index} was read")


def test_formats_are_counted_before_they_are_read() -> None:
    options: Any = SimpleNamespace(
        formats=Unread(5), HasField=lambda name: False, polygon_tolerance_px=0.0, min_component_area_px=0,
        resolve_overlaps=False,
    )  # fmt: skip
    violations = Violations()
    read_output_options(options, violations, "options")
    with pytest.raises(InvalidRequest) as raised:
        violations.raise_if_any()
    assert [field for field, _ in raised.value.violations] == ["options.formats"]


def test_more_categories_than_a_report_may_have_are_refused() -> None:
    categories = [types_pb2.Category(category_id=index) for index in range(MAX_CATEGORIES + 1)]
    request = evaluation_pb2.EvaluateRequest(options=evaluation_pb2.EvaluateOptions(categories=categories))
    with pytest.raises(InvalidRequest) as raised:
        read_evaluate_options(request, CallDefaults(Branch.STUDENT, Priority.BATCH, math.inf))
    assert [field for field, _ in raised.value.violations] == ["options.categories"]
