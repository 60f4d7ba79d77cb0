"""A Ray cluster of several nodes on loopback, whose processes a test may kill.

`RayNodes` runs this module as a process: `import ray` reads the environment, and must not see that of the tests. It
prints the address of the cluster, and for each line with a number of CPUs that it reads, the process of a new node. All
nodes end with it.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.paths import ROOT

PATHS = [str(ROOT / folder) for folder in ("", "clients", "protos")]
STORE_BYTES = 80 << 20
"""Object store of a node, about the least that Ray accepts."""


class RayNodes:
    """A cluster with a head node without CPUs. A context manager that ends all its processes.

    Attributes:
        address: HOST:PORT of the head node.
        environment: of commands that connect to the cluster.
    """

    def __init__(self) -> None:
        # Short: the paths of Unix sockets below it may have 107 characters.
        self._folder = tempfile.mkdtemp(prefix="mal-", dir="/tmp")
        (Path(self._folder) / "ray").mkdir()
        self.environment = os.environ | {
            "RAY_TMPDIR": self._folder,
            "PYTHONPATH": os.pathsep.join(PATHS),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback alone
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.address = ""

    def __enter__(self) -> Self:
        with (Path(self._folder) / "stderr").open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.ray_nodes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self.environment,
                cwd=ROOT,
                start_new_session=True,
            )
        try:
            self.address = str(self._answer())
        except BaseException:  # whatever it is, no process remains
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills all processes."""
        for pid in descendants(self._process.pid):
            kill(pid)
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, cpus: int) -> int:
        """Starts a node; returns the id of its raylet, the parent of its actors."""
        assert self._process.stdin is not None
        print(cpus, file=self._process.stdin, flush=True)
        return int(self._answer())

    def processes(self) -> list[int]:
        """Returns the ids of all processes of the cluster."""
        return [self._process.pid, *descendants(self._process.pid)]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (Path(self._folder) / "stderr").read_text()
        return json.loads(line)


def kill_node(raylet: int) -> int:
    """Kills the processes of a node; returns their number."""
    pids = [raylet, *descendants(raylet)]
    for pid in pids:
        kill(pid)
    return len(pids)


def kill(pid: int) -> None:
    """Kills a process, which may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Returns the ids of the children of a process, of their children, and so on."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def resident_bytes(pids: list[int]) -> int:
    """Returns the memory of processes, with what they share divided among them."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += 1024 * int(text.partition("\nPss:")[2].split()[0])
    return total


def run() -> None:
    """Runs a cluster until standard input ends."""
    from ray.cluster_utils import Cluster

    answers = sys.stdout
    options: dict[str, Any] = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    with redirect_stdout(sys.stderr):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **options})
        print(json.dumps(cluster.address), file=answers, flush=True)
        for line in sys.stdin:
            node = cluster.add_node(num_cpus=int(line), **options)
            (raylet,) = node.all_processes["raylet"]
            print(json.dumps(raylet.process.pid), file=answers, flush=True)


if __name__ == "__main__":
    run()
