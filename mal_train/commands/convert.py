"""`mal-train import`: converts a checkpoint of the published code to a `.malckpt` file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mal_train.commands.common import checkpoint_keys, existing_file, model_config
from mal_train.config.spec import Spec, load_spec
from mal_train.core.atomic_io import refuse_same_file
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.version import distribution_version
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.convert.tao_import import read_tao_checkpoint
from mal_train.kernel.networks.backbones import check_crop_size, default_crop_size
from mal_train.kernel.networks.network import MalNetwork, ModelConfig

ACCEPTED = ("dataset.crop_size", "train.test_margin_rate", "train.mask_thres", "compat", "encryption_key")
MODEL_FIELDS_OF_TRAINING = ("model.frozen_stages", "model.teacher_momentum")


def import_checkpoint(source: str, target: Path, overrides: list[str], console: Console) -> Path:
    """Reads a published checkpoint (weights only; no code is executed) and writes it as a `.malckpt` file.

    Args:
        source: the published checkpoint.
        target: the file to write.
        overrides: `a.b=c` for settings that published checkpoints do not store: `ACCEPTED` and the fields of `model`.
        console: prints messages.

    Raises:
        UnknownLayout: the layout of the checkpoint is not supported.
        ConfigError: an override has no effect on an import, or does not match the weights, or `target` is the source.
    """
    names = [override.partition("=")[0] for override in overrides]
    for name in names:
        if name not in ACCEPTED and (not name.startswith("model.") or name in MODEL_FIELDS_OF_TRAINING):
            raise ConfigError(f"{name}: has no effect on an import; accepted are {', '.join(ACCEPTED)} and model.*")
    spec = load_spec(None, overrides)
    path = existing_file(source, "FILE")
    refuse_same_file(path, target)
    foreign = read_tao_checkpoint(path)
    model = dataclasses.replace(foreign.model, **_model_overrides(spec, names))
    labeler = spec.labeler_config(default_crop_size(model.arch))
    check_crop_size(model.arch, labeler.crop_size)
    _check_fits(model, foreign.weights, source)
    encryption_key, _ = checkpoint_keys(spec)
    provenance: dict[str, Any] = {
        "tool": f"mask-auto-labeler {distribution_version()}",
        "imported_from": Path(source).name,
    }
    encryption = save_checkpoint(target, Checkpoint(model, labeler, foreign.weights, [], provenance), encryption_key)
    console.print(f"wrote {target}: {model.arch}, {len(foreign.weights)} tensors, encryption: {encryption.mode}")
    return target


def _check_fits(model: ModelConfig, weights: Mapping[str, Tensor], source: str) -> None:
    """Raises ConfigError unless a network with these settings has exactly these weights."""
    with torch.device("meta"):
        misfit = MalNetwork(model).misfit(weights)
    if misfit:
        raise ConfigError(f"{source}: does not match the model.* overrides ({misfit}); leave out those that change it")


def _model_overrides(spec: Spec, names: list[str]) -> dict[str, Any]:
    wanted = model_config(spec.model).to_dict()
    given = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    return {field.name: wanted[field.name] for field in dataclasses.fields(ModelConfig) if field.name in given}
