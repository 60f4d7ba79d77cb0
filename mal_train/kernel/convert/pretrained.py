"""Fills a network with starting weights: timm's by name, a local file, or one of our checkpoints, and says what fitted.

The blocks of the backbone must fit exactly: weights of another architecture would load in part and train badly in
silence. A stem, a position table and heads may be missing; the report names them.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import timm
import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from mal_train.core.errors import ConfigError, UnknownLayout
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint
from mal_train.kernel.checkpoint.keys import DecryptionKey
from mal_train.kernel.checkpoint.lineage import NOT_STATED, Lineage
from mal_train.kernel.convert.tao_import import from_tao
from mal_train.kernel.convert.torch_weights import read_weight_file
from mal_train.kernel.networks.backbones import BACKBONES
from mal_train.kernel.networks.network import MalNetwork

FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".malckpt")
PREFIXES = ("", "backbone.", "module.", "model.", "encoder.", "module.base_encoder.")
"""What published files of backbones put before timm's names."""
PART_OF_THE_ANSWER = re.compile(r"blocks\.|pos_embed\.|dist_token$|reg_token$|norm_pre\.|fc_norm\.")
"""Tensors that may neither lack nor be left over: with them or without, the backbone is another network."""
UNKNOWN_ARCH_LICENSE = "none known: no weights are published for it, or their license is not stated"


@dataclass(frozen=True)
class PretrainedReport:
    """What became of starting weights. Names are those of the student.

    Attributes:
        source: as the user gave it.
        loaded: filled from the source, the resampled ones included.
        resampled: those of them that had another grid or patch size.
        missing: not in the source; still random.
        left_over: in the source, without a place here (an ImageNet classifier, for example).
        origin: names and licenses behind it. A `.malckpt` tells of those that it came from; another local file cannot.
    """

    source: str
    loaded: tuple[str, ...]
    resampled: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    origin: Lineage

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        if self.resampled:
            parts.append(f"resampled: {', '.join(self.resampled)}")
        if self.missing:
            groups = Counter(
                ".".join(name.split(".")[: 2 if name.startswith("backbone.") else 1]) for name in self.missing
            )
            parts.append("starting random: " + ", ".join(f"{group} ({count})" for group, count in groups.items()))
        if self.left_over:
            parts.append(f"left over: {', '.join(self.left_over[:4])}" + (" …" if len(self.left_over) > 4 else ""))
        return "; ".join(parts)


def load_pretrained(network: MalNetwork, source: str, key: DecryptionKey | None = None) -> PretrainedReport:
    """Fill the student from `source`; the teacher becomes its copy.

    Args:
        network: changed in place, and only if everything fits.
        source: a timm name such as `deit_small_patch16_224.fb_in1k` (downloaded through timm, kept in its cache) or an
            arch of ours for its published weights; a file of a backbone or of a TAO checkpoint (`.pt`, `.pth`,
            `.ckpt`, `.bin`, `.safetensors`); a `.malckpt`; or `builtin` for the model in the package.
        key: opens a sealed `.malckpt`.

    Raises:
        ConfigError: no such file or name, no connection, or weights of another architecture.
        UnknownLayout: nothing in the source fits by name.
        CheckpointError: a `.malckpt` that cannot be opened.
    """
    wanted = network.student.state_dict()
    tensors, origin = _read(source, key)
    found = _student_names(tensors, source)
    if "backbone.reg_token" in wanted and "backbone.dist_token" in found:
        found["backbone.reg_token"] = found.pop("backbone.dist_token")
    fitted: dict[str, Tensor] = {}
    resampled: list[str] = []
    for name, target in wanted.items():
        if name not in found:
            continue
        fitted[name] = _fit(name, found[name], target, source)
        if found[name].shape != target.shape:
            resampled.append(name)
    missing = tuple(name for name in wanted if name not in fitted)
    left_over = tuple(name.removeprefix("backbone.") for name in found if name not in wanted)
    _check_same_architecture(network.config.arch, fitted, missing, left_over, source)
    network.student.load_state_dict(fitted, strict=False)
    network.reset_teacher()
    return PretrainedReport(source, tuple(fitted), tuple(resampled), missing, left_over, origin)


def published_license(source: str) -> str:
    """SPDX name of the license of the weights of a timm name, or of those published for an arch of ours."""
    if source in BACKBONES:
        return BACKBONES[source].license or UNKNOWN_ARCH_LICENSE
    config = timm.models.get_pretrained_cfg(_checked_timm_name(source))
    license = (config.license if config else None) or "not stated by timm"
    return {"apache-2.0": "Apache-2.0", "cc-by-nc-4.0": "CC-BY-NC-4.0", "mit": "MIT"}.get(license, license)


def _is_file(source: str) -> bool:
    path = builtin.resolve(source)
    return path.suffix in FILE_SUFFIXES or len(path.parts) > 1 or path.is_file()


def _read(source: str, key: DecryptionKey | None) -> tuple[dict[str, Tensor], Lineage]:
    """Weights, and where they come from, of one reading: the file may be another one a moment later."""
    if source in BACKBONES:
        return _download(_published_name(source)), Lineage(source, published_license(source))
    if not _is_file(source):
        return _download(_checked_timm_name(source)), Lineage(source, published_license(source))
    path = builtin.resolve(source)
    if path.suffix == ".malckpt":
        read = load_checkpoint(path, key, weights_only_kind=True)
        provenance = builtin.completed(read.sha256, read.provenance)
        return dict(read.weights), Lineage.from_checkpoint(path, read.sha256, provenance)
    tensors = read_weight_file(path)
    if any(name.startswith("student.") for name in tensors):
        tensors = from_tao(tensors, source).weights
    return tensors, Lineage(path.name, NOT_STATED)


def _published_name(arch: str) -> str:
    name = BACKBONES[arch].pretrained
    if name is None:
        raise ConfigError(
            f"pretrained weights {arch!r}: timm has none for this arch; give a file of them, or train from random"
        )
    return name


def _checked_timm_name(source: str) -> str:
    if timm.is_model(source) and timm.models.is_model_pretrained(source):
        return source
    near = difflib.get_close_matches(
        source, [*BACKBONES, *timm.list_pretrained("*vit*"), *timm.list_pretrained("deit*")], 1
    )
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"pretrained weights {source!r}: neither a file nor a timm model with published weights; {hint}"
        f"For our backbones: {', '.join(sorted({size.pretrained for size in BACKBONES.values() if size.pretrained}))}"
    )


def _download(name: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except OSError as error:  # What both of timm's download paths raise on no connection, no permission, no space.
        raise ConfigError(
            f"pretrained weights {name}: the download failed ({error}); fetch the file on a machine with a connection "
            "and give its path"
        ) from error
    return weights


def _student_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors under the names of our student: a whole MAL network, or a backbone with or without a prefix."""
    student = {name.removeprefix("student."): t for name, t in tensors.items() if name.startswith("student.")}
    if student:
        return student
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        if any(f"{prefix}blocks.0.attn.{first}.weight" in tensors for first in ("qkv", "q")):
            return {f"backbone.{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items()}
    some = ", ".join(list(tensors)[:3])
    raise UnknownLayout(f"pretrained weights {source}: nothing in it fits our backbones; it begins with {some}")


def _fit(name: str, tensor: Tensor, target: Tensor, source: str) -> Tensor:
    """`tensor` in the shape of `target`; only position table and patch convolution may differ."""
    if tensor.shape == target.shape:
        return tensor
    if name == "backbone.pos_embed" and tensor.shape[2:] == target.shape[2:]:
        side = math.isqrt(target.shape[1])
        extra = target.shape[1] - side * side  # positions of the class and distillation tokens
        own = math.isqrt(max(tensor.shape[1] - extra, 0))
        if own and tensor.shape[1] == extra + own * own:
            table: Tensor = resample_abs_pos_embed(tensor.float(), [side, side], [own, own], num_prefix_tokens=extra)
            return table
    if name == "backbone.patch_embed.proj.weight" and tensor.shape[:2] == target.shape[:2]:
        kernel: Tensor = resample_patch_embed(tensor.float(), list(target.shape[2:]))
        return kernel
    raise ConfigError(
        f"pretrained weights {source}: {name} has shape {tuple(tensor.shape)} instead of {tuple(target.shape)}; "
        "they belong to another model.arch, or to other settings of the mask head"
    )


def _check_same_architecture(
    arch: str, fitted: Mapping[str, Tensor], missing: tuple[str, ...], left_over: tuple[str, ...], source: str
) -> None:
    lacking = [name for name in missing if PART_OF_THE_ANSWER.match(name.removeprefix("backbone."))]
    surplus = [name for name in left_over if PART_OF_THE_ANSWER.match(name)]
    if lacking or surplus:
        what = f"lacks {lacking[0]}" if lacking else f"holds {surplus[0]}"
        raise ConfigError(
            f"pretrained weights {source}: {what}, which {arch} has{'' if lacking else ' not'}; choose the weights of "
            "the same architecture"
        )
    broken = [name for name, tensor in fitted.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ConfigError(f"pretrained weights {source}: {broken[0]} holds NaN or infinity; the file is no use")
