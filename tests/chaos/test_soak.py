"""Everything at once, for as long as one likes: servers that die, freeze, drain and lose their device; nothing is lost.

Meanwhile callers leave in every way, send hostile pictures and bytes, and a bulk job is killed and taken up again. One
of the servers never ends: it tells what a long life leaves behind. MAL_SOAK_S sets the length in seconds: an hour is
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

from benchmarks.load.caller import LABEL_IMAGE, Plan
from benchmarks.load.deck import Picture, load_deck
from benchmarks.load.run import ROOT, START_S, environment, loading, samples_of, wait_for_address
from mal_server.ops.health_probe import HealthProbe
from tests.chaos.conftest import FORM, Form
from tests.chaos.test_hostile import corpus, mutant
from tests.chaos.test_load import free_port, queued_crops

Say = Callable[..., None]

SECONDS = float(os.environ.get("MAL_SOAK_S", FORM.pick(15, 300)))
PAUSE_S = FORM.pick(0.3, 3.0)
"""At most, between two faults."""
MORTALS = 2
CLIENTS, BOXES = 6, 4
JOB_IMAGES = 40
GROWTH_MIB = 20
"""Of a server that lives on, from the second quarter of its life to the last; as the leak test allows."""

pytestmark = pytest.mark.slow  # servers are started again and again, and each imports torch


@dataclass
class Tended:
    """A stand-in server that is started again whenever it ends, at the same address.

    Attributes:
        folder: of its files.
        address: its own host of this machine, so that no connection of another process can take its port meanwhile.
        arguments: of the stand-in.
        ends: (exit code that the fault before is known to have, exit code), one for each end.
        due: exit code that it is bound to end with, once a fault is done to it.
    """

    folder: Path
    address: str
    arguments: Sequence[str] = ()
    ends: list[tuple[int | None, int]] = field(default_factory=list)
    due: int | None = None

    def start(self) -> None:
        """Does not wait for it."""
        self.port_file.unlink(missing_ok=True)
        host, _, port = self.address.rpartition(":")
        command = [sys.executable, "-m", "benchmarks.load.stand_in", "--port-file", str(self.port_file)]
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
        """It serves, and nothing will end it soon."""
        return self.due is None and self.process.poll() is None and self.port_file.exists()

    def tend(self) -> None:
        """Starts it again where it has ended."""
        code = self.process.poll()
        if code is not None:
            self.ends.append((self.due, code))
            self.due = None
            self.start()

    def end(self) -> None:
        """For good, by SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        self.ends.append((0, self.process.wait(120)))

    def rss_mib(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def files(self) -> int:
        """Open ones, sockets among them."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


class Job:
    """`mal-client label` on the deck's pictures, over and over; each output is held against the right masks."""

    def __init__(self, folder: Path, deck_folder: Path, addresses: Sequence[str]) -> None:
        self._folder = folder
        self._deck = load_deck(deck_folder)
        images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
        for at in range(JOB_IMAGES):
            picture = self._deck[at % len(self._deck)]
            size = {"width": picture.width, "height": picture.height}
            images.append({"id": at, "file_name": f"{at % len(self._deck)}.jpg", **size})
            for box in picture.boxes:
                row = {"id": len(annotations), "image_id": at, "category_id": 1, "bbox": box, "iscrowd": 0}
                annotations.append({**row, "area": box[2] * box[3]})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        self._wanted = [counts.decode() for at in range(JOB_IMAGES) for counts in self._picture(at).counts or ()]
        (folder / "boxes.json").write_text(json.dumps(content))
        data = ["--annotations", str(folder / "boxes.json"), "--images", str(deck_folder)]
        run = "import sys; from mal_client.cli.main import main; sys.exit(main())"
        self._command = [sys.executable, "-c", run, "label", "--server", ",".join(addresses), *data, "--log", "json"]
        self.done = 0
        self.kills = 0
        self.wrong: list[str] = []
        self._start()

    def _picture(self, at: int) -> Picture:
        return self._deck[at % len(self._deck)]

    @property
    def _output(self) -> Path:
        return self._folder / f"masks-{self.done}.json"

    def _start(self) -> None:
        with (self._folder / "job.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, "--output", str(self._output)], env=environment(), stdout=log, stderr=log
            )

    def kill(self) -> None:
        """By SIGKILL; the same command goes on where it was."""
        self.process.kill()
        self.process.wait()
        self.kills += 1
        self._start()

    def tend(self) -> None:
        """Looks at the output of one that has ended, and starts the next."""
        if self.process.poll() is not None:
            self._check()
            self.done += 1
            self._start()

    def finish(self) -> None:
        """Lets the last one come to its end."""
        self.process.wait(600)
        self._check()
        self.done += 1

    def _check(self) -> None:
        if self.process.returncode != 0:
            self.wrong.append(f"job {self.done} ended with {self.process.returncode}")
            return
        rows = json.loads(self._output.read_text())["annotations"]
        if [row["id"] for row in rows] != list(range(len(self._wanted))):
            self.wrong.append(f"job {self.done}: {len(rows)} rows for {len(self._wanted)} boxes, or in another order")
        found = [row.get("segmentation", {}).get("counts") for row in rows]
        bad = sum(one != right for one, right in zip(found, self._wanted, strict=False))
        if bad:
            self.wrong.append(f"job {self.done}: {bad} masks are wrong or missing")
        self._output.unlink()


class Rude:
    """Callers that leave, and callers that send what is no picture or no request."""

    WAYS = ("cancel at once", "cancel later", "deadline", "half a stream", "cut picture", "mutant", "junk")

    def __init__(self, chance: random.Random, deck: Sequence[Picture]) -> None:
        self._chance = chance
        self._deck = deck
        self._corpus = corpus()
        self.codes: Counter[str] = Counter()

    def burst(self, address: str) -> None:
        """A dozen calls on a connection of their own, which then goes."""
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            calls = [self._call(channel, self._chance.choice(self.WAYS)) for _ in range(12)]
            time.sleep(self._chance.uniform(0, 0.1))
            for call, leaves in calls:
                if leaves:
                    call.cancel()
                self.codes[_end_of(call)] += 1

    def _call(self, channel: grpc.Channel, way: str) -> tuple[Any, bool]:
        """The call, and whether its caller will leave."""
        stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        picture = self._chance.choice(self._deck)
        if way == "junk":
            return channel.unary_stream(LABEL_IMAGE, None, None)(self._chance.randbytes(200)), False
        if way == "half a stream":
            item = labeling_pb2.LabelImagesRequest(item_id="1", request=self._request(picture))
            return stub.LabelImages(iter([item])), True
        request = self._request(picture)
        if way == "cut picture":
            request.image.content = picture.content[: self._chance.randrange(1, len(picture.content))]
        if way == "mutant":
            request.image.content = mutant(self._chance, self._corpus)
            request.image.ClearField("expected_width")
            request.image.ClearField("expected_height")
        call = stub.LabelImage(request, timeout=0.02 if way == "deadline" else 60)
        if way == "cancel at once":
            call.cancel()
        return call, way == "cancel later"

    def _request(self, picture: Picture) -> labeling_pb2.LabelImageRequest:
        places = list(range(len(picture.boxes)))
        return labeling_pb2.LabelImageRequest.FromString(picture.request(places, places, types_pb2.LabelOptions()))


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


class Faults:
    """Does one fault after the other.

    Args:
        chance: of everything.
        witness: the server that never ends.
        mortals: those that do.
        job: the bulk job.
        rude: the callers without manners.
    """

    def __init__(self, chance: random.Random, witness: Tended, mortals: Sequence[Tended], job: Job, rude: Rude) -> None:
        self._chance = chance
        self._witness = witness
        self._mortals = mortals
        self._job = job
        self._rude = rude
        self.done: Counter[str] = Counter()
        self.rss_mib: list[float] = []
        self.files: list[int] = []

    def kinds(self, until: float) -> Iterator[str]:
        """Each once, in a random order, then any, until the time is over."""
        every = ["kill", "drain", "lose the device", "freeze", "reload", "rude callers", "kill the job"]
        yield from self._chance.sample(every, len(every))
        while time.monotonic() < until:
            yield self._chance.choice(every)

    def do(self, kind: str) -> None:
        """One fault, once there is a server for it."""
        ends = {"kill": (signal.SIGKILL, -9), "drain": (signal.SIGTERM, 0), "lose the device": (signal.SIGUSR2, 1)}
        if kind in ends:
            number, code = ends[kind]
            server = self._chance.choice(self._those_up())
            server.due = code
            server.process.send_signal(number)
            if kind == "lose the device":
                self._rude.burst(server.address)  # it is noticed by the next batch
        elif kind == "freeze":
            server = self._chance.choice([self._witness, *self._those_up()])
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(self._chance.uniform(0.05, PAUSE_S))
            server.process.send_signal(signal.SIGCONT)
        elif kind == "reload":
            self._chance.choice([self._witness, *self._those_up()]).process.send_signal(signal.SIGHUP)
        elif kind == "rude callers":
            self._rude.burst(self._witness.address)
        else:
            self._job.kill()
        self.done[kind] += 1

    def rest(self, seconds: float) -> None:
        """Keeps everything going for so long, and looks at the witness."""
        until = time.monotonic() + seconds
        while True:
            for server in (self._witness, *self._mortals):
                server.tend()
            self._job.tend()
            self.rss_mib.append(self._witness.rss_mib())
            self.files.append(self._witness.files())
            if time.monotonic() >= until:
                return
            time.sleep(0.1)

    def wait_for(self, holds: Callable[[], object], what: str) -> None:
        """Keeps everything going until it is so."""
        until = time.monotonic() + START_S
        while not holds():
            assert time.monotonic() < until, what
            self.rest(0.1)

    def _those_up(self) -> list[Tended]:
        self.wait_for(lambda: any(one.is_up for one in self._mortals), "no server came up again")
        return [one for one in self._mortals if one.is_up]


# On the function: a module's mark would yield to the limit that every test of this folder gets.
@pytest.mark.timeout(SECONDS + 1200)
def test_under_all_faults_at_random_nothing_is_lost_and_nothing_comes_twice(
    form: Form, deck_folder: Path, tmp_path: Path, say: Say
) -> None:
    chance, metrics = random.Random(form.seed), free_port()
    # Batches that do not fit the device are part of every day.
    arguments = ("--log-level", "ERROR", "--batch-ms", "20", "--fits", "6", "max_batch_size=16", "drain_delay_s=0.2")
    witness = Tended(tmp_path, f"127.0.0.1:{free_port()}", (*arguments, f"metrics.port={metrics}"))
    mortals = [Tended(tmp_path, f"127.0.0.{at + 2}:{free_port()}", arguments) for at in range(MORTALS)]
    servers = [witness, *mortals]
    addresses = [one.address for one in servers]
    with ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(lambda one: ended(one.process), server)
        for server in servers:
            wait_for_address(server.process, server.port_file)
        job = Job(tmp_path, deck_folder, addresses)
        stack.callback(lambda: ended(job.process))
        rude = Rude(chance, load_deck(deck_folder))
        faults = Faults(chance, witness, mortals, job, rude)
        plan = Plan(",".join(addresses), clients=CLIENTS, seconds=SECONDS, boxes=BOXES, retries=True, seed=form.seed)
        with loading([plan], deck_folder) as load:
            for kind in faults.kinds(load.start_at + SECONDS):
                faults.do(kind)
                faults.rest(chance.uniform(0, PAUSE_S))
            samples = samples_of(load.wait(SECONDS + 600))
        faults.wait_for(lambda: all(one.is_up for one in servers), "a server did not come back")
        job.finish()
        faults.wait_for(lambda: queued_crops(f"127.0.0.1:{metrics}") == 0, "crops wait that nobody waits for")
        health = [HealthProbe(address).check() for address in addresses]
        for server in servers:
            server.end()
    growth_mib, more_files = _grown(faults.rss_mib), _grown(faults.files)
    logs = {server.address: server.log.read_text() for server in servers}
    say(
        "soak",
        seconds=SECONDS,
        calls=len(samples),
        tries=sum(one.tries for one in samples),
        jobs=job.done,
        growth_mib=growth_mib,
        more_files=more_files,
        ends=sum(len(one.ends) for one in mortals) - MORTALS,
        **{kind.replace(" ", "_"): count for kind, count in sorted(faults.done.items())},
        rude=dict(rude.codes),
    )
    assert {(one.code, one.right, one.wrong) for one in samples} == {("OK", BOXES, 0)}
    assert (job.wrong, job.done > 0, job.kills) == ([], True, faults.done["kill the job"])
    assert health == ["SERVING"] * len(servers)
    for server in servers:
        assert all(due == code for due, code in server.ends), (server.ends, logs[server.address])
        # gRPC logs a traceback of its own where a call is cancelled before its handler begins; none goes through ours.
        assert f'File "{ROOT}' not in logs[server.address]
    assert len(witness.ends) == 1
    assert set(rude.codes) <= {"OK", "INVALID_ARGUMENT", "CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE"}
    assert growth_mib <= GROWTH_MIB
    assert more_files <= CLIENTS + MORTALS + 2


def ended(process: "subprocess.Popen[bytes]") -> None:
    """Whatever it is at."""
    process.kill()
    process.wait()


def _grown(seen: Sequence[float]) -> float:
    """From the second quarter of what was seen to the last, by their medians."""
    quarter = len(seen) // 4
    return statistics.median(seen[-quarter:]) - statistics.median(seen[quarter : 2 * quarter])
