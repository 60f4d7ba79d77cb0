"""Several training processes for a test, forked from it: no imports to wait for, and its patches hold in them, too."""

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mal_train import cli
from mal_train.distributed.env import LAUNCHED
from mal_train.distributed.launch import free_port

Rank = multiprocessing.context.ForkProcess


def _train(rank: int, size: int, port: int, arguments: list[str]) -> None:
    # The pool of OpenMP threads did not survive the fork.
    torch.set_num_threads(1)
    os.environ |= {
        LAUNCHED: "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    sys.exit(cli.main(arguments))


@contextmanager
def training_processes(overrides: Sequence[str], folder: Path, size: int = 2) -> Iterator[list[Rank]]:
    """`size` processes that train together on the CPU; those that are left are killed at the end of the block."""
    spec = folder / "empty.yaml"
    spec.write_text("")
    arguments = ["train", "-e", str(spec), *overrides, f"train.num_gpus={size}", "train.gpu_ids=[]"]
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [context.Process(target=_train, args=(rank, size, port, arguments)) for rank in range(size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        for rank in ranks:
            rank.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def exit_codes(ranks: Sequence[Rank], within_s: float = 240.0) -> list[int | None]:
    """How they ended, in order; None for one that still runs after the time."""
    until = time.monotonic() + within_s
    for rank in ranks:
        rank.join(max(0.0, until - time.monotonic()))
    return [rank.exitcode for rank in ranks]


def train_together(overrides: Sequence[str], folder: Path, size: int = 2) -> list[int | None]:
    """Exit codes of a whole training."""
    folder.mkdir(parents=True, exist_ok=True)
    with training_processes(overrides, folder, size) as ranks:
        return exit_codes(ranks)


def wait_for(condition: Callable[[], bool], within_s: float = 240.0) -> None:
    """Until it holds."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
