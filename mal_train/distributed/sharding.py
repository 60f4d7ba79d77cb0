"""FSDP whose checkpoints are ours: the whole state gathered to rank 0 and sealed, instead of a pickle for each process.

Student and teacher are cut alike, so that every process holds the same parts of both and the teacher follows in place.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    StateDictType,
)

from mal_train.kernel.networks.network import MalNetwork, MaskNetwork


class SealedFSDP(FSDPStrategy):
    """Lightning's FSDP, reading through its CheckpointIO too (it writes a gathered state through it already).

    Args:
        network: what will be trained; its blocks are the units that are gathered one at a time.
        environment: which process this is.
        timeout: how long one process waits for another.
    """

    def __init__(self, network: MalNetwork, environment: ClusterEnvironment, timeout: timedelta) -> None:
        blocks = {type(block) for block in network.student.backbone.get_submodule("blocks").children()}
        super().__init__(
            cluster_environment=environment,
            timeout=timeout,
            auto_wrap_policy={MaskNetwork, *blocks},
            state_dict_type="full",
        )

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Opens the file in every process, and keeps of weights and optimizer what belongs to this one."""
        del weights_only
        assert self.model is not None
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path)
        whole = FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=False),
            FullOptimStateDictConfig(rank0_only=False),
        )
        with whole:
            self.model.load_state_dict(checkpoint.pop("state_dict"))
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                by_name = FullyShardedDataParallel.rekey_optim_state_dict(
                    state, OptimStateKeyType.PARAM_NAME, self.model
                )
                optimizer.load_state_dict(
                    FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, by_name)
                )
        return checkpoint
