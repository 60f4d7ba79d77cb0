"""Malformed requests to the client's web applications, and malformed answers to the client, by the thousand.

Each gives a result or one clear error; no handler fails, and memory stays bounded.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, CookieJar
from google.protobuf.message import DecodeError
from mal.v1 import labeling_pb2
from mal_client.client import AsyncClient, Client
from mal_client.integrations.cvat.job import fetch_plan, label_task
from mal_client.integrations.label_studio.app import build_app
from mal_client.integrations.label_studio.predictor import Predictor
from mal_client.playground.app import build_app as build_page
from mal_client.playground.security import Guard
from mal_client.transport.serialization.labeling_messages import box_labels
from mal_client.types import LabelOptions
from mal_client.web_server import bound

from mal_train.core.errors import MalError
from tests.chaos.test_hostile import corpus, mutant
from tests.form import Form
from tests.mal_client.fake_server import FakeServer, serving
from tests.mal_client.integrations.cvat.cvat_task import LABELS, TaskInMemory
from tests.mal_client.integrations.cvat.test_job import sample_task
from tests.mal_client.integrations.label_studio.test_backend import FakeImages, annotated, task
from tests.mal_client.integrations.label_studio.test_regions import CONFIG, region
from tests.mal_client.playground.playground_page import KEY, send_image
from tests.mal_client.test_hostile_server import HEIGHT, WIDTH, answer, result
from tests.mal_server.fakes import DISC_PNG

Record = Callable[..., None]
Send = Callable[[random.Random], Awaitable[int]]

SHORT, FULL = 250, 20_000
MAX_GROWTH_MIB = 384
MAX_CPU_S = 20.0
"""CPU time of one case; the slowest takes a hundredth of it."""

REFUSALS = {400, 403, 404, 405, 408, 413, 415, 417, 502, 503}

ATOMS: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, 1e308, -1e308, float("nan"), float("inf"), 10**400, -(2**63), 2**64),
    *("", "x", "x" * 5000, "\ud800", "\x1b[2J\n", "\0", "../../etc/passwd", "rectanglelabels", "file:///etc/passwd"),
    *([], {}, [[]], [None] * 50, {"": {}}, {"id": {}}, [0, 0, 1, 1]),
]
HEADERS = [
    {"Host": "attacker.example"},
    {"Host": ""},
    {"Origin": "http://attacker.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/json; charset=nothing"},
    {"Content-Encoding": "gzip"},
    {"Cookie": "mal_playground=" + "x" * 5000},
    {"Authorization": "Basic " + "A" * 999},
    {"X-Long": "y" * 8000},
]


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def mutated(chance: random.Random, value: Any) -> Any:
    """Returns JSON with one to three values replaced, removed, repeated or nested deeply."""
    for _ in range(chance.randint(1, 3)):
        value = _changed(chance, json.loads(json.dumps(value)))
    return value


def _changed(chance: random.Random, value: Any) -> Any:
    if chance.random() < 0.15 or not isinstance(value, dict | list) or not value:
        atom = chance.choice(ATOMS)
        return [atom] * chance.choice((1, 1, 1, 300)) if chance.random() < 0.1 else atom
    key: Any = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    action = chance.randrange(8)
    if action == 0:
        del value[key]
    elif action == 1 and isinstance(value, list):
        value.append(value[key])
    elif action == 2 and isinstance(value, dict):
        value[chance.choice(("", "id", "error", "x" * 500))] = value[key]
    else:
        value[key] = _changed(chance, value[key])
    return value


def body_of(chance: random.Random, valid: Any) -> bytes:
    """Returns a mutated request, as JSON or as bytes that may be none."""
    action = chance.randrange(12)
    if action == 0:
        return b"[" * 100_000
    if action == 1:
        return mutant(chance, [json.dumps(valid).encode(), b"{}", b"\xff\xfe"])
    text = json.dumps(mutated(chance, valid))
    return (text if action > 2 else text.replace("NaN", "9" * 5000)).encode()


async def send_all(send: Send, count: int, seed: int) -> tuple[Counter[int], float, float]:
    """Sends the requests one after another; returns the statuses, the largest CPU time and the growth of memory."""
    chance, statuses, slowest, before = random.Random(seed), Counter[int](), 0.0, rss_mib()
    for _ in range(count):
        began = time.process_time()
        statuses[await send(chance)] += 1
        slowest = max(slowest, time.process_time() - began)
    return statuses, slowest, rss_mib() - before


def check(statuses: Counter[int], slowest_s: float, growth_mib: float, caplog: pytest.LogCaptureFixture) -> None:
    assert set(statuses) <= {200, *REFUSALS}
    assert statuses[200] > 0
    assert slowest_s <= MAX_CPU_S
    assert growth_mib <= MAX_GROWTH_MIB
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


PAGE_REQUEST = {
    "boxes": [{"id": "b0", "box": [1, 2, 30, 20], "threshold": 0.5}, {"id": "b1", "box": [0, 0, 5, 5]}],
    "options": {"branch": None, "threshold": 0.4, "flip": False, "agreement": False},
}
PAGE_FILE = {
    "images": [{"file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
    "annotations": [
        {
            "image": 0,
            "box": [1, 2, 3, 4],
            "category": "cup",
            "threshold": 0.5,
            "result": {"id": "b0", "rle": {"size": [HEIGHT, WIDTH], "counts": "`U1"}, "score": 0.5, "flags": []},
        }
    ],
    "options": {"threshold": 0.4},
}


@pytest.mark.promise(
    "requests", "The playground answers thousands of malformed requests with a result or one clear error"
)
def test_no_playground_request_causes_a_server_error(
    form: Form, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    images = [data for data in corpus() if data]

    async def run(address: str) -> tuple[Counter[int], float, float]:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(AsyncClient(address, timeout_s=60))
            url = await stack.enter_async_context(bound(build_page(client, Guard(key=KEY)), "127.0.0.1", 0))
            page: Any = await stack.enter_async_context(ClientSession(url, cookie_jar=CookieJar(unsafe=True)))
            async with page.get("/", params={"key": KEY}) as response:
                assert response.status == 200
            sha256 = await send_image(page, DISC_PNG)

            async def send(chance: random.Random) -> int:
                kind = chance.randrange(10)
                headers = chance.choice(HEADERS) if chance.random() < 0.15 else {}
                path, method, data = f"/api/images/{sha256}/labels", "POST", body_of(chance, PAGE_REQUEST)
                if kind < 3:
                    path, data = "/api/coco", body_of(chance, PAGE_FILE)
                elif kind < 5:
                    path, data = "/api/images", mutant(chance, images)
                elif kind < 6:
                    method = chance.choice(("GET", "PUT", "HEAD", "OPTIONS", "BREW"))
                    path = chance.choice(
                        ("/", "/?key=%ff", f"/?key={KEY}", "/api/server", "/..%2f..%2fetc", "/main.js")
                    )
                try:
                    async with page.request(method, path, data=BytesIO(data), headers=headers) as response:
                        await response.read()
                        return int(response.status)
                except ClientError:
                    # The server refuses to parse the request, and closes the connection.
                    return 400

            outcome = await send_all(send, form.pick(SHORT, FULL), form.seed)
            await send_image(page, DISC_PNG)
            return outcome

    with serving(FakeServer()) as address:
        statuses, slowest, growth = asyncio.run(run(address))
    record("hostile playground", growth_mib=growth, slowest_ms=slowest * 1000, statuses=dict(statuses))
    check(statuses, slowest, growth, caplog)


LS_REQUEST = {
    "tasks": [
        task(1, annotations=[annotated(region(), region(id="b"))]),
        task(2, predictions=[annotated(region())]),
        task(3, photo="/missing.png", annotations=[annotated(region())]),
    ],
    "project": "1.1764098131",
    "label_config": CONFIG,
    "params": {"login": None, "context": None},
}
LS_SETUP = {"project": "1.1764098131", "schema": CONFIG, "hostname": "http://localhost:8080", "access_token": "x"}


@pytest.mark.promise(
    "requests", "The Label Studio backend answers thousands of malformed requests with a result or one clear error"
)
def test_no_label_studio_request_causes_a_server_error(
    form: Form, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)

    async def run(client: Client) -> tuple[Counter[int], float, float]:
        predictor = Predictor(client, FakeImages(), LabelOptions(), tolerance_px=1.0)
        async with bound(build_app(predictor), "127.0.0.1", 0) as url, ClientSession(url) as backend:

            async def send(chance: random.Random) -> int:
                kind = chance.randrange(10)
                headers = {"Content-Type": "application/json"}
                headers |= chance.choice(HEADERS) if chance.random() < 0.15 else {}
                path, method, data = "/predict", "POST", body_of(chance, LS_REQUEST)
                if kind < 2:
                    path, data = "/setup", body_of(chance, LS_SETUP)
                elif kind < 3:
                    method = chance.choice(("GET", "PUT", "POST", "BREW"))
                    path = chance.choice(("/", "/health", "/versions", "/webhook", "/train", "/..%2f", "/delete"))
                try:
                    async with backend.request(method, path, data=BytesIO(data), headers=headers) as response:
                        await response.read()
                        return int(response.status)
                except ClientError:
                    return 400

            return await send_all(send, form.pick(SHORT, FULL), form.seed)

    with serving(FakeServer()) as address, Client(address, timeout_s=60) as client:
        statuses, slowest, growth = asyncio.run(run(client))
    record("hostile Label Studio", growth_mib=growth, slowest_ms=slowest * 1000, statuses=dict(statuses))
    check(statuses, slowest, growth, caplog)


class HostileTask(TaskInMemory):
    """A task with mutated annotations, labels and frames."""

    def __init__(self, chance: random.Random, images: list[bytes]) -> None:
        super().__init__([])
        self._chance, self._images = chance, images
        self.content = mutated(chance, json.loads(json.dumps(sample_task().annotations())))
        self._labels = mutated(chance, LABELS) if chance.random() < 0.3 else LABELS

    def annotations(self) -> Any:
        """Returns any JSON."""
        return self.content

    def labels(self) -> Any:
        """Returns any list."""
        return self._labels if isinstance(self._labels, list) else [self._labels]

    def create(self, shapes: Sequence[Any]) -> None:
        """Accepts everything."""

    def frame(self, number: int) -> bytes:
        """Returns any bytes."""
        return mutant(self._chance, self._images) if self._chance.random() < 0.5 else super().frame(number)


@pytest.mark.promise("requests", "Any answer of a CVAT server gives a result or one clear error")
def test_every_cvat_answer_gives_a_plan_or_one_error(form: Form, record: Record, tmp_path: Path) -> None:
    chance, outcomes, before = random.Random(form.seed), Counter[str](), rss_mib()
    images, slowest = [data for data in corpus() if data], 0.0
    with serving(FakeServer()) as address, Client(address, timeout_s=60) as client:
        for number in range(form.pick(SHORT, FULL)):
            cvat = HostileTask(chance, images)
            began = time.process_time()
            try:
                if number % 10:
                    fetch_plan(cvat, cvat.annotations(), None, 1)
                else:
                    label_task(cvat, client, tmp_path / f"{number}.ledger", LabelOptions())
                outcomes["done"] += 1
            except MalError as error:
                outcomes[type(error).__name__] += 1
            slowest = max(slowest, time.process_time() - began)
    growth = rss_mib() - before
    record("hostile CVAT", growth_mib=growth, slowest_ms=slowest * 1000, **outcomes)
    assert outcomes["done"] > 0
    assert sum(outcomes.values()) == form.pick(SHORT, FULL)
    assert slowest <= MAX_CPU_S
    assert growth <= MAX_GROWTH_MIB


def answers(chance: random.Random) -> Iterator[labeling_pb2.LabelImageResponse]:
    """Yields mutated messages that are still messages."""
    valid = answer(result(), result(instance_id=1, agreement=0.5)).SerializeToString()
    while True:
        message = labeling_pb2.LabelImageResponse()
        try:
            message.ParseFromString(mutant(chance, [valid]))
        except DecodeError:
            continue
        yield message


@pytest.mark.promise("requests", "Any answer of a labeling server gives checked masks or the error of a box")
def test_every_answer_of_a_labeling_server_gives_labels_or_one_error(form: Form, record: Record) -> None:
    chance, outcomes, before = random.Random(form.seed), Counter[str](), rss_mib()
    boxes = {0: (1.0, 2.0, 3.0, 4.0), 1: (1.0, 2.0, 3.0, 4.0)}
    messages, slowest = answers(chance), 0.0
    for _ in range(form.pick(8 * SHORT, FULL)):
        message, began = next(messages), time.process_time()
        try:
            for _, label in box_labels(message, boxes, lambda: (WIDTH, HEIGHT)):
                outcomes["label" if label.ok else label.error.reason if label.error else ""] += 1
                if label.ok:
                    assert label.mask.shape == (HEIGHT, WIDTH)
                    assert 0 <= (label.score or 0.0) <= 1.001
                    assert 0 <= (label.agreement or 0.0) <= 1.001
                    assert 0 <= (label.area or 0) <= HEIGHT * WIDTH
        except KeyError:
            outcomes["unknown box"] += 1
        slowest = max(slowest, time.process_time() - began)
    growth = rss_mib() - before
    record("hostile labeling server", growth_mib=growth, slowest_ms=slowest * 1000, **outcomes)
    assert outcomes["label"] > 0
    assert slowest <= MAX_CPU_S
    assert growth <= MAX_GROWTH_MIB
