"""Claims about a server whose process is killed in the middle of a response and started again."""

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
BOXES = [(float(x), 2.0, 8.0, 8.0) for x in range(12)]

SERVER = """
import json, sys, threading
from tests.mal_client.fake_server import FakeServer, Faults, serving

class PrintingServer(FakeServer):
    def _results(self, request):
        print(json.dumps([instance.instance_id for instance in request.instances]), flush=True)
        return super()._results(request)

with serving(PrintingServer(Faults(**json.loads(sys.argv[1]))), int(sys.argv[2])) as address:
    print(json.dumps(address), flush=True)
    threading.Event().wait()
"""


class ServerProcess:
    """Fake server in its own process, which prints the instance ids of each request."""

    def __init__(self, faults: dict[str, float], port: int = 0) -> None:
        self._running = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(faults), str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self._running.stdout is not None
        self.address: str = json.loads(self._running.stdout.readline())
        self.port = int(self.address.rpartition(":")[2])

    def kill(self) -> list[list[int]]:
        """Kills the process; returns the instance ids of each request that it received."""
        self._running.kill()
        printed, _ = self._running.communicate(timeout=120)
        return [json.loads(line) for line in printed.splitlines()]


@contextmanager
def killed_after(first_result: threading.Event, **faults: float) -> Iterator[tuple[str, list[list[int]]]]:
    """Runs a server that is killed once the first result has arrived, and another one in its place.

    Yields the address and the requests of the second one, which are complete at the end. The first must not end before.
    """
    first = ServerProcess(faults)
    resent: list[list[int]] = []
    second: list[ServerProcess] = []

    def replace() -> None:
        if first_result.wait(120):
            first.kill()
            second.append(ServerProcess({}, first.port))

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        yield first.address, resent
    finally:
        first_result.set()
        thread.join(60)
        resent += second[0].kill()


def has_one_label_each(labels: list[BoxLabel]) -> bool:
    return sorted(label.index for label in labels) == list(range(len(BOXES))) and all(label.ok for label in labels)


def test_the_blocking_client_sends_the_pending_boxes_to_the_next_server() -> None:
    arrived = threading.Event()
    labels: list[BoxLabel] = []
    with (
        killed_after(arrived, batch=3, hold_after=1) as (address, resent),
        Client(address, timeout_s=60) as client,
    ):
        for label in client.stream_image(PIXELS, BOXES):
            labels.append(label)
            arrived.set()
    assert has_one_label_each(labels)
    assert resent
    assert set(resent[0]) < set(range(12)), "labeled boxes are not sent again"


def test_the_asyncio_client_sends_the_pending_boxes_to_the_next_server() -> None:
    arrived = threading.Event()
    labels: list[BoxLabel] = []

    async def send(address: str) -> None:
        async with AsyncClient(address, timeout_s=60) as client:
            async for label in client.stream_image(PIXELS, BOXES):
                labels.append(label)
                arrived.set()

    with killed_after(arrived, batch=3, hold_after=1) as (address, resent):
        asyncio.run(send(address))
    assert has_one_label_each(labels)
    assert set(resent[0]) < set(range(12))


def test_a_bulk_job_sends_the_pending_items_to_the_next_server(tmp_path: Path) -> None:
    arrived = threading.Event()
    dataset = make_dataset(tmp_path, images=10, boxes=1)
    with killed_after(arrived, hold_after=1) as (address, resent), Client(address, timeout_s=60) as client:
        result: DatasetResult = client.label_dataset(
            dataset.json_path, dataset.images_dir, dataset.output, on_progress=lambda _: arrived.set()
        )
    assert (result.labeled, result.failed) == (10, ())
    again = [key for keys in resent for key in keys]
    assert len(again) == len(set(again)) < 10
