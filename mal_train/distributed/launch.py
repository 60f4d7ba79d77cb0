"""Starts the processes of a training on this machine and watches them. No torch: it only waits.

One process that fails ends them all within seconds: the others would wait for it, each in a different place. They are
asked first (SIGTERM) and then killed. If this process itself is killed, the kernel tells its children to save and end.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mal_train.core.errors import ConfigError
from mal_train.distributed.env import LAUNCHED, number_in

GRACE_S = 10.0
"""Time between asking the others to end and killing them, after one has failed."""
SAVING_S = 120.0
"""Time that the others get where one ended as SIGTERM wants it: after saving, as they all do."""
ORDERLY = (130, 143)
"""Exit codes of processes that were asked to end."""
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


def run_ranks(
    arguments: Sequence[str],
    processes: int,
    *,
    nodes: int = 1,
    environment: Mapping[str, str] = os.environ,
    program: Sequence[str] = (sys.executable, "-m", "mal_train.cli"),
    grace_s: float = GRACE_S,
) -> int:
    """Runs `mal-train ARGUMENTS` as `processes` processes and returns the exit code of the training.

    SIGTERM and SIGINT are passed on. The code is 0 when all ended well, else that of the process that failed first
    (128 + its number for one that a signal killed).

    Args:
        arguments: of the command, without the program's name.
        processes: on this machine.
        nodes: machines that take part; more than one need NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment.
        environment: of the processes, before the variables that tell each who it is.
        program: what is run.
        grace_s: how long the others may take to end after one has failed.

    Raises:
        ConfigError: several machines, and nothing, or no number, says which one this is.
    """
    absent = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if nodes > 1 and name not in environment]
    if absent:
        raise ConfigError(
            f"train.num_nodes {nodes}: start the command on each machine with torchrun or srun, or set "
            f"{', '.join(absent)} (docs/distributed.md has the lines)"
        )
    node = number_in(environment, "NODE_RANK", 0)
    shared = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)),
        # Processes of one machine find each other even where its own name resolves to nothing.
        **({"GLOO_SOCKET_IFNAME": "lo"} if nodes == 1 else {}),
        **environment,
        LAUNCHED: "1",
        "WORLD_SIZE": str(processes * nodes),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": environment.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(free_port()),
    }
    command = [*program, *arguments]
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    with _passing_on(ranks):
        try:
            for local in range(processes):
                rank = node * processes + local
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(local)}
                # A group of its own: a signal to the whole group reaches it once, from here, and its loaders never.
                ranks[rank] = subprocess.Popen(command, env=own, process_group=0)
            return _watch(ranks, grace_s)
        finally:
            _end(ranks.values(), 0.0)


def tie_to_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when the one that started it dies."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _watch(ranks: Mapping[int, "subprocess.Popen[bytes]"], grace_s: float) -> int:
    first: tuple[int, int] | None = None
    while first is None:
        codes = {rank: process.poll() for rank, process in ranks.items()}
        first = next(((rank, code) for rank, code in codes.items() if code), None)
        if all(code == 0 for code in codes.values()):
            return 0
        if first is None:
            time.sleep(_POLL_S)
    rank, code = first
    if code not in ORDERLY:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        print(f"mal-train: process {rank} of {len(ranks)} {how}; ending the others", file=sys.stderr, flush=True)
        _end(ranks.values(), grace_s)
        return 128 - code if code < 0 else code
    # Those that were asked to end do so together, after rank 0 has saved.
    _wait(ranks.values(), SAVING_S)
    return code if {process.poll() for process in ranks.values()} == {code} else 1


def _end(processes: "Iterable[subprocess.Popen[bytes]]", grace_s: float) -> None:
    """Ask all that still run to end, and kill those that do not within the time."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM if grace_s else signal.SIGKILL)
    _wait(running, grace_s)
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait(processes: "Iterable[subprocess.Popen[bytes]]", seconds: float) -> None:
    until = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))


@contextlib.contextmanager
def _passing_on(ranks: "Mapping[int, subprocess.Popen[bytes]]") -> Iterator[None]:
    """Passes SIGTERM and SIGINT on to the processes inside the block."""

    def pass_on(number: int, frame: object) -> None:
        del frame
        for process in ranks.values():
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
