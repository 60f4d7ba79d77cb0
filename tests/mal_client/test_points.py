"""Points that correct masks, from the client to a server and back."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal.v1 import types_pb2
from mal_client.client import AsyncClient, Client
from mal_client.errors import InvalidRequest
from mal_client.transport.image_call import Prompts
from mal_client.types import BoxLabel, Point
from numpy.typing import NDArray

from mal_server.server import MalServer
from tests.mal_client.fake_server import FakeServer, Limits, serving
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import DISC_BOX, bright_disc
from tests.mal_train.core.images.tiffs import tiff_of

DISC = bright_disc()
NOISE = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
"""An image whose file is large enough to be sent by its hash."""
BOXES = [DISC_BOX, (14.0, 4.0, 32.0, 32.0)]
POINTS = [[Point(20.5, 10.5, is_positive=True), Point(30.5, 20.5, is_positive=False)], []]
POINT: Any = Point
"""Accepts values of other types."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served() as running:
        yield running


def obeys(label: BoxLabel, points: Sequence[Point]) -> bool:
    return all(label.mask[row, column] == point.is_positive for point in points for column, row in [point.pixel])


def label_both_ways(address: str, image: NDArray[np.uint8] | Path) -> list[list[BoxLabel]]:
    async def send() -> list[BoxLabel]:
        async with AsyncClient(address) as client:
            return await client.label_image(image, BOXES, points=POINTS)

    with Client(address) as client:
        return [client.label_image(image, BOXES, points=POINTS), asyncio.run(send())]


def test_masks_obey_the_points_of_their_box_in_both_clients(address: str) -> None:
    with Client(address) as client:
        plain = client.label_image(DISC, BOXES)
    assert not obeys(plain[0], POINTS[0])
    for labels in label_both_ways(address, DISC):
        assert obeys(labels[0], POINTS[0])
        assert labels[1].rle == plain[1].rle


def test_an_image_that_is_read_by_windows_is_corrected_as_completely(tmp_path: Path) -> None:
    path = tmp_path / "disc.tif"
    path.write_bytes(tiff_of(DISC, tile=16))
    with served() as address:
        whole, _ = label_both_ways(address, path)
    with served(limits={"max_pixels": 50 * 38, "max_side": 55}) as address:
        for labels in label_both_ways(address, path):
            assert [label.rle for label in labels] == [label.rle for label in whole]


def test_a_click_sends_the_points_and_not_the_image() -> None:
    servers: list[MalServer] = []
    with served(servers=servers) as address, Client(address) as client:
        client.label_image(NOISE, BOXES)
        for count in range(len(POINTS[0])):
            client.label_image(NOISE, BOXES, points=[POINTS[0][: count + 1], []])
        assert servers[0].registry.get_sample_value("mal_image_cache_hits_total") == len(POINTS[0])


def test_a_point_that_no_mask_can_obey_fails_its_box_alone(address: str) -> None:
    with Client(address) as client:
        bad, good = client.label_image(DISC, BOXES, points=[[Point(1, 1, is_positive=True)], []])
    assert bad.error is not None
    assert (bad.error.code, bad.error.reason) == ("INVALID_ARGUMENT", "BAD_POINT")
    assert good.ok


def test_points_of_boxes_beyond_the_limit_of_a_call_are_sent_with_their_boxes() -> None:
    fake = FakeServer(limits=Limits(max_boxes=2))
    point = Point(3.0, 4.0, is_positive=False)
    with serving(fake) as address, Client(address) as client:
        client.label_image(DISC, [DISC_BOX] * 5, points=[[], [], [], [point], []])
    instances = [instance for request in fake.label_requests for instance in request.instances]
    assert {one.instance_id: list(one.points) for one in instances if one.points} == {
        3: [types_pb2.Point(x=3.0, y=4.0, label=types_pb2.POINT_LABEL_NEGATIVE)]
    }


@pytest.mark.parametrize(
    "points",
    [
        [],
        [[]],
        [[], [], []],
        [[(1, 2, 1)], []],
        7,
        "ab",
        [None, []],
        {0: [], 1: []},
        [{Point(1.0, 1.0, is_positive=True)}, []],
        [[POINT("a", 1, True)], []],
        [[POINT(None, 1, True)], []],
        [[POINT(10**400, 1, True)], []],
        [[POINT(1, 1, None)], []],
    ],
)
def test_points_of_another_form_are_refused_before_sending(points: Any) -> None:
    fake = FakeServer()
    with serving(fake) as address, Client(address) as client, pytest.raises(InvalidRequest) as refused:
        client.label_image(DISC, BOXES, points=points)
    assert refused.value.reason == "BAD_POINTS"
    assert not fake.label_requests


def test_points_of_generators_and_numpy_are_those_of_lists() -> None:
    rows: Any = ((POINT(np.float32(x), np.float32(y), np.bool_(inside)) for x, y, inside in row) for row in POINTS)
    assert Prompts.of(BOXES, rows) == Prompts.of(BOXES, POINTS)


def test_a_server_that_ignores_points_is_not_asked_to_obey_them() -> None:
    fake = FakeServer(limits=Limits(max_points=0))
    with serving(fake) as address, Client(address) as client:
        assert len(client.label_image(DISC, BOXES, points=[[], []])) == len(BOXES)
        fake.label_requests.clear()
        with pytest.raises(InvalidRequest) as refused:
            client.label_image(DISC, BOXES, points=POINTS)
    assert refused.value.reason == "POINTS_UNSUPPORTED"
    assert not fake.label_requests
