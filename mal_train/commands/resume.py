"""What a training goes on from: which checkpoint, whether it fits, and what of its settings stays."""

import dataclasses
from pathlib import Path

from mal_train.commands.common import existing_file, keys_of
from mal_train.config.spec import Spec
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.fingerprint import differences
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint
from mal_train.kernel.networks.network import ModelConfig
from mal_train.training.checkpoints import newest_checkpoint, newest_whole


def checkpoint_to_resume(spec: Spec, folder: Path, screen: Console) -> Path | None:
    """The file that was named, else the newest whole one in the folder; None starts anew.

    Raises:
        ConfigError: the named file is not there, or nothing opens it.
    """
    seal_with, open_with = keys_of(spec)
    given = spec.train.resume_training_checkpoint_path
    path = newest_checkpoint(folder)
    if given is not None:
        path = existing_file(given, "train.resume_training_checkpoint_path")
    if path is not None and seal_with is not None and open_with is None:
        raise ConfigError(
            f"decryption_key: not given; it is needed to go on from {path} (an age recipient can only seal)"
        )
    return path if given is not None else newest_whole(folder, open_with, screen.print)


def check_same_network(checkpoint: Checkpoint, wanted: ModelConfig, path: Path | None) -> None:
    """ConfigError where a file holds no training state, or one of another network."""
    if checkpoint.training is None:
        raise ConfigError(
            f"train.resume_training_checkpoint_path: {path} holds weights only; give it as train.pretrained_model_path"
        )
    if checkpoint.model != wanted:
        different = "; ".join(f"model.{text}" for text in differences(checkpoint.model.to_dict(), wanted.to_dict()))
        raise ConfigError(f"{path}: trained with {different}; make them agree or choose another results_dir")


def taken_up(spec: Spec, asked: LabelerConfig, stored: LabelerConfig) -> LabelerConfig:
    """The settings that the spec asks for, with what was fitted so far; but no map of scores of another kind."""
    thresholds = stored.mask_thres if spec.fits_thresholds else asked.mask_thres
    is_fitted = spec.fits_calibration and stored.score_type is asked.score_type
    fit = stored if is_fitted else asked
    return dataclasses.replace(
        asked, mask_thres=thresholds, calibration=fit.calibration, calibrated_with_flip=fit.calibrated_with_flip
    )
