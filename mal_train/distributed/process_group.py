"""Collective operations of the training processes besides Lightning's gradients: decisions and messages.

Decisions and messages are small and go over the CPU (gloo), so that no process waits for its device. Tensors are
averaged on their own device: on GPUs over NCCL.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from torch import Tensor, distributed, nn

from mal_train.core.errors import LostProcess, MalError
from mal_train.distributed.env import DistributedEnv

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Upper bound for the time that rank 0 validates or writes a file while the other processes wait."""
_CONNECTION_ERRORS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "socket")
"""Parts of the messages of a broken connection; torch raises plain RuntimeErrors for most of them."""


class SilentExit(SystemExit):
    """Ends a process without a message, because rank 0 prints it."""


class ProcessGroup:
    """The processes that train together; also usable for a single process.

    Args:
        env: rank of this process; None: a single process.
    """

    def __init__(self, env: DistributedEnv | None = None) -> None:
        self.env = env = env or DistributedEnv()
        self.rank = env.rank
        self.world_size = env.world_size
        self.is_rank_zero = env.is_rank_zero

    def any(self, flag: bool) -> bool:
        """Returns True in all processes if the flag is set in one of them."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        with lost_process_errors():
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags.item())

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value in all processes; the argument of the others is ignored.

        Args:
            value: any value that JSON can represent.
        """
        if self.world_size == 1:
            return value
        return json.loads(self._all_gather_lines([json.dumps(value)] if self.is_rank_zero else [])[0])

    def all_gather(self, lines: Sequence[str]) -> list[str]:
        """Returns the lines of all processes, in the order of their ranks."""
        return list(lines) if self.world_size == 1 else self._all_gather_lines(lines)

    def mean(self, values: Tensor) -> Tensor:
        """Returns the mean over the processes of a tensor on any device, as a new tensor."""
        if self.world_size == 1:
            return values
        total = values.clone()
        with lost_process_errors():
            distributed.all_reduce(total)
        return total / self.world_size

    @torch.no_grad()
    def average_buffers(self, module: nn.Module) -> None:
        """Replaces the floating-point buffers of a module (running statistics of norms) with their mean."""
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        if self.world_size == 1 or not buffers:
            return
        mean = self.mean(torch.cat([buffer.flatten() for buffer in buffers]))  # one collective for all buffers
        for buffer, part in zip(buffers, torch.split(mean, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def abort(self, error: MalError) -> NoReturn:
        """Ends this process; all processes must call it. Rank 0 raises the error, the others exit without a message."""
        if self.is_rank_zero:
            raise error
        raise SilentExit(error.exit_code) from error

    def _all_gather_lines(self, lines: Sequence[str]) -> list[str]:
        """Gathers lines as JSON bytes, so that nothing is unpickled."""
        own = torch.frombuffer(bytearray(json.dumps(list(lines)).encode()), dtype=torch.uint8)
        with lost_process_errors():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
            distributed.all_gather(lengths, torch.tensor([len(own)]))
            longest = int(max(lengths))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(own)] = own
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
            distributed.all_gather(texts, padded)
        parts = [json.loads(bytes(text[: int(n)].tolist()).decode()) for text, n in zip(texts, lengths, strict=True)]
        return [line for part in parts for line in part]


@contextmanager
def init_process_group(env: DistributedEnv, *, cuda: bool) -> Iterator[ProcessGroup]:
    """Connects the processes inside the block; does nothing for a single process.

    Args:
        env: rank of this process.
        cuda: True if gradients are on GPUs.

    Raises:
        LostProcess: the other processes did not connect, or one has ended.
    """
    if env.world_size == 1:
        yield ProcessGroup(env)
        return
    with lost_process_errors():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"file://{env.store}" if env.store else f"tcp://{env.master_addr}:{env.master_port}",
            rank=env.rank,
            world_size=env.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    yield ProcessGroup(env)
    # Not after an error: with a process missing, this call can block forever.
    distributed.destroy_process_group()


@contextmanager
def lost_process_errors() -> Iterator[None]:
    """Raises LostProcess for the error of a broken connection; other errors pass through."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, distributed.DistError) and not any(
            part in text.lower() for part in _CONNECTION_ERRORS
        ):
            raise
        # Without gloo's position in its source, and without its advice.
        cause = re.sub(r"^\[[^\]]*\] ", "", text.strip().splitlines()[0]).partition(". ")[0]
        raise LostProcess(
            f"another process of this training has ended ({cause}); run the same command again to resume from the last "
            "checkpoint"
        ) from error


class ExternalLauncherEnvironment(ClusterEnvironment):
    """Lightning's view of processes that a launcher has started; Lightning then starts none.

    Args:
        env: rank of this process.
    """

    def __init__(self, env: DistributedEnv) -> None:
        super().__init__()
        self._env = env

    @property
    def creates_processes_externally(self) -> bool:
        """Returns True."""
        return True

    @property
    def main_address(self) -> str:
        """Host of rank 0."""
        return self._env.master_addr

    @property
    def main_port(self) -> int:
        """Port of rank 0."""
        return self._env.master_port

    @staticmethod
    def detect() -> bool:
        """Returns False: this environment is only used explicitly."""
        return False

    def world_size(self) -> int:
        """Returns the number of processes."""
        return self._env.world_size

    def set_world_size(self, size: int) -> None:
        """Does nothing; the launcher sets it."""
        del size

    def global_rank(self) -> int:
        """Returns the rank of this process."""
        return self._env.rank

    def set_global_rank(self, rank: int) -> None:
        """Does nothing; the launcher sets it."""
        del rank

    def local_rank(self) -> int:
        """Returns the rank of this process on its machine."""
        return self._env.local_rank

    def node_rank(self) -> int:
        """Returns the index of this machine."""
        return self._env.node_rank
