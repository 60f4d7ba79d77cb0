"""Reads the published code's checkpoints into our names and settings. The layout is recognized from names and shapes.

Read here: the ViT of TAO 6.25 to 7.0, which has one 16×16 patch convolution; the ViT of NVlabs and of TAO up to 6.0,
which has a convolutional stem; FAN of TAO up to 6.0. Such files hold no settings beside the weights: what shapes
cannot tell (crop size, thresholds, `not_adjust_scale`) the importer takes from the user.
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

NO_PART = re.compile(r"backbone\.head\.")
"""TAO leaves the backbone's ImageNet classifier in its checkpoints; no mask depends on it."""
NO_PART_OF_FAN = re.compile(r"backbone\.(head\.|cls_token$|cls_attn_blocks\.\d+\.(attn\.|mlp\.|gamma2$))")
"""In FAN, no mask depends on the class token either (`fan.Fan`)."""

BACKBONE = r"student\.backbone\."
LINEAR_STEM = "student.backbone.patch_embed.proj.weight"
FAN_POSITIONS = "student.backbone.pos_embed.token_projection.weight"
CONV_STEM = "student.backbone.patch_embed.proj.0.0.weight"
MASK_HEAD = "student.mask_head.convs.0.conv.weight"
_Shape: TypeAlias = dict[str, int]
TAO_ARCHS = ("vit-deit-tiny/16", "vit-deit-small/16", "vit-mae-base/16", "vit-mae-large/16", "vit-mae-huge/14")
"""Names that TAO documents; of several rows of one shape, such as DeiT-base and MAE-base, a checkpoint gets these."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A published checkpoint in our terms.

    Attributes:
        layout: whose names and shapes these were, for people.
        model: the network its shapes describe.
        weights: `student.…` and `teacher.…` → float32 tensor: exactly the names that `MalNetwork(model)` has.
        dropped: names in the file that take no part in labeling, such as the classifier's.
        teacher_copied: the file has no teacher; it is a copy of the student.
    """

    layout: str
    model: ModelConfig
    weights: dict[str, Tensor]
    dropped: tuple[str, ...] = ()
    teacher_copied: bool = False

    def __str__(self) -> str:
        dropped = f"; left out: {', '.join(self.dropped)}" if self.dropped else ""
        teacher = "; no teacher in it, the student stands for both" if self.teacher_copied else ""
        return f"layout of {self.layout}, {self.model.arch}, {len(self.weights)} tensors{dropped}{teacher}"


def read_tao_checkpoint(path: Path) -> ForeignCheckpoint:
    """Read a checkpoint of TAO or NVlabs: Lightning's dict or a bare state dict; no code in it is run.

    Stem, width, depth and patch size name the backbone; the number of heads follows from it. DeiT-base and MAE-base
    are one network: such a file is called `vit-mae-base/16`, TAO's default.

    Raises:
        ConfigError: the file cannot be read.
        UnknownLayout: another layout, named where it is known; a network of a size that is not in our table; tensors
            missing, left over, or of the wrong shape.
    """
    return from_tao(read_weight_file(path), str(path))


def from_tao(tensors: Mapping[str, Tensor], name: str) -> ForeignCheckpoint:
    """As `read_tao_checkpoint`, from tensors already read; `name` stands in messages."""
    layout = _layout_of(tensors, name)
    model = _model_of(tensors, layout, name)
    taking_part = [key for key in tensors if _takes_part(key, layout)]
    ours = {_our_name(key): tensors[key] for key in taking_part}
    dropped = tuple(key for key in tensors if key not in taking_part)
    teacher_copied = not any(key.startswith("teacher.") for key in ours)
    if teacher_copied:
        ours |= {key.replace("student.", "teacher.", 1): tensor.clone() for key, tensor in ours.items()}
    _check_fits(ours, model, layout, name)
    weights = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in ours.items()}
    return ForeignCheckpoint(layout.name, model, weights, dropped, teacher_copied)


@dataclass(frozen=True)
class _Layout:
    """One way of publishing a MAL network.

    Attributes:
        name: for people.
        mark: a tensor of four dimensions that only this layout has.
        shape_of: the tensors → what tells its backbones apart.
        shape_of_row: a row of the table → the same, None for a row of another layout.
        no_part: names, after the network's, on which no mask depends.
    """

    name: str
    mark: str
    shape_of: Callable[[Mapping[str, Tensor]], _Shape]
    shape_of_row: Callable[[BackboneSize], _Shape | None]
    no_part: re.Pattern[str] = NO_PART


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
    # First: FAN's plain stem has a tensor of the name that marks the other convolutional stem.
    _Layout("FAN of TAO up to 6.0", FAN_POSITIONS, _fan_shape, _fan_shape_of_row, NO_PART_OF_FAN),
    _Layout("TAO 6.25 to 7.0", LINEAR_STEM, _linear_shape, _linear_shape_of_row),
    _Layout("NVlabs and TAO up to 6.0", CONV_STEM, _conv_shape, _conv_shape_of_row),
)


def _takes_part(key: str, layout: _Layout) -> bool:
    network, _, rest = key.partition(".")
    return network in {"student", "teacher"} and not layout.no_part.match(rest)


def _our_name(key: str) -> str:
    """Ours for their name: the published code wraps the convolutions of its head, and ends its stem in stage 3."""
    key = re.sub(r"\.mask_head\.convs\.(\d+)\.conv\.", r".mask_head.convs.\1.", key)
    return key.replace(".patch_embed.proj.3.3.", ".patch_embed.proj.4.")


def _layout_of(tensors: Mapping[str, Tensor], name: str) -> _Layout:
    def has(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in tensors)

    if not has(r"^student\.") and has(r"blocks\.0\.attn\.q(kv)?\.weight"):
        raise UnknownLayout(
            f"{name}: looks like the weights of a backbone alone; give it as train.pretrained_model_path"
        )
    found = [layout for layout in LAYOUTS if layout.mark in tensors and tensors[layout.mark].ndim == 4]
    head = tensors.get(MASK_HEAD)
    if not found or head is None or head.ndim != 4:
        some = ", ".join(list(tensors)[:3])
        lacking = MASK_HEAD if found else " or ".join(layout.mark for layout in LAYOUTS)
        raise UnknownLayout(f"{name}: not a MAL checkpoint of TAO or NVlabs: no {lacking}; it begins with {some}")
    return found[0]


def _model_of(tensors: Mapping[str, Tensor], layout: _Layout, name: str) -> ModelConfig:
    shape = layout.shape_of(tensors)
    convs = _count(tensors, r"student\.mask_head\.convs\.(\d+)\.")
    known = {arch: layout.shape_of_row(row) for arch, row in BACKBONES.items()}
    rows = [arch for arch in known if known[arch] == shape]
    if not rows:
        what = ", ".join(f"{part} {value}" for part, value in shape.items())
        raise UnknownLayout(
            f"{name}: a backbone in the layout of {layout.name}, {what}; none of that shape is known: "
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
    return len({found[1] for key in tensors if (found := re.match(pattern, key))})


def _check_fits(ours: Mapping[str, Tensor], model: ModelConfig, layout: _Layout, name: str) -> None:
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in MalNetwork(model).state_dict().items()}
    faults = [f"{key} is missing" for key in expected if key not in ours]
    faults += [f"{key} is not part of {model.arch}" for key in ours if key not in expected]
    faults += [
        f"{key} has shape {tuple(ours[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in ours and tuple(ours[key].shape) != shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UnknownLayout(f"{name}: almost the layout of {layout.name}, but {'; '.join(faults[:3])}{more}")
