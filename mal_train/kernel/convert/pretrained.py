"""Loads starting weights into a network: timm's by name, a local file, or a checkpoint. Reports what was loaded.

The blocks of the backbone must match exactly: weights of another architecture would load partially and silently train
badly. Stem, position table and heads may be missing; the report names them.
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
from torch import Tensor

from mal_train.core.errors import ConfigError, UnknownLayout
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint
from mal_train.kernel.checkpoint.keys import DecryptionKey
from mal_train.kernel.checkpoint.lineage import NOT_STATED, Lineage
from mal_train.kernel.checkpoint.trust import NO_POLICY, TrustPolicy
from mal_train.kernel.convert.tao_import import from_tao
from mal_train.kernel.convert.torch_weights import read_weight_file
from mal_train.kernel.networks.backbones import BACKBONES
from mal_train.kernel.networks.network import MalNetwork
from mal_train.kernel.networks.vit import resampled_positions

FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".malckpt")
PREFIXES = ("", "backbone.", "module.", "model.", "encoder.", "module.base_encoder.")
"""Prefixes of timm's names in published files of backbones."""
REQUIRED = re.compile(r"blocks\.|pos_embed\.|dist_token$|reg_token$|norm_pre\.|fc_norm\.")
"""Tensors that may be neither missing nor unexpected: a backbone with or without them is another network."""
UNKNOWN_ARCH_LICENSE = "unknown: no weights are published for it, or their license is not stated"


@dataclass(frozen=True)
class PretrainedReport:
    """The result of loading starting weights. Names are those of the student.

    Attributes:
        source: the source as given by the user.
        loaded: tensors loaded from the source, including resampled ones.
        resampled: loaded tensors that had another grid or patch size.
        missing: tensors that the source lacks; they stay random.
        unused: tensors of the source that the network lacks, for example an ImageNet classifier.
        lineage: names and licenses of the weights and their ancestors, as far as the source states them.
    """

    source: str
    loaded: tuple[str, ...]
    resampled: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    lineage: Lineage

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        if self.resampled:
            parts.append(f"resampled: {', '.join(self.resampled)}")
        if self.missing:
            groups = Counter(
                ".".join(name.split(".")[: 2 if name.startswith("backbone.") else 1]) for name in self.missing
            )
            parts.append("random: " + ", ".join(f"{group} ({count})" for group, count in groups.items()))
        if self.unused:
            parts.append(f"unused: {', '.join(self.unused[:4])}" + (" …" if len(self.unused) > 4 else ""))
        return "; ".join(parts)


def load_pretrained(
    network: MalNetwork, source: str, key: DecryptionKey | None = None, trust: TrustPolicy = NO_POLICY
) -> PretrainedReport:
    """Loads `source` into the student and copies the student to the teacher.

    Args:
        network: changed in place, and only if the weights match.
        source: a timm name such as `deit_small_patch16_224.fb_in1k` (downloaded through timm, kept in its cache), or a
            name of `BACKBONES` for its published weights; a file of a backbone or a TAO checkpoint (`.pt`, `.pth`,
            `.ckpt`, `.bin`, `.safetensors`); a `.malckpt`; or `builtin` for the model in the package.
        key: decrypts an encrypted `.malckpt`.
        trust: SHA-256 or signers that a file must have.

    Raises:
        ConfigError: no such file or name, no connection, weights of another architecture, or a SHA-256 or signers for
            weights that are no file.
        UnknownLayout: no name in the source matches.
        CheckpointError: a `.malckpt` that cannot be loaded, or a file that is not trusted.
    """
    targets = network.student.state_dict()
    tensors, lineage = _read(source, key, trust)
    given = _student_names(tensors, source)
    if "backbone.reg_token" in targets and "backbone.dist_token" in given:
        given["backbone.reg_token"] = given.pop("backbone.dist_token")
    loaded = {name: _fit(name, given[name], target, source) for name, target in targets.items() if name in given}
    resampled = tuple(name for name in loaded if given[name].shape != targets[name].shape)
    missing = tuple(name for name in targets if name not in loaded)
    unused = tuple(name.removeprefix("backbone.") for name in given if name not in targets)
    _check_same_architecture(network.config.arch, loaded, missing, unused, source)
    network.student.load_state_dict(loaded, strict=False)
    network.reset_teacher()
    return PretrainedReport(source, tuple(loaded), resampled, missing, unused, lineage)


def published_license(source: str) -> str:
    """Returns the SPDX name of the license of the weights of a timm name or of a name of `BACKBONES`."""
    if source in BACKBONES:
        return BACKBONES[source].license or UNKNOWN_ARCH_LICENSE
    config = timm.models.get_pretrained_cfg(_checked_timm_name(source))
    license = (config.license if config else None) or "not stated by timm"
    return {"apache-2.0": "Apache-2.0", "cc-by-nc-4.0": "CC-BY-NC-4.0", "mit": "MIT"}.get(license, license)


def _is_file(source: str) -> bool:
    path = builtin.resolve(source)
    return path.suffix in FILE_SUFFIXES or len(path.parts) > 1 or path.is_file()


def _read(source: str, key: DecryptionKey | None, trust: TrustPolicy) -> tuple[dict[str, Tensor], Lineage]:
    """Returns weights and lineage from a single read of the file, which may be replaced at any time."""
    is_download = source in BACKBONES or not _is_file(source)
    if is_download and trust != NO_POLICY:
        setting = "trusted_signers" if trust.signers else "train.pretrained_model_sha256"
        raise ConfigError(
            f"{setting}: {source} is no file but a name of timm, whose weights are downloaded and have no signature; "
            "give the path of a file that you have checked (sha256sum) or signed (mal-train sign)"
        )
    if source in BACKBONES:
        return _download(_published_name(source)), Lineage(source, published_license(source))
    if is_download:
        return _download(_checked_timm_name(source)), Lineage(source, published_license(source))
    path = builtin.resolve(source)
    if path.suffix == ".malckpt":
        checkpoint = load_checkpoint(path, key, skip_training_state=True, trust=builtin.trust_for(source, trust))
        provenance = builtin.with_card(checkpoint.sha256, checkpoint.provenance)
        return dict(checkpoint.weights), Lineage.from_checkpoint(path, checkpoint.sha256, provenance)
    tensors = read_weight_file(path, trust)
    if any(name.startswith("student.") for name in tensors):
        tensors = from_tao(tensors, source).weights
    return tensors, Lineage(path.name, NOT_STATED)


def _published_name(arch: str) -> str:
    name = BACKBONES[arch].pretrained
    if name is None:
        raise ConfigError(
            f"pretrained weights {arch!r}: timm has none for this arch; give a file, or train from random weights"
        )
    return name


def _checked_timm_name(source: str) -> str:
    if timm.is_model(source) and timm.models.is_model_pretrained(source):
        return source
    near = difflib.get_close_matches(
        source, [*BACKBONES, *timm.list_pretrained("*vit*"), *timm.list_pretrained("deit*")], 1
    )
    hint = f"did you mean {near[0]!r}? " if near else ""
    known = sorted({size.pretrained for size in BACKBONES.values() if size.pretrained})
    raise ConfigError(
        f"pretrained weights {source!r}: neither a file nor a timm model with published weights; {hint}"
        f"timm models of the backbones: {', '.join(known)}"
    )


def _download(name: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except OSError as error:  # raised by both download paths of timm without connection, permission or disk space
        raise ConfigError(
            f"pretrained weights {name}: the download failed ({error}); download the file elsewhere and set "
            "train.pretrained_model_path to its path, or to null, which trains without pretrained weights"
        ) from error
    return weights


def _student_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Returns the tensors under the student's names, from a complete network or a backbone with or without a prefix."""
    student = {name.removeprefix("student."): t for name, t in tensors.items() if name.startswith("student.")}
    if student:
        return student
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        if any(f"{prefix}blocks.0.attn.{first}.weight" in tensors for first in ("qkv", "q")):
            return {f"backbone.{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items()}
    first = ", ".join(list(tensors)[:3])
    raise UnknownLayout(f"pretrained weights {source}: no name matches a backbone; it begins with {first}")


def _fit(name: str, tensor: Tensor, target: Tensor, source: str) -> Tensor:
    """Returns `tensor` in the shape of `target`. Only the position table and the patch convolution are resampled.

    Raises:
        ConfigError: any other tensor has another shape.
    """
    if tensor.shape == target.shape:
        return tensor
    if name == "backbone.pos_embed" and tensor.shape[2:] == target.shape[2:]:
        side = math.isqrt(target.shape[1])
        extra = target.shape[1] - side * side  # positions of the class and distillation tokens
        old_side = math.isqrt(max(tensor.shape[1] - extra, 0))
        if old_side and tensor.shape[1] == extra + old_side * old_side:
            table = tensor.float()
            return torch.cat([table[:, :extra], resampled_positions(table[:, extra:], side)], dim=1)
    if name == "backbone.patch_embed.proj.weight" and tensor.shape[:2] == target.shape[:2]:
        kernel: Tensor = resample_patch_embed(tensor.float(), list(target.shape[2:]))
        return kernel
    raise ConfigError(
        f"pretrained weights {source}: {name} has shape {tuple(tensor.shape)} instead of {tuple(target.shape)}; "
        "use weights of the same model.arch and the same settings of the mask head"
    )


def _check_same_architecture(
    arch: str, loaded: Mapping[str, Tensor], missing: tuple[str, ...], unused: tuple[str, ...], source: str
) -> None:
    absent = [name for name in missing if REQUIRED.match(name.removeprefix("backbone."))]
    unexpected = [name for name in unused if REQUIRED.match(name)]
    if absent or unexpected:
        difference = f"{absent[0]} is missing" if absent else f"{unexpected[0]} is unexpected"
        raise ConfigError(f"pretrained weights {source}: {difference} for {arch}; use weights of the same architecture")
    non_finite = [name for name, tensor in loaded.items() if not bool(torch.isfinite(tensor).all())]
    if non_finite:
        raise ConfigError(f"pretrained weights {source}: {non_finite[0]} holds NaN or infinity; use another file")
