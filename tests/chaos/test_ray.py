"""`mal-train inference` on a Ray cluster of several nodes on loopback, of which nodes and the command are killed."""

import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.coco.journal import journal_path
from mal_train.core.coco.parquet_parts import divide, part_name
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.errors import LostProcess
from tests.chaos.fatal_part import FATAL
from tests.chaos.ray_nodes import PATHS, RayNodes, descendants, kill_node, resident_bytes
from tests.form import Form
from tests.mal_train.offline.part_jobs import FAILED, as_json, local_labels, overrides, write_job
from tests.paths import ROOT

Record = Callable[..., None]

SOME_FAILED, TERMINATED = 3, 143
LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""
PIPES: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
PART_BOXES = 4
MAX_BYTES = 3 << 30
"""Memory of the short form: the command and two actors have torch, some 580 MiB each."""


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    with RayNodes() as cluster:
        yield cluster


class Job:
    """`mal-train inference` on the cluster, with the built-in checkpoint."""

    def __init__(self, folder: Path, nodes: RayNodes, images: int) -> None:
        write_job(folder, images)
        self.folder, self.nodes = folder, nodes
        self.output = folder / "results" / "inference" / "labels.parquet"
        self.parts = divide(ParquetDataset(folder / "boxes.parquet").row_groups, PART_BOXES)

    def start(self, **section: object) -> subprocess.Popen[str]:
        fields = {"engine": "ray", "ray_address": self.nodes.address, "ray_part_boxes": PART_BOXES, **section}
        arguments = overrides(self.folder, self.folder / "results", "parquet", checkpoint="builtin", **fields)
        return subprocess.Popen(
            [sys.executable, "-m", "mal_train.cli", "inference", *arguments],
            **PIPES,
            env=self.nodes.environment,
            cwd=ROOT,
        )

    def finished(self) -> list[int]:
        """Returns the number of each part in the journal, in its order."""
        return finished_parts(self.output)

    def wait_for(self, parts: int, process: subprocess.Popen[str]) -> None:
        """Waits until the journal has this number of parts."""
        while len(self.finished()) < parts:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)

    def files(self) -> dict[str, int]:
        """Returns the time at which each part was written, in ns."""
        return {path.name: path.stat().st_mtime_ns for path in self.output.glob("*.parquet")}


@pytest.mark.promise("jobs", "A job on Ray whose nodes and command are killed loses no label and has none twice")
def test_killed_nodes_and_commands_lose_no_label_and_repeat_none(
    nodes: RayNodes, tmp_path: Path, form: Form, record: Record
) -> None:
    job = Job(tmp_path, nodes, images=form.pick(40, 400))
    rng, rounds, bytes_used = random.Random(form.seed), form.pick(1, 6), 0
    raylets = [nodes.add(cpus=1) for _ in range(form.pick(2, 3))]
    step = len(job.parts) // (2 * rounds + 2)
    for _ in range(rounds):
        process = job.start()
        job.wait_for(len(job.finished()) + 2, process)
        bytes_used = max(bytes_used, resident_bytes([process.pid, *nodes.processes()]))
        assert kill_node(raylets.pop(rng.randrange(len(raylets)))) >= 2, "the raylet and its actor"
        job.wait_for(min(len(job.parts) - 1, len(job.finished()) + step), process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        raylets += [nodes.add(cpus=1) for _ in range(form.pick(0, 1))]
    kept = job.finished()
    before = {name: at for name, at in job.files().items() if name in {job.parts[n].name for n in kept}}
    last = job.start()
    _, errors = last.communicate()
    assert last.returncode == SOME_FAILED, errors
    assert sorted(job.finished()) == [part.number for part in job.parts], "every part once"
    after = job.files()
    assert sorted(after) == [part.name for part in job.parts]
    assert {name: after[name] for name in before} == before, "finished parts are not written again"
    assert as_json(job.output) == local_labels(tmp_path, tmp_path / "local", checkpoint="builtin")
    assert f"{len(kept)} of {len(job.parts)} parts are finished" in errors
    assert f"{sum(FAILED.values())} failed" in errors
    assert form.is_full or bytes_used < MAX_BYTES
    record("killed Ray job", parts=len(job.parts), kept=len(kept), kills=2 * rounds, mib=bytes_used >> 20)


@pytest.mark.slow
def test_a_cluster_of_its_own_listens_on_loopback_and_leaves_nothing(tmp_path: Path) -> None:
    write_job(tmp_path, 12)
    temporary = Path(tempfile.mkdtemp(prefix="mal-", dir="/tmp"))  # short, for the sockets of Ray
    options = {"engine": "ray", "ray_part_boxes": 4, "ray_cpus_per_actor": 1}
    arguments = overrides(tmp_path, tmp_path / "results", "parquet", checkpoint="builtin", **options)
    command = [sys.executable, "-m", "mal_train.cli", "inference", *arguments]
    output = tmp_path / "results" / "inference" / "labels.parquet"
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **PIPES) as process:
        while not finished_parts(output):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        pids = [process.pid, *descendants(process.pid)]
        (folder,) = temporary.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert listening_addresses(pids) == {"127.0.0.1"}
        # Actors overwrite their environment with their title.
        assert {variables(pid).get("RAY_USAGE_STATS_ENABLED") for pid in pids[1:]} - {None} == {"0"}
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == TERMINATED, errors
    assert [pid for pid in pids if is_running(pid)] == []
    assert list(temporary.iterdir()) == []
    kept = finished_parts(output)
    again = subprocess.run(command, cwd=ROOT, env=environment, check=False, **PIPES)
    assert again.returncode == SOME_FAILED, again.stderr
    assert finished_parts(output)[: len(kept)] == kept
    assert as_json(output) == local_labels(tmp_path, tmp_path / "local", checkpoint="builtin")
    temporary.rmdir()


@pytest.mark.slow
def test_a_part_that_ends_each_process_costs_no_other_part(tmp_path: Path) -> None:
    write_job(tmp_path, 12)
    options = {"engine": "ray", "ray_part_boxes": 4, "ray_cpus_per_actor": 1}
    arguments = overrides(tmp_path, tmp_path / "results", "parquet", **options)
    output = tmp_path / "results" / "inference" / "labels.parquet"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}

    def run(*program: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", *program, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False, **PIPES)

    lost = run("tests.chaos.fatal_part")
    assert lost.returncode == LostProcess.exit_code, lost.stderr
    assert part_name(FATAL) in lost.stderr
    parts = divide(ParquetDataset(tmp_path / "boxes.parquet").row_groups, 4)
    assert sorted(finished_parts(output)) == [part.number for part in parts if part.number != FATAL]
    again = run("mal_train.cli", "inference")
    assert again.returncode == SOME_FAILED, again.stderr
    assert as_json(output) == local_labels(tmp_path, tmp_path / "local")


def finished_parts(output: Path) -> list[int]:
    """Returns the number of each part in the journal, in its order."""
    path = journal_path(output)
    lines = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return [json.loads(line[9:])[0] for line in lines]


def listening_addresses(pids: list[int]) -> set[str]:
    """Returns the IPv4 addresses at which processes listen, IPv6 forms of them included."""
    inodes = set()
    for pid in pids:
        with suppress(OSError):
            inodes |= {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and f"socket:[{fields[9]}]" in inodes:
                address = fields[1].partition(":")[0]
                assert table == "tcp" or address.startswith(f"{'0' * 16}FFFF0000"), f"{address} is no IPv4 address"
                found.add(socket.inet_ntoa(bytes.fromhex(address[-8:])[::-1]))
    return found


def variables(pid: int) -> dict[str, str]:
    """Returns the environment with which a process was started."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}  # it has ended
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def is_running(pid: int) -> bool:
    """Returns False for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
