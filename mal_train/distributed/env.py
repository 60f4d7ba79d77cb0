"""Reads the rank of this process from the variables of its launcher: `mal-train`, torchrun, SLURM's srun, or none.

Imports no torch, so that the command can decide what to do before it loads anything.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mal_train.core.errors import ConfigError

Launcher = Literal["none", "mal-train", "torchrun", "SLURM"]

LAUNCHED = "MAL_TRAIN_LAUNCHED"
"""Environment variable of the processes that `mal-train` starts: the process id of the launcher."""
TUNER = "MAL_TRAIN_TUNER"
"""Environment variable of the trials that `mal-train tune` starts: the process id of the tuner."""
STORE = "MAL_TRAIN_STORE"
"""Environment variable of the processes that `mal-train` starts: the file through which they find one another."""
DEFAULT_PORT = 29500
_INTERACTIVE_JOBS = ("bash", "interactive")
"""Names of SLURM jobs that are shells: their SLURM variables do not describe a step that srun started."""


@dataclass(frozen=True)
class DistributedEnv:
    """Rank of this process and address of rank 0.

    Attributes:
        rank: index among all processes.
        world_size: number of processes.
        local_rank: index among the processes of this machine.
        node_rank: index of this machine.
        launcher: program that started the processes; `none` for a single process.
        master_addr: host of rank 0.
        master_port: port on which rank 0 listens for the others, unless there is a store.
        store: file through which the processes of one machine find one another; empty: over `master_addr`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node_rank: int = 0
    launcher: Launcher = "none"
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    store: str = ""

    @property
    def is_rank_zero(self) -> bool:
        """True in the process that writes files and prints messages."""
        return self.rank == 0

    def check(self, num_gpus: int, num_nodes: int) -> None:
        """Raises ConfigError unless the launcher started `num_gpus` processes on each of `num_nodes` machines."""
        if self.world_size != num_gpus * num_nodes:
            raise ConfigError(
                f"train.num_gpus {num_gpus} x train.num_nodes {num_nodes}: {num_gpus * num_nodes} processes, but the "
                f"launcher ({self.launcher}) started {self.world_size}; start as many as the spec says"
            )
        if self.local_rank >= num_gpus:
            raise ConfigError(
                f"local rank {self.local_rank}: the launcher ({self.launcher}) started more than train.num_gpus "
                f"{num_gpus} processes on this machine; start the same number on each (SLURM: --ntasks-per-node)"
            )


def read_distributed_env(environment: Mapping[str, str] = os.environ) -> DistributedEnv:
    """Reads the rank of this process.

    torchrun and `mal-train` set RANK, LOCAL_RANK and WORLD_SIZE; srun sets SLURM_PROCID, SLURM_LOCALID and
    SLURM_NTASKS. A SLURM job with one task counts as a single process.

    Raises:
        ConfigError: a variable is missing or not a number.
    """
    if LAUNCHED in environment or "TORCHELASTIC_RUN_ID" in environment:
        return DistributedEnv(
            rank=_integer(environment, "RANK"),
            world_size=_integer(environment, "WORLD_SIZE"),
            local_rank=_integer(environment, "LOCAL_RANK"),
            node_rank=_integer(environment, "GROUP_RANK", 0),
            launcher="mal-train" if LAUNCHED in environment else "torchrun",
            master_addr=environment.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_integer(environment, "MASTER_PORT", DEFAULT_PORT),
            store=environment.get(STORE, "") if LAUNCHED in environment else "",
        )
    if _is_srun_step(environment):
        return DistributedEnv(
            rank=_integer(environment, "SLURM_PROCID"),
            world_size=_integer(environment, "SLURM_NTASKS"),
            local_rank=_integer(environment, "SLURM_LOCALID"),
            node_rank=_integer(environment, "SLURM_NODEID", 0),
            launcher="SLURM",
            master_addr=environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_NODELIST", "127.0.0.1")),
            master_port=_integer(environment, "MASTER_PORT", 15000 + _integer(environment, "SLURM_JOB_ID", 0) % 10000),
        )
    return DistributedEnv()


def first_host(nodelist: str) -> str:
    """Returns the first host of SLURM's compact host list.

    >>> first_host("gpu[003-005,9],cpu1"), first_host("a,b"), first_host("alone"), first_host("r[1-2]n[3-4]")
    ('gpu003', 'a', 'alone', 'r1n3')
    """
    # Commas inside brackets do not separate hosts.
    host = re.split(r",(?![^\[]*\])", nodelist, maxsplit=1)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", host)


def _is_srun_step(environment: Mapping[str, str]) -> bool:
    return (
        "SLURM_PROCID" in environment
        and _integer(environment, "SLURM_NTASKS", 1) > 1
        and environment.get("SLURM_JOB_NAME") not in _INTERACTIVE_JOBS
    )


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ConfigError(f"environment variable {name}: {text!r}; a launcher sets it to a number")
    return int(text)
