"""Converts checkpoints of TAO and NVlabs to the names and settings of this project.

The layout is recognized from names and shapes. There are three: the ViT of TAO 6.25 to 7.0, with one 16×16 patch
convolution; the ViT of NVlabs and of TAO up to 6.0, with a convolutional stem; and FAN of TAO up to 6.0. The files hold
no settings: the user gives those that shapes do not determine (crop size, thresholds, `not_adjust_scale`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from mal_train.core.errors import UnknownLayout
from mal_train.kernel.convert.torch_weights import read_weight_file
from mal_train.kernel.networks.backbones import BACKBONES, BackboneSize
from mal_train.kernel.networks.fan import FanSize
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.kernel.networks.vit import VitSize

UNUSED = re.compile(r"backbone\.head\.")
"""Tensors that no mask depends on: TAO keeps the ImageNet classifier of the backbone in its checkpoints."""
UNUSED_IN_FAN = re.compile(r"backbone\.(head\.|cls_token$|cls_attn_blocks\.\d+\.(attn\.|mlp\.|gamma2$))")
"""FAN's tensors that no mask depends on; its class token is one of them (`fan.Fan`)."""

BACKBONE = r"student\.backbone\."
LINEAR_STEM = "student.backbone.patch_embed.proj.weight"
FAN_POSITIONS = "student.backbone.pos_embed.token_projection.weight"
CONV_STEM = "student.backbone.patch_embed.proj.0.0.weight"
MASK_HEAD = "student.mask_head.convs.0.conv.weight"
_Shape: TypeAlias = dict[str, int]
TAO_ARCHS = ("vit-deit-tiny/16", "vit-deit-small/16", "vit-mae-base/16", "vit-mae-large/16", "vit-mae-huge/14")
"""Backbones that TAO documents. They take precedence over others of the same shape, as MAE-base over DeiT-base."""


@dataclass(frozen=True)
class ImportedCheckpoint:
    """A converted checkpoint.

    Attributes:
        layout: name of the recognized layout, for messages.
        model: architecture that the shapes describe.
        weights: `student.…` and `teacher.…` → float32 tensor, with exactly the names of `MalNetwork(model)`.
        dropped: names in the file that no mask depends on, such as the classifier's.
        teacher_copied: True if the file has no teacher, so that the teacher is a copy of the student.
    """

    layout: str
    model: ModelConfig
    weights: dict[str, Tensor]
    dropped: tuple[str, ...] = ()
    teacher_copied: bool = False

    def __str__(self) -> str:
        dropped = f"; dropped: {', '.join(self.dropped)}" if self.dropped else ""
        teacher = "; no teacher: copied from the student" if self.teacher_copied else ""
        return f"layout of {self.layout}, {self.model.arch}, {len(self.weights)} tensors{dropped}{teacher}"


def read_tao_checkpoint(path: Path) -> ImportedCheckpoint:
    """Reads a checkpoint of TAO or NVlabs, a Lightning dict or a plain state dict. Runs no code from it.

    Stem, width, depth and patch size identify the backbone, and with it the number of heads. DeiT-base and MAE-base are
    the same network; such a file is read as `vit-mae-base/16`, TAO's default.

    Raises:
        ConfigError: the file cannot be read.
        UnknownLayout: another layout; a backbone that is not in the table; tensors missing, unexpected or of the wrong
            shape.
    """
    return from_tao(read_weight_file(path), str(path))


def from_tao(tensors: Mapping[str, Tensor], name: str) -> ImportedCheckpoint:
    """Converts tensors that are already read; see `read_tao_checkpoint`. `name` names the file in messages."""
    layout = _detect_layout(tensors, name)
    model = _detect_model(tensors, layout, name)
    used = [key for key in tensors if _is_used(key, layout)]
    renamed = {_rename(key): tensors[key] for key in used}
    dropped = tuple(key for key in tensors if key not in used)
    teacher_copied = not any(key.startswith("teacher.") for key in renamed)
    if teacher_copied:
        renamed |= {key.replace("student.", "teacher.", 1): tensor for key, tensor in renamed.items()}
    # Before the first copy: only tensors of the network's shapes take memory.
    _check_complete(renamed, model, layout, name)
    weights = {key: tensor.to(_dtype(tensor), copy=teacher_copied) for key, tensor in renamed.items()}
    return ImportedCheckpoint(layout.name, model, weights, dropped, teacher_copied)


@dataclass(frozen=True)
class _Layout:
    """A layout of published checkpoints.

    Attributes:
        name: name in messages.
        mark: name of a tensor of four dimensions that identifies the layout.
        shape_of: maps the tensors to the sizes that identify a backbone of this layout.
        shape_of_row: maps a row of the table to the same sizes; None for a row of another layout.
        unused: names within a network that no mask depends on.
    """

    name: str
    mark: str
    shape_of: Callable[[Mapping[str, Tensor]], _Shape]
    shape_of_row: Callable[[BackboneSize], _Shape | None]
    unused: re.Pattern[str] = UNUSED


def _linear_shape(tensors: Mapping[str, Tensor]) -> _Shape:
    width, _, _, patch = tensors[LINEAR_STEM].shape
    return {"width": width, "depth": _depth(tensors), "patch": patch}


def _linear_shape_of_row(row: BackboneSize) -> _Shape | None:
    if not isinstance(row, VitSize) or row.stem != "linear" or row.variant != "plain":
        return None
    return {"width": row.width, "depth": row.depth, "patch": row.patch}


def _conv_shape(tensors: Mapping[str, Tensor]) -> _Shape:
    stages = _count(tensors, BACKBONE + r"patch_embed\.proj\.(\d+)\.0\.weight")
    last = tensors.get(f"student.backbone.patch_embed.proj.{stages - 1}.0.weight", ())
    return {"width": len(last), "depth": _depth(tensors), "patch": 2**stages}


def _conv_shape_of_row(row: BackboneSize) -> _Shape | None:
    if not isinstance(row, VitSize) or row.resample != "by_factor":
        return None
    return {"width": row.width, "depth": row.depth, "patch": row.patch}


def _fan_shape(tensors: Mapping[str, Tensor]) -> _Shape:
    return {
        "width": len(tensors[FAN_POSITIONS]),
        "depth": _depth(tensors),
        "heads": len(tensors.get("student.backbone.blocks.0.mlp.temperature", ())),
        "ConvNeXt blocks": _count(tensors, BACKBONE + r"patch_embed\.backbone\.stages\.(\d+\.blocks\.\d+)\."),
    }


def _fan_shape_of_row(row: BackboneSize) -> _Shape | None:
    if not isinstance(row, FanSize):
        return None
    return {"width": row.width, "depth": row.depth, "heads": row.heads, "ConvNeXt blocks": sum(row.hybrid or ())}


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return _count(tensors, BACKBONE + r"blocks\.(\d+)\.")


LAYOUTS = (
    # FAN first: its plain stem has a tensor of the name that marks the other convolutional stem.
    _Layout("FAN of TAO up to 6.0", FAN_POSITIONS, _fan_shape, _fan_shape_of_row, UNUSED_IN_FAN),
    _Layout("TAO 6.25 to 7.0", LINEAR_STEM, _linear_shape, _linear_shape_of_row),
    _Layout("NVlabs and TAO up to 6.0", CONV_STEM, _conv_shape, _conv_shape_of_row),
)


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _is_used(key: str, layout: _Layout) -> bool:
    network, _, rest = key.partition(".")
    return network in {"student", "teacher"} and not layout.unused.match(rest)


def _rename(key: str) -> str:
    """Returns the name in `MalNetwork`: the published head wraps its convolutions, and its stem ends in stage 3."""
    key = re.sub(r"\.mask_head\.convs\.(\d+)\.conv\.", r".mask_head.convs.\1.", key)
    return key.replace(".patch_embed.proj.3.3.", ".patch_embed.proj.4.")


def _detect_layout(tensors: Mapping[str, Tensor], name: str) -> _Layout:
    def has(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in tensors)

    if not has(r"^student\.") and has(r"blocks\.0\.attn\.q(kv)?\.weight"):
        raise UnknownLayout(f"{name}: weights of a backbone only; give it as train.pretrained_model_path")
    matching = [layout for layout in LAYOUTS if layout.mark in tensors and tensors[layout.mark].ndim == 4]
    head = tensors.get(MASK_HEAD)
    if not matching or head is None or head.ndim != 4:
        first = ", ".join(list(tensors)[:3])
        missing = MASK_HEAD if matching else " or ".join(layout.mark for layout in LAYOUTS)
        raise UnknownLayout(
            f"{name}: not a MAL checkpoint of TAO or NVlabs; {missing} is missing, it begins with {first}"
        )
    return matching[0]


def _detect_model(tensors: Mapping[str, Tensor], layout: _Layout, name: str) -> ModelConfig:
    shape = layout.shape_of(tensors)
    convs = _count(tensors, r"student\.mask_head\.convs\.(\d+)\.")
    known = {arch: layout.shape_of_row(row) for arch, row in BACKBONES.items()}
    rows = [arch for arch in known if known[arch] == shape]
    if not rows:
        sizes = ", ".join(f"{part} {value}" for part, value in shape.items())
        raise UnknownLayout(
            f"{name}: layout of {layout.name} with {sizes}; no backbone of this shape is known, only "
            f"{', '.join(arch for arch in known if known[arch])}"
        )
    out = len(tensors.get(f"student.mask_head.convs.{convs - 1}.conv.weight", ()))
    hidden = len(tensors[MASK_HEAD])
    return ModelConfig(
        next((arch for arch in rows if arch in TAO_ARCHS), rows[0]),
        mask_head_num_convs=convs,
        mask_head_hidden_channel=hidden,
        mask_head_out_channel=max(out, 1),
    )


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in tensors if (match := re.match(pattern, key))})


def _check_complete(weights: Mapping[str, Tensor], model: ModelConfig, layout: _Layout, name: str) -> None:
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in MalNetwork(model).state_dict().items()}
    differences = [f"{key} is missing" for key in expected if key not in weights]
    differences += [f"{key} is not part of {model.arch}" for key in weights if key not in expected]
    differences += [
        f"{key} has shape {tuple(weights[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in weights and tuple(weights[key].shape) != shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UnknownLayout(f"{name}: almost the layout of {layout.name}, but {'; '.join(differences[:3])}{more}")
