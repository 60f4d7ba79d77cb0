"""Runs a training as several processes on this machine, with the process layer of torchrun.

`torch.distributed.launcher`, one layer up, does not fit. After a signal it reports no exit codes of the processes, so a
failed save would look like a successful one (143). By default it kills them 30 s after the signal, while an
optimizer step and its checkpoint may take longer.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.utils.distributed import get_free_port

from mal_train.distributed.env import LAUNCHED

GRACE_S = 10
"""Seconds between SIGTERM and SIGKILL for the other processes after one has ended with an error."""
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


def launch(
    arguments: Sequence[str], num_processes: int, *, program: Sequence[str] = (sys.executable, "-m", "mal_train.cli")
) -> int:
    """Runs `mal-train ARGUMENTS` as processes that train together, and returns the exit code of the training.

    SIGTERM and SIGINT are forwarded. When one process ends with an error, the others are ended within `GRACE_S`.

    Args:
        arguments: of the command, without the name of the program.
        num_processes: number of processes.
        program: the program and its first arguments.

    Returns:
        0 if all processes succeeded; else the exit code of the first one that failed, or 128 + n if signal n killed it.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    executable, *options = (*program, *arguments)
    processes = _Processes(
        name="mal-train",
        entrypoint=executable,
        args=dict.fromkeys(range(num_processes), tuple(options)),
        envs=_environments(num_processes),
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    try:
        with _forwarded_signals(processes):
            result = processes.wait(period=_POLL_S)
    except SignalException as early:  # during the start, from torch's own handler
        return 128 + early.sigval
    finally:
        processes.close(signal.SIGKILL)
    assert result is not None
    return _exit_code(result.failures, num_processes)


def end_with_parent() -> None:
    """Asks the kernel to send SIGTERM to this process when its parent dies, even if SIGKILL ends the parent."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before the call
        os.kill(os.getpid(), signal.SIGTERM)


def free_port() -> int:
    """Returns a TCP port that is not in use at the moment."""
    return int(get_free_port())  # type: ignore[no-untyped-call]


class _Processes(SubprocessContext):
    """Processes that get `GRACE_S` to end, instead of torch's 30 s."""

    def close(self, death_sig: signal.Signals | None = None, timeout: int | None = None) -> None:
        super().close(death_sig, GRACE_S if timeout is None else timeout)


def _environments(num_processes: int) -> dict[int, dict[str, str]]:
    """Returns the variables that each process gets in addition to those of this one."""
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    shared = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # The host name of a machine may not resolve.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(free_port()),
        "WORLD_SIZE": str(num_processes),
        LAUNCHED: "1",
    }
    return {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)}


@contextlib.contextmanager
def _forwarded_signals(processes: _Processes) -> Iterator[None]:
    """Starts the processes, and forwards SIGTERM and SIGINT to them inside the block.

    Replaces the handlers that torch installs at the start: they raise an exception, and override nohup's for SIGHUP.
    """

    def forward(number: int, _: object) -> None:
        for handler in processes.subprocess_handlers.values():
            if handler.proc.poll() is None:
                handler.proc.send_signal(number)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    previous = {number: signal.getsignal(number) for number in signals}
    try:
        processes.start()
        for number in signals:
            signal.signal(number, forward if number in {signal.SIGTERM, signal.SIGINT} else previous[number])
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exit_code(failures: dict[int, ProcessFailure], num_processes: int) -> int:
    """Returns the exit code of the training, given the failed processes in the order in which they ended."""
    if not failures:
        return 0
    rank, first = next(iter(failures.items()))
    if first.exitcode in {130, 143}:  # interrupted, or terminated after saving: all processes or it failed
        return first.exitcode if {failure.exitcode for failure in failures.values()} == {first.exitcode} else 1
    ending = f"was killed by {first.signal_name()}" if first.exitcode < 0 else f"ended with code {first.exitcode}"
    text = f"mal-train: process {rank} of {num_processes} {ending}; the other processes were ended"
    print(text, file=sys.stderr, flush=True)
    return 128 - first.exitcode if first.exitcode < 0 else first.exitcode
