"""Which process of a training this is, as its launcher says: torchrun, SLURM's srun, `mal-train` itself, or none.

Reads environment variables and nothing else; no torch, so that the command can decide before it loads anything.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mal_train.core.errors import ConfigError

Launcher = Literal["none", "mal-train", "torchrun", "SLURM"]

LAUNCHED = "MAL_TRAIN_LAUNCHED"
"""Set in the environment of the processes that `mal-train` starts itself."""
DEFAULT_PORT = 29500
_SLURM_SHELLS = ("bash", "interactive")
"""Names of SLURM jobs in which somebody sits at a prompt: not a step that srun started."""


@dataclass(frozen=True)
class DistributedEnv:
    """The processes of one training, and this one's place among them.

    Attributes:
        rank: number of this process among all, from 0.
        size: how many processes there are.
        local_rank: its number on this machine.
        node_rank: number of this machine.
        launcher: who started it; `none` where it stands alone.
        address: host of rank 0.
        port: where rank 0 listens for the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node_rank: int = 0
    launcher: Launcher = "none"
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and speaks to people."""
        return self.rank == 0

    def check(self, processes: int, nodes: int) -> None:
        """ConfigError unless the launcher started as many processes as the spec asks for, alike on each machine."""
        if self.size != processes * nodes:
            started = f"{self.launcher} started {self.size}" if self.launcher != "none" else "there is 1"
            raise ConfigError(
                f"train.num_gpus {processes} on each of train.num_nodes {nodes} makes {processes * nodes} processes, "
                f"but {started}; make the two agree"
            )
        if self.local_rank >= processes:
            raise ConfigError(
                f"{self.launcher} started more than train.num_gpus {processes} processes on a machine; start as many "
                "on each (SLURM: --ntasks-per-node)"
            )


def world_of(environment: Mapping[str, str] = os.environ) -> DistributedEnv:
    """This process's place.

    torchrun and `mal-train` set RANK, LOCAL_RANK and WORLD_SIZE; srun sets SLURM_PROCID, SLURM_LOCALID and
    SLURM_NTASKS. A SLURM job of one task is a process that stands alone.

    Raises:
        ConfigError: a variable is missing or no number.
    """
    if LAUNCHED in environment or "TORCHELASTIC_RUN_ID" in environment:
        return DistributedEnv(
            rank=number_in(environment, "RANK"),
            size=number_in(environment, "WORLD_SIZE"),
            local_rank=number_in(environment, "LOCAL_RANK"),
            node_rank=number_in(environment, "GROUP_RANK", 0),
            launcher="mal-train" if LAUNCHED in environment else "torchrun",
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=number_in(environment, "MASTER_PORT", DEFAULT_PORT),
        )
    if (
        "SLURM_PROCID" in environment
        and number_in(environment, "SLURM_NTASKS", 1) > 1
        and environment.get("SLURM_JOB_NAME") not in _SLURM_SHELLS
    ):
        return DistributedEnv(
            rank=number_in(environment, "SLURM_PROCID"),
            size=number_in(environment, "SLURM_NTASKS"),
            local_rank=number_in(environment, "SLURM_LOCALID"),
            node_rank=number_in(environment, "SLURM_NODEID", 0),
            launcher="SLURM",
            address=environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_NODELIST", "127.0.0.1")),
            port=number_in(environment, "MASTER_PORT", 15000 + number_in(environment, "SLURM_JOB_ID", 0) % 10000),
        )
    return DistributedEnv()


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compact list.

    >>> first_host("gpu[003-005,9],cpu1"), first_host("a,b"), first_host("alone"), first_host("r[1-2]n[3-4]")
    ('gpu003', 'a', 'alone', 'r1n3')
    """
    # Commas inside brackets do not part hosts.
    host = re.split(r",(?![^\[]*\])", nodelist, maxsplit=1)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", host)


def number_in(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A variable that holds a number; ConfigError where it holds something else, or is missing without a default."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ConfigError(f"environment variable {name}: {text!r}; a launcher sets it to a number")
    return int(text)
