"""Claims about a server whose process is killed in the middle of an answer and started again."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from mal_client.client import AsyncClient, Client
from mal_client.types import BoxLabel, DatasetResult

from tests.mal_client.datasets import make_dataset
from tests.paths import ROOT

PIXELS = np.zeros((30, 40, 3), np.uint8)
BOXES = [(float(at), 2.0, 8.0, 8.0) for at in range(12)]

SERVER = """
import json, sys, threading
from tests.mal_client.fake_server import FakeServer, Faults, serving

class Telling(FakeServer):
    def _results(self, request):
        print(json.dumps([one.instance_id for one in request.instances]), flush=True)
        return super()._results(request)

with serving(Telling(Faults(**json.loads(sys.argv[1]))), int(sys.argv[2])) as address:
    print(json.dumps(address), flush=True)
    threading.Event().wait()
"""


class Process:
    """A server of its own; `asked` are the ids of each request that it got."""

    def __init__(self, faults: dict[str, float], port: int = 0) -> None:
        self._running = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(faults), str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self._running.stdout is not None
        self.address: str = json.loads(self._running.stdout.readline())
        self.port = int(self.address.rpartition(":")[2])

    def kill(self) -> list[list[int]]:
        """Ends it as a power cut would; what it was asked."""
        self._running.kill()
        told, _ = self._running.communicate(timeout=120)
        return [json.loads(line) for line in told.splitlines()]


@contextmanager
def killed_after(first_answer: threading.Event, **faults: float) -> Iterator[tuple[str, list[list[int]]]]:
    """A server that is killed once the first answer came, and another one in its place; the first must not end before.

    Gives the address and what the second one was asked, known at the end.
    """
    first = Process(faults)
    asked: list[list[int]] = []
    second: list[Process] = []

    def replace() -> None:
        if first_answer.wait(120):
            first.kill()
            second.append(Process({}, first.port))

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        yield first.address, asked
    finally:
        first_answer.set()
        thread.join(60)
        asked += second[0].kill()


def answered_once(labels: list[BoxLabel]) -> bool:
    return sorted(label.index for label in labels) == list(range(len(BOXES))) and all(label.ok for label in labels)


def test_the_blocking_client_asks_the_next_server_for_what_is_unanswered() -> None:
    came = threading.Event()
    labels: list[BoxLabel] = []
    with (
        killed_after(came, batch=3, hold_after=1) as (address, asked),
        Client(address, timeout_s=60) as client,
    ):
        for label in client.stream_image(PIXELS, BOXES):
            labels.append(label)
            came.set()
    assert answered_once(labels)
    assert asked
    assert set(asked[0]) < set(range(12)), "what was answered before is not asked again"


def test_the_asyncio_client_does_the_same() -> None:
    came = threading.Event()
    labels: list[BoxLabel] = []

    async def ask(address: str) -> None:
        async with AsyncClient(address, timeout_s=60) as client:
            async for label in client.stream_image(PIXELS, BOXES):
                labels.append(label)
                came.set()

    with killed_after(came, batch=3, hold_after=1) as (address, asked):
        asyncio.run(ask(address))
    assert answered_once(labels)
    assert set(asked[0]) < set(range(12))


def test_a_bulk_job_goes_on_with_what_is_unanswered(tmp_path: Path) -> None:
    came = threading.Event()
    dataset = make_dataset(tmp_path, images=10, boxes=1)
    with killed_after(came, hold_after=1) as (address, asked), Client(address, timeout_s=60) as client:
        result: DatasetResult = client.label_dataset(
            dataset.json_path, dataset.images_dir, dataset.output, on_progress=lambda _: came.set()
        )
    assert (result.labeled, result.failed) == (10, ())
    again = [key for keys in asked for key in keys]
    assert len(again) == len(set(again)) < 10
