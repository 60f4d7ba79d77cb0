"""Makes labelers from checkpoints."""

from pathlib import Path

import torch

from mal_train.core.errors import CheckpointError
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint
from mal_train.kernel.checkpoint.keys import DecryptionKey
from mal_train.kernel.checkpoint.trust import NO_POLICY, TrustPolicy
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.networks.network import MalNetwork
from mal_train.kernel.networks.precision import Precision


def load_labeler(
    path: Path,
    *,
    key: DecryptionKey | None = None,
    device: str | torch.device = "cpu",
    precision: Precision | str = Precision.AUTO,
    trust: TrustPolicy = NO_POLICY,
) -> tuple[Labeler, Checkpoint]:
    """Loads a checkpoint; returns a labeler, and the checkpoint for its categories and provenance.

    Args:
        path: checkpoint file, with or without training state.
        key: decryption key; None for a plain file, and only for one.
        device: torch device.
        precision: dtype of the forward pass; see `Labeler`.
        trust: SHA-256 or signers that the file must have.

    Raises:
        CheckpointError: see `load_checkpoint`.
        ConfigError: float16 on a CPU.
    """
    checkpoint = load_checkpoint(path, key, skip_training_state=True, trust=trust)
    return build_labeler(checkpoint, device=device, precision=precision), checkpoint


def build_labeler(
    checkpoint: Checkpoint, *, device: str | torch.device = "cpu", precision: Precision | str = Precision.AUTO
) -> Labeler:
    """Returns a labeler with a checkpoint's weights; on the CPU, it shares their memory.

    Args:
        checkpoint: the checkpoint.
        device: see `Labeler`.
        precision: see `Labeler`.

    Raises:
        CheckpointError: the weights are not those of the network that the settings describe.
        ConfigError: float16 on a CPU.
    """
    try:
        network = MalNetwork.from_weights(checkpoint.model, checkpoint.weights)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path or 'checkpoint'}: {error}") from None
    return Labeler(network, checkpoint.labeler, device=device, precision=precision)
