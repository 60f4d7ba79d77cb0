"""Training processes forked from a test: they need no imports, and inherit its monkeypatches."""

import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mal_train import cli
from mal_train.distributed.env import LAUNCHED, STORE

Rank = multiprocessing.context.ForkProcess


def _train(rank: int, size: int, store: str, arguments: list[str]) -> None:
    # The OpenMP thread pool does not survive a fork.
    torch.set_num_threads(1)
    os.environ |= {
        LAUNCHED: str(os.getppid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        STORE: store,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    sys.exit(cli.main(arguments))


@contextmanager
def training_processes(overrides: Sequence[str], folder: Path, size: int = 2) -> Iterator[list[Rank]]:
    """Starts `size` processes that train together on the CPU, and kills running ones at the end of the block."""
    spec = folder / "empty.yaml"
    spec.write_text("")
    arguments = ["train", "-e", str(spec), *overrides, f"train.num_gpus={size}", "train.gpu_ids=[]"]
    context = multiprocessing.get_context("fork")
    store = os.path.join(tempfile.mkdtemp(dir=folder), "store")
    ranks = [context.Process(target=_train, args=(rank, size, store, arguments)) for rank in range(size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks in a process with threads
        for rank in ranks:
            rank.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def exit_codes(ranks: Sequence[Rank], within_s: float = 240.0) -> list[int | None]:
    """Returns the exit codes by rank; None for a process that still runs after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    return [rank.exitcode for rank in ranks]


def train_together(overrides: Sequence[str], folder: Path, size: int = 2) -> list[int | None]:
    """Trains in `size` processes and returns their exit codes by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with training_processes(overrides, folder, size) as ranks:
        return exit_codes(ranks)


def wait_for(condition: Callable[[], bool], within_s: float = 240.0) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
