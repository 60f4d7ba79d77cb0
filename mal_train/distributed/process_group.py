"""What the processes of one training tell each other beside gradients: decisions, and messages for people.

Decisions and texts are small and go over the CPU (gloo), so that no device has to be waited for. Means of tensors go
where the tensors lie: on GPUs over NCCL, like the gradients, which are Lightning's work.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from torch import Tensor, distributed, nn

from mal_train.core.errors import LostProcess, MalError
from mal_train.distributed.env import DistributedEnv

PATIENCE = timedelta(hours=2)
"""How long one process waits for another that lives: as long as rank 0 may take to validate or to write."""
_OF_OTHERS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "socket")
"""What messages of a broken connection hold; torch raises plain RuntimeErrors for most of them."""


class Followed(SystemExit):
    """Ends a process whose reason rank 0 tells."""


class ProcessGroup:
    """The processes of a training, of which this is one; also for a process that is alone.

    Args:
        world: who this one is; None: the only one.
    """

    def __init__(self, world: DistributedEnv | None = None) -> None:
        self.world = world = world or DistributedEnv()
        self.rank = world.rank
        self.size = world.size
        self.is_first = world.is_first

    def any(self, here: bool) -> bool:
        """Whether it is true in any process."""
        if self.size == 1:
            return here
        flag = torch.tensor([int(here)])
        with lost_process():
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag.item())

    def share(self, value: Any) -> Any:
        """Rank 0's value, in every process; anything that JSON can write. The others' argument is without meaning."""
        if self.size == 1:
            return value
        return json.loads(self._texts([json.dumps(value)] if self.is_first else [])[0])

    def gather(self, here: Sequence[str]) -> list[str]:
        """The lines of all processes, in the order of their ranks."""
        return list(here) if self.size == 1 else self._texts(here)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes of a tensor on any device, as a new tensor."""
        if self.size == 1:
            return values
        total = values.clone()
        with lost_process():
            distributed.all_reduce(total)
        return total / self.size

    @torch.no_grad()
    def average_buffers(self, module: nn.Module) -> None:
        """Gives all processes the mean of a module's floating-point buffers (running statistics of norms)."""
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        if self.size == 1 or not buffers:
            return
        mean = self.mean(torch.cat([buffer.flatten() for buffer in buffers]))  # one message for all
        for buffer, part in zip(buffers, torch.split(mean, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def stop(self, error: MalError) -> NoReturn:
        """Ends all processes, which must have agreed to it; rank 0 raises the error, the others end in silence."""
        if self.is_first:
            raise error
        raise Followed(error.exit_code) from error

    def _texts(self, here: Sequence[str]) -> list[str]:
        """Lines of all processes as bytes of JSON: nothing is unpickled."""
        mine = torch.frombuffer(bytearray(json.dumps(list(here)).encode()), dtype=torch.uint8)
        with lost_process():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            distributed.all_gather(lengths, torch.tensor([len(mine)]))
            longest = int(max(lengths))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(mine)] = mine
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            distributed.all_gather(texts, padded)
        parts = [json.loads(bytes(text[: int(n)].tolist()).decode()) for text, n in zip(texts, lengths, strict=True)]
        return [line for part in parts for line in part]


@contextmanager
def init_process_group(world: DistributedEnv, *, cuda: bool) -> Iterator[ProcessGroup]:
    """Meets the other processes and stays with them inside the block; nothing to do for a process that is alone.

    Args:
        world: who this one is.
        cuda: whether gradients lie on GPUs.

    Raises:
        LostProcess: the others did not come, or one has gone.
    """
    if world.size == 1:
        yield ProcessGroup(world)
        return
    with lost_process():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"tcp://{world.address}:{world.port}",
            rank=world.rank,
            world_size=world.size,
            timeout=PATIENCE,
        )
    yield ProcessGroup(world)
    # Not after an error: taking leave of a process that has gone can wait for ever.
    distributed.destroy_process_group()


@contextmanager
def lost_process() -> Iterator[None]:
    """Says of a connection that breaks what it means. Other errors pass through."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, distributed.DistError) and not any(part in text.lower() for part in _OF_OTHERS):
            raise
        raise LostProcess(
            f"another process of this training has gone ({text.strip().splitlines()[0][:200]}); "
            "the same command goes on from the last checkpoint"
        ) from error


class Launched(ClusterEnvironment):
    """Tells Lightning what the launcher said, whichever it was; it then starts nothing itself.

    Args:
        world: who this process is.
    """

    def __init__(self, world: DistributedEnv) -> None:
        super().__init__()
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        """Always."""
        return True

    @property
    def main_address(self) -> str:
        """Host of rank 0."""
        return self._world.address

    @property
    def main_port(self) -> int:
        """Where rank 0 listens."""
        return self._world.port

    @staticmethod
    def detect() -> bool:
        """Never taken unasked."""
        return False

    def world_size(self) -> int:
        """Number of processes."""
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """The launcher has decided."""
        del size

    def global_rank(self) -> int:
        """Number of this process."""
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """The launcher has decided."""
        del rank

    def local_rank(self) -> int:
        """Its number on this machine."""
        return self._world.local_rank

    def node_rank(self) -> int:
        """Number of this machine."""
        return self._world.node_rank
