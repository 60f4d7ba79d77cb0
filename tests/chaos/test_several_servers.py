"""Server processes behind one name: of three one is killed, one hangs, one drains, and a fourth is added, under load.

The servers have one port on several loopback addresses. The calls find them by gRPC's own resolver, which asks a DNS
server of the test. A dataset job resolves names by the system's resolver, which no test can change without being root;
the test passes it a function in its place.
"""

import asyncio
import itertools
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mal_client.client import AsyncClient, Client
from mal_client.dataset.run import label_dataset
from mal_client.types import SERVER_DEFAULTS, BoxLabel, DatasetResult, Progress

from benchmarks.load.fake_server import expected_masks
from benchmarks.load.images import LoadImage, load_images
from benchmarks.load.run import Server, fake_server
from tests.chaos.test_load import free_port
from tests.form import FORM, Form
from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.name_server import name_server

Record = Callable[..., None]

HOSTS = tuple(f"127.0.0.{last}" for last in range(1, 5))
CONNECTIONS = ("connections.max_age_s=2", "connections.age_grace_s=60")
DRAIN_DELAY_S = 8.0
WORKERS = 4
LIMIT_S = FORM.pick(300.0, 1200.0)


@contextmanager
def fleet(folder: Path, *arguments: str) -> Iterator["Fleet"]:
    """Runs a server on each of HOSTS."""
    with ExitStack() as stack:
        port, metrics_port = free_port(), free_port()
        shared = (f"listen.port={port}", f"metrics.port={metrics_port}", f"drain_delay_s={DRAIN_DELAY_S}", *CONNECTIONS)
        starting = [
            fake_server(folder, *arguments, *shared, f"listen.host={host}", f"metrics.host={host}", name=host)
            for host in HOSTS
        ]
        with ThreadPoolExecutor(len(starting)) as threads:
            servers = list(threads.map(stack.enter_context, starting))
        yield Fleet(dict(zip(HOSTS, servers, strict=True)), port, metrics_port)


@dataclass(frozen=True)
class Fleet:
    """Servers by their address, with the same ports."""

    servers: dict[str, Server]
    port: int
    metrics_port: int

    def count(self, host: str, counter: str) -> int:
        """Returns the value of a counter of a server, over all of its labels that are not in the name."""
        with urllib.request.urlopen(f"http://{host}:{self.metrics_port}/metrics", timeout=30) as response:
            lines: list[str] = response.read().decode().splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(counter))

    def counts(self, hosts: Sequence[str], counter: str) -> list[int]:
        """Returns the values of a counter of several servers."""
        return [self.count(host, counter) for host in hosts]

    def signal(self, host: str, number: int) -> None:
        """Sends a signal to a server."""
        self.servers[host].process.send_signal(number)


MASKS = "mal_masks_total"
CALLS = 'grpc_server_handled_total{code="OK",method="mal.v1.LabelingService/LabelImage"}'


@dataclass
class Load:
    """Calls that go on until `stop`, each with its result checked.

    Attributes:
        outcomes: number of calls by their outcome: "right", "wrong", or an error.
    """

    images: Sequence[LoadImage]
    outcomes: Counter[str] = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event)

    def blocking(self, client: Client) -> None:
        """Calls from one thread."""
        for image in itertools.cycle(self.images):
            if self.stop.is_set():
                return
            try:
                self._note(image, client.label_image(image.content, image.boxes))
            # Any failure is an outcome of the test.
            except Exception as error:
                self.outcomes[repr(error)] += 1

    async def asyncio(self, client: AsyncClient) -> None:
        """Calls from one task."""
        for image in itertools.cycle(self.images):
            if self.stop.is_set():
                return
            try:
                self._note(image, await client.label_image(image.content, image.boxes))
            # As above.
            except Exception as error:
                self.outcomes[repr(error)] += 1

    def _note(self, image: LoadImage, labels: list[BoxLabel]) -> None:
        counts = [label.rle.counts if label.rle is not None else b"" for label in labels]
        self.outcomes["right" if counts == list(image.counts or ()) else "wrong"] += 1

    def wait_for(self, calls: int) -> None:
        """Waits until this many more calls have ended."""
        until_total = self.outcomes.total() + calls
        until(lambda: self.outcomes.total() >= until_total)


def increase(before: Sequence[int], after: Sequence[int]) -> list[int]:
    return [now - then for then, now in zip(before, after, strict=True)]


def largest_deviation(shares: Sequence[int]) -> float:
    """Returns the largest distance of a share from their mean, as a fraction of the mean."""
    mean = sum(shares) / len(shares)
    return max(abs(share - mean) for share in shares) / mean


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextmanager
def calling(load: Load, address: str) -> Iterator[None]:
    """Runs the calls of a blocking and of an asyncio client."""

    async def call() -> None:
        async with AsyncClient(address, timeout_s=120) as client:
            await asyncio.gather(*(load.asyncio(client) for _ in range(WORKERS)))

    with Client(address, timeout_s=120) as client:
        threads = [threading.Thread(target=load.blocking, args=(client,)) for _ in range(WORKERS)]
        threads.append(threading.Thread(target=lambda: asyncio.run(call())))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            load.stop.set()
            for thread in threads:
                thread.join()


def gets_no_calls(servers: Fleet, host: str, load: Load) -> bool:
    """Returns True if a server answers none of some calls; raises an error once it has ended."""
    before = servers.count(host, CALLS)
    load.wait_for(5 * len(HOSTS))
    return servers.count(host, CALLS) == before


@pytest.mark.promise(
    "faults",
    "Of three servers behind a name one is killed, one hangs, one drains, one is added, and no call is lost",
)
def test_calls_survive_every_change_of_the_servers_behind_a_name(
    form: Form, deck_folder: Path, tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.transport.channel.DNS_PAUSE_MS", 200)
    monkeypatch.setattr("mal_client.transport.channel.KEEPALIVE_MS", 2000)
    monkeypatch.setattr("mal_client.transport.channel.KEEPALIVE_TIMEOUT_MS", 1000)
    killed, drained, staying, added = HOSTS
    load = Load(load_images(deck_folder))
    calls = form.pick(100, 1500)
    with ExitStack() as stack:
        servers = stack.enter_context(fleet(tmp_path, "--batch-ms", "5"))
        names = stack.enter_context(name_server(killed, drained, staying))
        stack.enter_context(calling(load, names.target(servers.port)))
        until(lambda: all(servers.counts(names.addresses, CALLS)))
        before = servers.counts(names.addresses, CALLS)
        load.wait_for(3 * calls)
        shares = increase(before, servers.counts(names.addresses, CALLS))

        servers.signal(killed, signal.SIGKILL)
        load.wait_for(calls)

        names.addresses = [drained, staying, added]
        until(lambda: servers.count(added, CALLS) >= calls // 3)

        # A process that hangs: the kernel still accepts what is sent to it.
        servers.signal(staying, signal.SIGSTOP)
        load.wait_for(calls)
        servers.signal(staying, signal.SIGCONT)

        servers.signal(drained, signal.SIGTERM)
        until(lambda: gets_no_calls(servers, drained, load))  # while it still accepts them
        exit_code = servers.servers[drained].process.wait(LIMIT_S)
        names.addresses = [staying, added]
        load.wait_for(calls)
    spread = largest_deviation(shares)
    record("calls behind a name", calls=load.outcomes.total(), shares=shares, largest_deviation=round(spread, 3))
    assert set(load.outcomes) == {"right"}
    assert spread <= 0.2
    assert exit_code == 0


def expected_counts(dataset: Dataset) -> dict[int, str]:
    """Returns the run lengths of each annotation, as the servers compute them."""
    expected: dict[int, str] = {}
    for image in dataset.coco["images"]:
        rows = [row for row in dataset.coco["annotations"] if row["image_id"] == image["id"]]
        masks = expected_masks((dataset.images_dir / image["file_name"]).read_bytes(), [row["bbox"] for row in rows])
        expected |= {row["id"]: mask.decode("ascii") for row, mask in zip(rows, masks, strict=True)}
    return expected


@pytest.mark.promise(
    "faults", "Of three servers behind a name one is killed, one drains, one is added, and no row of a job is lost"
)
def test_a_dataset_job_survives_every_change_of_the_servers_behind_its_name(
    form: Form, tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.bulk.server_finder.REFRESH_EVERY_S", 0.5)
    killed, drained, staying, added = HOSTS
    dataset = make_dataset(tmp_path, images=form.pick(240, 3000), boxes=2)
    images = len(dataset.coco["images"])
    addresses = [killed, drained, staying]
    notices: list[str] = []
    rows = Counter[int]()

    with fleet(tmp_path, "--batch-ms", "100", "max_batch_size=2", "limits.max_items_in_flight=4") as servers:

        def drain() -> None:
            addresses.remove(drained)
            servers.signal(drained, signal.SIGTERM)

        steps: dict[int, Callable[[], object]] = {
            images // 6: lambda: servers.signal(killed, signal.SIGKILL),
            images // 4: lambda: addresses.append(added),
            images // 2: drain,
        }

        def on_progress(progress: Progress) -> None:
            rows[progress.boxes_done] += 1
            if progress.images_done in steps:
                steps.pop(progress.images_done)()

        def lookup(host: str, port: int) -> Sequence[str]:
            return list(addresses)

        def label(**listeners: Any) -> DatasetResult:
            paths = dataset.json_path, dataset.images_dir, dataset.output
            with Client(f"mal.test:{servers.port}", timeout_s=60) as client:
                return label_dataset([client], *paths, SERVER_DEFAULTS, lookup=lookup, **listeners)

        before = servers.counts(addresses, MASKS)
        label()
        shares = increase(before, servers.counts(addresses, MASKS))
        result = label(on_progress=on_progress, on_notice=notices.append)
        exit_code = servers.servers[drained].process.wait(LIMIT_S)
    spread = largest_deviation(shares)
    record("job behind a name", images=images, shares=shares, largest_deviation=round(spread, 3), notices=len(notices))
    masks = {row_id: row["segmentation"]["counts"] for row_id, row in dataset.labeled().items()}
    assert sum(shares) == 2 * images
    if form.is_full:
        assert spread <= 0.2
    assert not steps
    assert (result.labeled, result.failed_count, result.is_final) == (2 * images, 0, True)
    assert masks == expected_counts(dataset)
    assert set(rows.values()) == {1}  # each result of an image arrives once
    assert any(f"{added}:" in notice and "joins" in notice for notice in notices)
    assert any(f"{drained}:" in notice and "no further items" in notice for notice in notices)
    assert exit_code == 0
