"""Responses that are joined from encoded parts are what protobuf would encode."""

import numpy as np
import pytest
from google.rpc import status_pb2
from mal.v1 import labeling_pb2, types_pb2

from mal_server.api.serialization import wire
from mal_server.api.serialization.labeling_messages import size_of, write_item, write_item_error, write_response
from mal_server.inference.requests import InstanceResult, PartialResult, Timing
from mal_train.core.errors import BadBox
from mal_train.core.masks.encodings import EncodedMask, Polygons, Runs, encode
from mal_train.core.masks.rle import area, encode_mask
from mal_train.core.settings import MaskFormat
from mal_train.kernel.labeler.types import Label
from tests.mal_server.calls import decoded

SIDE = 301
MODEL = types_pb2.ModelRef(name="discs", checkpoint_sha256="0" * 64, branch=types_pb2.BRANCH_STUDENT)


NOISE = encode_mask(np.random.default_rng(0).random((SIDE, SIDE)) < 0.5)


def noisy_result() -> PartialResult:
    """Returns results whose masks have thousands of rings and runs, and one error."""
    label = Label(NOISE, 0.5, area(NOISE), (0.0, 0.0, float(SIDE), float(SIDE)), None, ())
    results = [InstanceResult(number, label, encode(NOISE, MaskFormat)) for number in range(3)]
    return PartialResult((*results, InstanceResult(-1, BadBox("no area"))), Timing(0.25, batch_size=3))


@pytest.mark.parametrize("at_once", [1000, wire.NUMBERS_AT_ONCE])
def test_an_encoded_response_has_every_result(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "NUMBERS_AT_ONCE", at_once)
    result = noisy_result()
    response = labeling_pb2.LabelImageResponse.FromString(write_response(result, MODEL))
    assert [one.instance_id for one in response.results] == [0, 1, 2, -1]
    assert [len(one.masks) for one in response.results] == [len(MaskFormat)] * 3 + [0]
    for one in response.results[:3]:
        assert [decoded(mask) for mask in one.masks] == [NOISE] * len(MaskFormat)
        assert (one.score, one.mask_box.width, one.area_px) == (0.5, SIDE, area(NOISE))
    assert response.results[3].status.code != 0
    assert (response.model, response.timing.batch_size) == (MODEL, 3)
    item = labeling_pb2.LabelImagesResponse.FromString(write_item("é", result, MODEL))
    assert (item.item_id, item.response) == ("é", response)


def test_an_encoded_error_has_the_id_of_its_item() -> None:
    status = status_pb2.Status(code=3, message="no")
    response = labeling_pb2.LabelImagesResponse.FromString(write_item_error("é" * 200, status))
    assert (response.item_id, response.status) == ("é" * 128, status)


def test_no_call_of_protobuf_gets_more_than_a_part_of_a_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call holds the interpreter, and with it the event loop: for half a second with all numbers of this response."""
    largest = 0

    class Field:
        def extend(self, values: list[int], /) -> None:
            nonlocal largest
            largest = max(largest, len(values))

    wire.extend(Field(), np.zeros(1_000_000, np.int32))
    assert 0 < largest <= wire.NUMBERS_AT_ONCE


def test_the_size_of_a_response_counts_what_takes_time_to_write() -> None:
    result = noisy_result()
    masks: list[EncodedMask] = list(result.results[0].masks)
    numbers = sum(mask.rings.points.size for mask in masks if isinstance(mask, Polygons))
    numbers += sum(len(mask.counts) for mask in masks if isinstance(mask, Runs))
    assert size_of(result) > 3 * numbers
