"""Resuming a training: which checkpoint, the check of its network, and the settings that it keeps."""

import dataclasses
from pathlib import Path

from mal_train.commands.common import checkpoint_keys, existing_file
from mal_train.config.spec import Spec
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.fingerprint import differences
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint
from mal_train.kernel.networks.network import ModelConfig
from mal_train.training.checkpoints import newest_checkpoint, newest_intact


def checkpoint_to_resume(spec: Spec, folder: Path, console: Console) -> Path | None:
    """Returns the given checkpoint, or else the newest intact one in the folder; None to start from the beginning.

    Raises:
        ConfigError: the given file does not exist, or the key that decrypts it is missing.
        CheckpointError: the newest checkpoint cannot be read.
    """
    encryption_key, decryption_key = checkpoint_keys(spec)
    given = spec.train.resume_training_checkpoint_path
    path = newest_checkpoint(folder)
    if given is not None:
        path = existing_file(given, "train.resume_training_checkpoint_path")
    if path is not None and encryption_key is not None and decryption_key is None:
        raise ConfigError(
            f"decryption_key: not given; resuming from {path} needs it (an age recipient can only encrypt)"
        )
    return path if given is not None else newest_intact(folder, decryption_key, console.print)


def check_same_network(checkpoint: Checkpoint, wanted: ModelConfig, path: Path | None) -> None:
    """Raises ConfigError if a checkpoint has no training state, or is of a different network."""
    if checkpoint.training is None:
        raise ConfigError(
            f"train.resume_training_checkpoint_path: {path} has weights only; give it as train.pretrained_model_path"
        )
    if checkpoint.model != wanted:
        different = "; ".join(f"model.{text}" for text in differences(checkpoint.model.to_dict(), wanted.to_dict()))
        raise ConfigError(f"{path}: trained with {different}; change the spec or choose another results_dir")


def resumed_config(spec: Spec, current: LabelerConfig, stored: LabelerConfig) -> LabelerConfig:
    """Returns the current labeler settings with the thresholds and the score that the checkpoint has fitted.

    A calibration of a different kind of score is dropped, unless a model of the score was fitted with it.
    """
    thresholds = stored.mask_thres if spec.fits_thresholds else current.mask_thres
    is_of_same_kind = stored.without_fitted_score().score_type is current.score_type
    fit = stored if spec.fits_calibration and is_of_same_kind else current
    return dataclasses.replace(
        current,
        mask_thres=thresholds,
        score=fit.score,
        score_model=fit.score_model,
        calibration=fit.calibration,
        calibrated_with_flip=fit.calibrated_with_flip,
    )
