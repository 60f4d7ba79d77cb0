"""`mal-train import`: a checkpoint of the published code → a `.malckpt` of ours."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mal_train.commands.common import existing_file, keys_of, model_config
from mal_train.config.spec import Spec, load_spec
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.version import distribution_version
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.convert.tao_import import read_tao_checkpoint
from mal_train.kernel.networks.backbones import check_crop_size, default_crop_size
from mal_train.kernel.networks.network import MalNetwork, ModelConfig

TAKEN = ("dataset.crop_size", "train.test_margin_rate", "train.mask_thres", "compat", "encryption_key")
NOT_TAKEN = ("model.frozen_stages", "model.teacher_momentum")


def import_checkpoint(source: str, target: Path, overrides: list[str], screen: Console) -> Path:
    """Reads a published checkpoint (weights only, no code runs) and writes it in our format.

    Args:
        source: the file.
        target: the `.malckpt` to write.
        overrides: `a.b=c`: what such files do not hold: TAKEN and the fields of `model`.
        screen: for people.

    Raises:
        UnknownLayout: not a layout that is read here.
        ConfigError: an override that has no effect here, or that does not fit the weights.
    """
    names = [override.partition("=")[0] for override in overrides]
    for name in names:
        if name not in TAKEN and (not name.startswith("model.") or name in NOT_TAKEN):
            raise ConfigError(f"{name}: has no effect on an import; {', '.join(TAKEN)} and model.* have")
    spec = load_spec(None, overrides)
    foreign = read_tao_checkpoint(existing_file(source, "FILE"))
    model = dataclasses.replace(foreign.model, **_model_overrides(spec, names))
    labeler = spec.labeler_config(default_crop_size(model.arch))
    check_crop_size(model.arch, labeler.crop_size)
    _check_fits(model, foreign.weights, source)
    seal_with, _ = keys_of(spec)
    provenance: dict[str, Any] = {
        "tool": f"mask-auto-labeler {distribution_version()}",
        "imported_from": Path(source).name,
    }
    seal = save_checkpoint(target, Checkpoint(model, labeler, foreign.weights, [], provenance), seal_with)
    screen.print(f"wrote {target}: {model.arch}, {len(foreign.weights)} tensors, encryption: {seal.mode}")
    return target


def _check_fits(model: ModelConfig, weights: Mapping[str, Tensor], source: str) -> None:
    """ConfigError unless a network of these settings has exactly these weights."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in MalNetwork(model).state_dict().items()}
    wrong = [
        name
        for name in wanted.keys() | weights.keys()
        if name not in weights or wanted.get(name) != weights[name].shape
    ]
    if wrong:
        raise ConfigError(
            f"{source}: with these model.* overrides {min(wrong)} does not fit; leave out what shapes the network"
        )


def _model_overrides(spec: Spec, names: list[str]) -> dict[str, Any]:
    wanted = model_config(spec.model).to_dict()
    given = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    return {field.name: wanted[field.name] for field in dataclasses.fields(ModelConfig) if field.name in given}
