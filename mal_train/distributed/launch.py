"""Starts the processes of a training on this machine and waits for them. Imports no torch.

torchrun's process class, `torch.distributed.elastic.multiprocessing.SubprocessContext`, does not fit: five of its nine
methods (`start`, `_start`, `_poll`, `_capture_process_failures`, `wait`) would have to be replaced, three of them
private. Its signal handler raises an exception, which leaves a process behind when a signal arrives during the start.
It gives all processes the same time to end, although a checkpoint may take longer than a failure deserves. It returns
no exit code of a process that was ended with code 0, and it starts two threads per process that follow a log file.
`torch.distributed.launcher`, one layer up, returns no exit codes after a signal, so a failed save would look like a
successful one (143).
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from mal_train.distributed.env import LAUNCHED, STORE

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL for the other processes after one has failed."""
SAVE_GRACE_S = 120.0
"""Seconds until SIGKILL for the other processes after one has ended with 130 or 143; a checkpoint may take so long."""
_ENDED_BY_SIGNAL = (130, 143)
"""Exit codes of a process that was interrupted, or terminated after saving."""
_KILL_S = 10.0
"""Maximum wait in seconds after SIGKILL; a process inside a hung device driver does not end."""
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1

Processes = Sequence["subprocess.Popen[bytes]"]


def launch(
    arguments: Sequence[str], num_processes: int, *, program: Sequence[str] = (sys.executable, "-m", "mal_train.cli")
) -> int:
    """Runs `mal-train ARGUMENTS` as processes that train together, and returns the exit code of the training.

    SIGTERM and SIGINT are forwarded, after the start if they arrive during it. When a process fails, the others get
    SIGTERM and, `GRACE_S` later, SIGKILL. When a process ends with 130 or 143, the others get SIGKILL after
    `SAVE_GRACE_S`.

    Args:
        arguments: of the command, without the name of the program.
        num_processes: number of processes.
        program: the program and its first arguments.

    Returns:
        0 if all processes succeeded; else the exit code of the first one that failed, or 128 + n if signal n killed it;
        but 1 if that code is 130 or 143 and another process ended with a different one.
    """
    processes: list[subprocess.Popen[bytes]] = []
    # The processes find one another through a file that only this account may open. A TCP store would listen on every
    # interface, without authentication.
    with recorded_signals() as signals, tempfile.TemporaryDirectory(prefix="mal-train-") as folder:
        try:
            for variables in _environments(num_processes, os.path.join(folder, "store")):
                # In a session of its own, a process gets a signal to the launcher's process group once: from here.
                started = subprocess.Popen([*program, *arguments], env=os.environ | variables, start_new_session=True)
                processes.append(started)
            return _exit_code_of(processes, signals)
        finally:
            _kill(processes)


def end_with_parent(parent: str) -> None:
    """Asks the kernel to send SIGTERM to this process when its parent dies, even if SIGKILL ends the parent.

    Sends SIGTERM to this process if the parent is dead already.

    Args:
        parent: process id of the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if str(os.getppid()) != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def free_port() -> int:
    """Returns a TCP port of the loopback interface that is not in use at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _environments(num_processes: int, store: str) -> list[dict[str, str]]:
    """Returns the variables that each process gets in addition to those of this one."""
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    shared = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # The host name of a machine may not resolve.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo"),
        STORE: store,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(free_port()),
        "WORLD_SIZE": str(num_processes),
        LAUNCHED: str(os.getpid()),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


@contextlib.contextmanager
def recorded_signals() -> Iterator[list[int]]:
    """Yields a list to which SIGTERM and SIGINT are appended inside the block.

    The handler does nothing else. An exception from it could hide a process that has just started.
    """
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exit_code_of(processes: Processes, signals: list[int]) -> int:
    """Waits for the processes, and returns the exit code of the training."""
    failure = _first_failure(processes, signals)
    if failure is None:
        return 0
    rank, code = failure
    if code in _ENDED_BY_SIGNAL:
        _wait(processes, SAVE_GRACE_S, signals)
        return code if {process.poll() for process in processes} == {code} else 1
    ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    text = f"mal-train: process {rank} of {len(processes)} {ending}; the other processes get SIGTERM"
    print(text, file=sys.stderr, flush=True)
    _forward([signal.SIGTERM], processes)
    _wait(processes, GRACE_S, signals)
    return 128 - code if code < 0 else code


def _first_failure(processes: Processes, signals: list[int]) -> tuple[int, int] | None:
    """Waits until a process fails, and returns its rank and exit code; None if all succeed."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank, code
        if None not in codes:
            return None
        _forward(signals, processes)
        time.sleep(_POLL_S)


def _wait(processes: Processes, seconds: float, signals: list[int]) -> None:
    """Waits until all processes have ended, but no longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        _forward(signals, processes)
        time.sleep(_POLL_S)


def _forward(signals: list[int], processes: Processes) -> None:
    """Sends the signals to the processes that still run, and empties the list."""
    while signals:
        number = signals.pop(0)
        for process in processes:
            process.send_signal(number)


def _kill(processes: Processes) -> None:
    """Kills the processes that still run, with their data loaders."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _wait(processes, _KILL_S, [])
