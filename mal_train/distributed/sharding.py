"""FSDP with `.malckpt` checkpoints: rank 0 gathers and encrypts the full state, instead of a pickle per process.

Student and teacher are sharded alike, so that every process holds the same shards of both and updates the teacher in
place.
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


class FullStateFSDP(FSDPStrategy):
    """Lightning's FSDP strategy, with its CheckpointIO used for reading too; Lightning uses it for writing only.

    Args:
        network: the network to train; its blocks are the FSDP units, gathered one at a time.
        environment: rank of this process.
        timeout: of collective operations.
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
        """Reads the file in every process, and keeps the shards of weights and optimizer state of this one."""
        del weights_only
        assert self.model is not None
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path)
        full_state = FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=False),
            FullOptimStateDictConfig(rank0_only=False),
        )
        with full_state:
            self.model.load_state_dict(checkpoint.pop("state_dict"))
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                by_name = FullyShardedDataParallel.rekey_optim_state_dict(
                    state, OptimStateKeyType.PARAM_NAME, self.model
                )
                optimizer.load_state_dict(
                    FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, by_name)
                )
        return checkpoint
