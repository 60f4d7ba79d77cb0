"""Makes labelers from checkpoints."""

from pathlib import Path

import torch

from mal_train.core.errors import CheckpointError, ConfigError
from mal_train.core.settings import LabelerConfig, NetworkEngine, Precision
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint
from mal_train.kernel.checkpoint.keys import DecryptionKey
from mal_train.kernel.checkpoint.trust import NO_POLICY, TrustPolicy
from mal_train.kernel.labeler.labeler import Labeler, compute_dtype
from mal_train.kernel.labeler.openvino_engine import OpenVinoEngine
from mal_train.kernel.networks.network import MalNetwork
from mal_train.kernel.networks.quantization import Int8Calibration


def load_labeler(
    path: Path,
    *,
    key: DecryptionKey | None = None,
    device: str | torch.device = "cpu",
    precision: Precision | str = Precision.AUTO,
    network_engine: NetworkEngine | str = NetworkEngine.TORCH,
    trust: TrustPolicy = NO_POLICY,
) -> tuple[Labeler, Checkpoint]:
    """Loads a checkpoint; returns a labeler, and the checkpoint for its categories and provenance.

    Args:
        path: checkpoint file, with or without training state.
        key: decryption key; None for a plain file, and only for one.
        device: torch device.
        precision: dtype of the forward pass; see `Labeler`.
        network_engine: what runs the networks.
        trust: SHA-256 or signers that the file must have.

    Raises:
        CheckpointError: see `load_checkpoint`.
        ConfigError: see `labeler_of`.
    """
    checkpoint = load_checkpoint(path, key, skip_training_state=True, trust=trust)
    labeler = build_labeler(checkpoint, device=device, precision=precision, network_engine=network_engine)
    return labeler, checkpoint


def build_labeler(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    precision: Precision | str = Precision.AUTO,
    network_engine: NetworkEngine | str = NetworkEngine.TORCH,
) -> Labeler:
    """Returns a labeler with a checkpoint's weights; on the CPU, it shares their memory.

    Args:
        checkpoint: the checkpoint.
        device: see `Labeler`.
        precision: see `Labeler`.
        network_engine: what runs the networks.

    Raises:
        CheckpointError: the weights are not those of the network that the settings describe.
        ConfigError: see `labeler_of`.
    """
    try:
        network = MalNetwork.from_weights(checkpoint.model, checkpoint.weights)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path or 'checkpoint'}: {error}") from None
    return labeler_of(
        network,
        checkpoint.labeler,
        calibration_of(checkpoint.sha256, checkpoint.int8),
        device=device,
        precision=precision,
        network_engine=network_engine,
    )


def calibration_of(sha256: str, stored: Int8Calibration | None) -> Int8Calibration | None:
    """Returns the ranges for int8 that a checkpoint stores, or that the package has for its own model.

    Args:
        sha256: SHA-256 of the file of the checkpoint, in hex.
        stored: ranges that the checkpoint stores.
    """
    if stored is None and sha256 == builtin.SHA256:
        return Int8Calibration.from_dict(builtin.int8_calibration())
    return stored


def labeler_of(
    network: MalNetwork,
    config: LabelerConfig,
    int8: Int8Calibration | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: Precision | str = Precision.AUTO,
    network_engine: NetworkEngine | str = NetworkEngine.TORCH,
) -> Labeler:
    """Returns a labeler with a given network, which `network_engine` runs.

    Args:
        network: see `Labeler`.
        config: see `Labeler`.
        int8: the checkpoint's calibration; for precision int8 alone.
        device: see `Labeler`.
        precision: see `Labeler`.
        network_engine: what runs the network.

    Raises:
        ConfigError: the engine is not installed, or does not run on this device or in this precision.
    """
    if NetworkEngine(network_engine) is NetworkEngine.TORCH:
        return Labeler(network, config, device=device, precision=precision)
    dtype = compute_dtype(torch.device(device), config, precision, network_engine)
    if dtype is torch.int8 and int8 is None:
        raise ConfigError(
            "precision: int8; the checkpoint has no int8 calibration: write it again with `mal-train export --int8`"
        )
    engine = OpenVinoEngine(network.eval(), int8 if dtype is torch.int8 else None)
    return Labeler(network, config, device=device, engine=engine)
