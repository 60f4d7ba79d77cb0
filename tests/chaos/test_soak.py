"""A soak test with all faults at once: servers are killed, frozen, drained and lose their device; no call is lost.

Meanwhile clients abort calls and send malformed images and bytes, and a bulk job is killed and resumed. One server runs
to the end and shows leaks. MAL_SOAK_S sets the duration in seconds; for an hour:
`MAL_CHAOS=full MAL_SOAK_S=3600 pytest -s tests/chaos/test_soak.py`.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from mal.v1 import labeling_pb2, labeling_pb2_grpc, types_pb2

from benchmarks.load.client import LABEL_IMAGE, Plan
from benchmarks.load.images import LoadImage, load_images
from benchmarks.load.run import ROOT, START_S, all_samples, environment, run_clients, wait_for_address
from mal_server.ops.health_probe import HealthProbe
from tests.chaos.test_hostile import corpus, mutant
from tests.chaos.test_load import free_port, queued_crops
from tests.form import FORM, Form

Record = Callable[..., None]

SECONDS = float(os.environ.get("MAL_SOAK_S", FORM.pick(15, 300)))
PAUSE_S = FORM.pick(0.3, 3.0)
"""Longest pause between two faults."""
VICTIMS = 2
CLIENTS, BOXES = 6, 4
JOB_IMAGES = 40
GROWTH_MIB = 20
"""Limit of the growth of the long-lived server, from the second quarter of the run to the last."""

pytestmark = pytest.mark.slow  # many server starts, and each imports torch


@dataclass
class RestartedServer:
    """A stand-in server that is restarted at the same address whenever it ends.

    Attributes:
        folder: for its files.
        address: on a loopback host of its own, so that no other connection takes its port between restarts.
        arguments: of the stand-in.
        exits: (expected exit code, exit code) of each exit.
        expected_exit: exit code that the last fault causes; None without a fault.
    """

    folder: Path
    address: str
    arguments: Sequence[str] = ()
    exits: list[tuple[int | None, int]] = field(default_factory=list)
    expected_exit: int | None = None

    def start(self) -> None:
        """Starts the process without waiting for it."""
        self.port_file.unlink(missing_ok=True)
        host, _, port = self.address.rpartition(":")
        command = [sys.executable, "-m", "benchmarks.load.fake_server", "--port-file", str(self.port_file)]
        listens = [f"listen.host={host}", f"listen.port={port}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments, *listens], env=environment(), cwd=ROOT, stdout=log, stderr=log
            )

    @property
    def port_file(self) -> Path:
        return self.folder / f"{self.address}.port"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.address}.log"

    @property
    def is_up(self) -> bool:
        """True while it serves and no fault is pending."""
        return self.expected_exit is None and self.process.poll() is None and self.port_file.exists()

    def restart_if_ended(self) -> None:
        """Restarts the process if it has ended."""
        code = self.process.poll()
        if code is not None:
            self.exits.append((self.expected_exit, code))
            self.expected_exit = None
            self.start()

    def stop(self) -> None:
        """Ends the process by SIGTERM, without a restart."""
        self.process.send_signal(signal.SIGTERM)
        self.exits.append((0, self.process.wait(120)))

    def rss_mib(self) -> float:
        """Returns the resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def files(self) -> int:
        """Returns the number of open files, sockets included."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


class BulkJob:
    """`mal-client label` on the deck's images, repeated; each output is compared with the expected masks."""

    def __init__(self, folder: Path, deck_folder: Path, addresses: Sequence[str]) -> None:
        self._folder = folder
        self._deck = load_images(deck_folder)
        images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
        for index in range(JOB_IMAGES):
            image = self._image(index)
            size = {"width": image.width, "height": image.height}
            images.append({"id": index, "file_name": f"{index % len(self._deck)}.jpg", **size})
            for box in image.boxes:
                row = {"id": len(annotations), "image_id": index, "category_id": 1, "bbox": box, "iscrowd": 0}
                annotations.append({**row, "area": box[2] * box[3]})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        self._expected = [counts.decode() for n in range(JOB_IMAGES) for counts in self._image(n).counts or ()]
        (folder / "boxes.json").write_text(json.dumps(content))
        data = ["--annotations", str(folder / "boxes.json"), "--images", str(deck_folder)]
        run = "import sys; from mal_client.cli.main import main; sys.exit(main())"
        self._command = [sys.executable, "-c", run, "label", "--server", ",".join(addresses), *data, "--log", "json"]
        self.done = 0
        self.kills = 0
        self.errors: list[str] = []
        self._start()

    def _image(self, index: int) -> LoadImage:
        return self._deck[index % len(self._deck)]

    @property
    def _output(self) -> Path:
        return self._folder / f"masks-{self.done}.json"

    def _start(self) -> None:
        with (self._folder / "job.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, "--output", str(self._output)], env=environment(), stdout=log, stderr=log
            )

    def kill(self) -> None:
        """Kills the process and starts the same command, which resumes."""
        self.process.kill()
        self.process.wait()
        self.kills += 1
        self._start()

    def repeat_if_ended(self) -> None:
        """Checks the output of a run that has ended and starts the next."""
        if self.process.poll() is not None:
            self._check()
            self.done += 1
            self._start()

    def finish(self) -> None:
        """Waits for the last run and checks its output."""
        self.process.wait(600)
        self._check()
        self.done += 1

    def _check(self) -> None:
        if self.process.returncode != 0:
            self.errors.append(f"job {self.done} ended with {self.process.returncode}")
            return
        rows = json.loads(self._output.read_text())["annotations"]
        if [row["id"] for row in rows] != list(range(len(self._expected))):
            self.errors.append(f"job {self.done}: {len(rows)} rows for {len(self._expected)} boxes, or wrong order")
        actual = [row.get("segmentation", {}).get("counts") for row in rows]
        bad = sum(mask != expected for mask, expected in zip(actual, self._expected, strict=False))
        if bad:
            self.errors.append(f"job {self.done}: {bad} masks are wrong or missing")
        self._output.unlink()


class BadClients:
    """Clients that abort calls, and clients that send invalid images or requests."""

    KINDS = ("cancel at once", "cancel later", "deadline", "half a stream", "truncated image", "mutant", "junk")

    def __init__(self, chance: random.Random, deck: Sequence[LoadImage]) -> None:
        self._chance = chance
        self._deck = deck
        self._corpus = corpus()
        self.codes: Counter[str] = Counter()

    def burst(self, address: str) -> None:
        """Makes a dozen calls on a connection of its own and closes it."""
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            calls = [self._call(channel, self._chance.choice(self.KINDS)) for _ in range(12)]
            time.sleep(self._chance.uniform(0, 0.1))
            for call, is_aborted in calls:
                if is_aborted:
                    call.cancel()
                self.codes[_end_of(call)] += 1

    def _call(self, channel: grpc.Channel, kind: str) -> tuple[Any, bool]:
        """Starts a call; returns it and whether its client will cancel it."""
        stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        image = self._chance.choice(self._deck)
        if kind == "junk":
            return channel.unary_stream(LABEL_IMAGE, None, None)(self._chance.randbytes(200)), False
        if kind == "half a stream":
            item = labeling_pb2.LabelImagesRequest(item_id="1", request=self._request(image))
            return stub.LabelImages(iter([item])), True
        request = self._request(image)
        if kind == "truncated image":
            request.image.content = image.content[: self._chance.randrange(1, len(image.content))]
        if kind == "mutant":
            request.image.content = mutant(self._chance, self._corpus)
            request.image.ClearField("expected_width")
            request.image.ClearField("expected_height")
        call = stub.LabelImage(request, timeout=0.02 if kind == "deadline" else 60)
        if kind == "cancel at once":
            call.cancel()
        return call, kind == "cancel later"

    def _request(self, image: LoadImage) -> labeling_pb2.LabelImageRequest:
        indices = list(range(len(image.boxes)))
        return labeling_pb2.LabelImageRequest.FromString(image.request(indices, indices, types_pb2.LabelOptions()))


def _end_of(call: Any) -> str:
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        code: Any = error
        return str(code.code().name)
    except grpc.FutureCancelledError:
        return "CANCELLED"
    return "OK"


class FaultInjector:
    """Injects one fault after another.

    Args:
        chance: random choices.
        survivor: the server that runs to the end.
        victims: the servers that faults end.
        job: the bulk job.
        clients: abort calls and send invalid requests.
    """

    def __init__(
        self,
        chance: random.Random,
        survivor: RestartedServer,
        victims: Sequence[RestartedServer],
        job: BulkJob,
        clients: BadClients,
    ) -> None:
        self._chance = chance
        self._survivor = survivor
        self._victims = victims
        self._job = job
        self._clients = clients
        self.done: Counter[str] = Counter()
        self.rss_mib: list[float] = []
        self.files: list[int] = []

    def kinds(self, until: float) -> Iterator[str]:
        """Yields each kind once in random order, then random kinds until the time is over."""
        every = ["kill", "drain", "lose the device", "freeze", "reload", "bad clients", "kill the job"]
        yield from self._chance.sample(every, len(every))
        while time.monotonic() < until:
            yield self._chance.choice(every)

    def inject(self, kind: str) -> None:
        """Injects a fault as soon as a server is up for it."""
        ends = {"kill": (signal.SIGKILL, -9), "drain": (signal.SIGTERM, 0), "lose the device": (signal.SIGUSR2, 1)}
        if kind in ends:
            number, code = ends[kind]
            server = self._chance.choice(self._victims_up())
            server.expected_exit = code
            server.process.send_signal(number)
            if kind == "lose the device":
                self._clients.burst(server.address)  # the next batch detects it
        elif kind == "freeze":
            server = self._chance.choice([self._survivor, *self._victims_up()])
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(self._chance.uniform(0.05, PAUSE_S))
            server.process.send_signal(signal.SIGCONT)
        elif kind == "reload":
            self._chance.choice([self._survivor, *self._victims_up()]).process.send_signal(signal.SIGHUP)
        elif kind == "bad clients":
            self._clients.burst(self._survivor.address)
        else:
            self._job.kill()
        self.done[kind] += 1

    def run(self, seconds: float) -> None:
        """Restarts what ended, for this long, and records the survivor's memory and files."""
        until = time.monotonic() + seconds
        while True:
            for server in (self._survivor, *self._victims):
                server.restart_if_ended()
            self._job.repeat_if_ended()
            self.rss_mib.append(self._survivor.rss_mib())
            self.files.append(self._survivor.files())
            if time.monotonic() >= until:
                return
            time.sleep(0.1)

    def wait_for(self, holds: Callable[[], object], message: str) -> None:
        """Runs until a condition holds; fails with the message after START_S."""
        until = time.monotonic() + START_S
        while not holds():
            assert time.monotonic() < until, message
            self.run(0.1)

    def _victims_up(self) -> list[RestartedServer]:
        self.wait_for(lambda: any(one.is_up for one in self._victims), "no server restarted")
        return [one for one in self._victims if one.is_up]


# On the function: the limit that conftest.py adds to every test takes precedence over a module's mark.
@pytest.mark.promise("faults", "Under all faults at random no call is lost or answered twice")
@pytest.mark.timeout(SECONDS + 1200)
def test_no_call_is_lost_or_answered_twice_under_random_faults(
    form: Form, deck_folder: Path, tmp_path: Path, record: Record
) -> None:
    chance, metrics = random.Random(form.seed), free_port()
    # Some batches do not fit on the device.
    arguments = ("--log-level", "ERROR", "--batch-ms", "20", "--fits", "6", "max_batch_size=16", "drain_delay_s=0.2")
    survivor = RestartedServer(tmp_path, f"127.0.0.1:{free_port()}", (*arguments, f"metrics.port={metrics}"))
    victims = [RestartedServer(tmp_path, f"127.0.0.{n + 2}:{free_port()}", arguments) for n in range(VICTIMS)]
    servers = [survivor, *victims]
    addresses = [one.address for one in servers]
    with ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(lambda one: kill(one.process), server)
        for server in servers:
            wait_for_address(server.process, server.port_file)
        job = BulkJob(tmp_path, deck_folder, addresses)
        stack.callback(lambda: kill(job.process))
        clients = BadClients(chance, load_images(deck_folder))
        faults = FaultInjector(chance, survivor, victims, job, clients)
        plan = Plan(",".join(addresses), clients=CLIENTS, seconds=SECONDS, boxes=BOXES, retries=True, seed=form.seed)
        with run_clients([plan], deck_folder) as load:
            for kind in faults.kinds(load.start_at + SECONDS):
                faults.inject(kind)
                faults.run(chance.uniform(0, PAUSE_S))
            samples = all_samples(load.wait(SECONDS + 600))
        faults.wait_for(lambda: all(one.is_up for one in servers), "a server did not restart")
        job.finish()
        faults.wait_for(lambda: queued_crops(f"127.0.0.1:{metrics}") == 0, "abandoned crops are still queued")
        health = [HealthProbe(address).check() for address in addresses]
        for server in servers:
            server.stop()
    growth_mib, more_files = _growth(faults.rss_mib), _growth(faults.files)
    logs = {server.address: server.log.read_text() for server in servers}
    record(
        "soak",
        seconds=SECONDS,
        calls=len(samples),
        tries=sum(one.tries for one in samples),
        jobs=job.done,
        growth_mib=growth_mib,
        more_files=more_files,
        restarts=sum(len(one.exits) for one in victims) - VICTIMS,
        **{kind.replace(" ", "_"): count for kind, count in sorted(faults.done.items())},
        client_codes=dict(clients.codes),
    )
    assert {(one.code, one.right, one.wrong) for one in samples} == {("OK", BOXES, 0)}
    assert (job.errors, job.done > 0, job.kills) == ([], True, faults.done["kill the job"])
    assert health == ["SERVING"] * len(servers)
    for server in servers:
        assert all(expected == code for expected, code in server.exits), (server.exits, logs[server.address])
        # gRPC itself logs a traceback for a call cancelled before its handler starts; none may contain our files.
        assert f'File "{ROOT}' not in logs[server.address]
    assert len(survivor.exits) == 1
    assert set(clients.codes) <= {"OK", "INVALID_ARGUMENT", "CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE"}
    assert growth_mib <= GROWTH_MIB
    assert more_files <= CLIENTS + VICTIMS + 2


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kills a process and waits for it."""
    process.kill()
    process.wait()


def _growth(values: Sequence[float]) -> float:
    """Returns the median of the last quarter minus the median of the second."""
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])
