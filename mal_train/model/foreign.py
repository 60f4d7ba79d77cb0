"""Reads the published code's checkpoints into our names and settings. The layout is recognised from names and shapes.

Read here: TAO 6.25 to 7.0, a ViT with one 16×16 patch convolution. Recognised and refused with a reason: the
convolutional stem of NVlabs and TAO up to 6.0, and FAN. Such files hold no settings beside the weights: what shapes
cannot tell (crop size, thresholds, `not_adjust_scale`) the importer takes from the user.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mal_train.errors import UnknownLayout
from mal_train.model.backbones import BACKBONES
from mal_train.model.network import MalNetwork, ModelConfig
from mal_train.model.vit import VitSize
from mal_train.model.weightfile import read_weight_file

CLASSIFIER = "backbone.head."
"""TAO leaves the backbone's ImageNet classifier in its checkpoints; no mask depends on it."""

TAO_ARCHS = ("vit-deit-tiny/16", "vit-deit-small/16", "vit-mae-base/16", "vit-mae-large/16", "vit-mae-huge/14")
"""Names that TAO documents; of several rows of one shape, such as DeiT-base and MAE-base, a checkpoint gets these."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A published checkpoint in our terms.

    Attributes:
        model: the network its shapes describe.
        weights: `student.…` and `teacher.…` → float32 tensor: exactly the names that `MalNetwork(model)` has.
        dropped: names in the file that take no part in labelling, such as the classifier's.
        teacher_copied: the file has no teacher; it is a copy of the student.
    """

    model: ModelConfig
    weights: dict[str, Tensor]
    dropped: tuple[str, ...] = ()
    teacher_copied: bool = False

    def __str__(self) -> str:
        dropped = f"; left out: {', '.join(self.dropped)}" if self.dropped else ""
        teacher = "; no teacher in it, the student stands for both" if self.teacher_copied else ""
        return f"TAO 6.25-7.0 layout, {self.model.arch}, {len(self.weights)} tensors{dropped}{teacher}"


def read_tao_checkpoint(path: Path) -> ForeignCheckpoint:
    """Read a checkpoint of TAO 6.25 to 7.0: Lightning's dict or a bare state dict; no code in it is run.

    Width, depth and patch size name the backbone; the number of heads follows from it. DeiT-base and MAE-base are one
    network: such a file is called `vit-mae-base/16`, TAO's default.

    Raises:
        ConfigError: the file cannot be read.
        UnknownLayout: another layout, named where it is known; a network of a size that is not in our table; tensors
            missing, left over, or of the wrong shape.
    """
    return from_tao(read_weight_file(path), str(path))


def from_tao(tensors: Mapping[str, Tensor], name: str) -> ForeignCheckpoint:
    """As `read_tao_checkpoint`, from tensors already read; `name` stands in messages."""
    _refuse_other_layouts(tensors, name)
    model = _model_of(tensors, name)
    ours = {_our_name(key): tensor for key, tensor in tensors.items() if _takes_part(key)}
    dropped = tuple(key for key in tensors if not _takes_part(key))
    teacher_copied = not any(key.startswith("teacher.") for key in ours)
    if teacher_copied:
        ours |= {key.replace("student.", "teacher.", 1): tensor.clone() for key, tensor in ours.items()}
    _check_fits(ours, model, name)
    return ForeignCheckpoint(model, {key: tensor.float() for key, tensor in ours.items()}, dropped, teacher_copied)


def _takes_part(key: str) -> bool:
    network, _, rest = key.partition(".")
    return network in {"student", "teacher"} and not rest.startswith(CLASSIFIER)


def _our_name(key: str) -> str:
    return re.sub(r"\.mask_head\.convs\.(\d+)\.conv\.", r".mask_head.convs.\1.", key)


def _refuse_other_layouts(tensors: Mapping[str, Tensor], name: str) -> None:
    def has(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in tensors)

    if has(r"backbone\.blocks\.0\.mlp\.mlp_v\.|pos_embed\.token_projection"):
        raise UnknownLayout(f"{name}: looks like a MAL checkpoint with a FAN backbone, which is not read yet")
    if has(r"patch_embed\.proj\.0\.0\.weight"):
        raise UnknownLayout(
            f"{name}: looks like a MAL checkpoint of NVlabs or of TAO up to 6.0: its ViT has a convolutional stem, "
            "which is not read yet; TAO 6.25 to 7.0 is"
        )
    if not has(r"^student\.") and has(r"blocks\.0\.attn\.qkv\.weight"):
        raise UnknownLayout(
            f"{name}: looks like the weights of a backbone alone; give it as train.pretrained_model_path"
        )
    for needed in ("student.backbone.patch_embed.proj.weight", "student.mask_head.convs.0.conv.weight"):
        if needed not in tensors or tensors[needed].ndim != 4:
            some = ", ".join(list(tensors)[:3])
            raise UnknownLayout(f"{name}: not a MAL checkpoint of TAO 6.25 to 7.0: no {needed}; it begins with {some}")


def _model_of(tensors: Mapping[str, Tensor], name: str) -> ModelConfig:
    width, _, _, patch = tensors["student.backbone.patch_embed.proj.weight"].shape
    depth = _count(tensors, r"student\.backbone\.blocks\.(\d+)\.")
    convs = _count(tensors, r"student\.mask_head\.convs\.(\d+)\.")
    rows = [
        arch
        for arch, row in BACKBONES.items()
        if isinstance(row, VitSize)
        and row.variant == "plain"
        and (row.width, row.depth, row.patch) == (width, depth, patch)
    ]
    if not rows:
        raise UnknownLayout(
            f"{name}: a ViT of width {width}, depth {depth} and patch {patch}; no backbone of that size is known "
            f"({', '.join(BACKBONES)})"
        )
    out = len(tensors.get(f"student.mask_head.convs.{convs - 1}.conv.weight", ()))
    hidden = len(tensors["student.mask_head.convs.0.conv.weight"])
    return ModelConfig(
        next((arch for arch in rows if arch in TAO_ARCHS), rows[0]),
        mask_head_num_convs=convs,
        mask_head_hidden_channel=hidden,
        mask_head_out_channel=max(out, 1),
    )


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for key in tensors if (found := re.match(pattern, key))})


def _check_fits(ours: Mapping[str, Tensor], model: ModelConfig, name: str) -> None:
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
        raise UnknownLayout(f"{name}: almost the layout of TAO 6.25 to 7.0, but {'; '.join(faults[:3])}{more}")
