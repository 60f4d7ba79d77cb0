"""supervisord restarts the server after kill -9 and after a lost device; retrying clients lose no call."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.load.client import Plan
from benchmarks.load.run import ROOT, all_samples, environment, run_clients, wait_for_address
from mal_server.ops.health_probe import HealthProbe
from tests.chaos.test_load import free_port
from tests.form import Form

Record = Callable[..., None]

CONF = ROOT / "deploy" / "supervisord.conf"


@dataclass
class Supervised:
    """A server under supervisord with the shipped configuration."""

    supervisor: "subprocess.Popen[bytes]"
    address: str
    folder: Path

    def pid(self) -> int:
        """Returns the id of the server process; waits until there is one."""
        until = time.monotonic() + 120
        while time.monotonic() < until:
            children = Path(f"/proc/{self.supervisor.pid}/task/{self.supervisor.pid}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.01)
        raise AssertionError("supervisord started no new process")

    def health(self) -> str:
        """Returns the status that `mal-server health` prints."""
        return HealthProbe(self.address, timeout_s=1.0).check().partition(" ")[0]

    def seconds_until_serving(self) -> float:
        """Waits until the server is SERVING; returns the seconds that took."""
        began = time.monotonic()
        while self.health() != "SERVING":
            assert time.monotonic() < began + 120, "the server did not restart"
            time.sleep(0.02)
        return time.monotonic() - began

    def ends(self) -> list[str]:
        """Returns the exit of each server process, from supervisord's log."""
        return re.findall(r"exited: mal-server \((.*?)\)", (self.folder / "supervisord.log").read_text())


@contextmanager
def supervised(folder: Path, *arguments: str) -> Iterator[Supervised]:
    """Runs the shipped configuration; only its paths and the command differ."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.load.fake_server", "--port-file", str(folder / "port")]
    line = " ".join([*command, *arguments, f"listen.port={port}"])
    text = re.sub(r"^command=.*$", f"command={line}", CONF.read_text(), flags=re.MULTILINE)
    text = re.sub(r"^directory=.*$", f"directory={ROOT}", text, flags=re.MULTILINE)
    text = re.sub(r"/(run|var/log)/mal-server", str(folder), text)
    (folder / "supervisord.conf").write_text(text)
    supervisord = [sys.executable, "-m", "supervisor.supervisord", "-c", str(folder / "supervisord.conf")]
    process = subprocess.Popen(supervisord, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield Supervised(process, wait_for_address(process, folder / "port"), folder)
    finally:
        process.terminate()
        process.wait(90)


@pytest.mark.promise("faults", "kill -9 under load: the supervisor starts a new server, and no call is lost")
def test_a_killed_server_restarts_and_no_call_is_lost(
    form: Form, deck_folder: Path, tmp_path: Path, record: Record
) -> None:
    chance, kills = random.Random(form.seed), form.pick(1, 50)
    down: list[float] = []
    with supervised(tmp_path, "--batch-ms", "20") as server:
        plan = Plan(server.address, clients=8, seconds=3600.0, calls=form.pick(200, 20_000), boxes=2, retries=True)
        with run_clients([plan], deck_folder) as load:
            time.sleep(max(load.start_at - time.monotonic(), 0))
            for _ in range(kills):
                # The calls of the short form take the device half a second: the kill interrupts them.
                time.sleep(chance.uniform(0.1, form.pick(0.4, 0.6)))
                os.kill(server.pid(), signal.SIGKILL)
                assert server.health() != "SERVING"
                down.append(server.seconds_until_serving())
            samples = all_samples(load.wait(1200))
    tries = sum(one.tries for one in samples)
    record(
        "kill -9", kills=kills, calls=len(samples), tries=tries, longest_down_s=max(down), mean_down_s=sum(down) / kills
    )
    assert len(samples) == plan.calls
    assert {(one.code, one.right, one.wrong) for one in samples} == {("OK", 2, 0)}
    assert tries > len(samples)
    assert server.ends()[:kills] == ["terminated by SIGKILL; not expected"] * kills


@pytest.mark.promise("faults", "A lost device ends the process, the supervisor starts a new one, and no call is lost")
@pytest.mark.slow  # several server starts
def test_a_lost_device_ends_the_process_and_the_supervisor_starts_a_new_one(
    form: Form, deck_folder: Path, tmp_path: Path, record: Record
) -> None:
    lives, calls = 20, form.pick(20, 600)
    # One client with one box: every call is a batch. Warm-up and self-test use some of the batches.
    with supervised(tmp_path, "--batch-ms", "1", "--lives", str(lives)) as server:
        plan = Plan(server.address, clients=1, seconds=3600.0, calls=calls, retries=True, seed=form.seed)
        with run_clients([plan], deck_folder) as load:
            samples = all_samples(load.wait(1200))
        ends = server.ends()
    record("device lost", calls=len(samples), restarts=len(ends), tries=sum(one.tries for one in samples))
    assert {(one.code, one.right, one.wrong) for one in samples} == {("OK", 1, 0)}
    assert len(samples) == calls
    assert len(ends) >= calls // lives
    assert set(ends) == {"exit status 1; not expected"}
