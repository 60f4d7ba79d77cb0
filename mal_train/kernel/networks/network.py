"""MalNetwork: a student and a teacher that map normalized crops to mask logits. Tensors in, tensors out.

A logit is the dot product of the crop's filter K with the feature vector V of a pixel. The mask head computes V from
the feature map, resized by 0.5, 1 or 2 for small, medium and large boxes. Knows nothing of boxes, images, files or
training: `pretrained` and `tao_import` load weights into it, `labeler` runs it.

Letters: N crops, S crop side in px, h = w = S / patch, C backbone width, D width of both heads' outputs.
Source: Lan et al., "Vision transformers are good mask auto-labelers", 2023 (arXiv 2301.03992), section 3, and
its public implementations.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mal_train.core.errors import CheckpointError, ConfigError
from mal_train.core.masks.geometry import Region
from mal_train.core.score_model import ScoreModel
from mal_train.core.settings import MAX_SCALE_RATIO, MAX_SIZES, Branch
from mal_train.kernel.networks.backbones import backbone_size, build_backbone, check_crop_size
from mal_train.kernel.networks.heads import MaskHead, RoiHead, resize
from mal_train.kernel.networks.layers import WithoutInitialization
from mal_train.kernel.networks.recomputation import recomputed
from mal_train.kernel.networks.regions import bilinear_sources, cut, union, whole

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
SIZE_CLASS_SCALE = (0.5, 1.0, 2.0)
"""Side of the mask head's input relative to the feature map, for size classes 0, 1, 2 (small, medium, large)."""
NO_TEACHER = "{}: this checkpoint holds the student only; use branch student, without agreement"
OUTSIDE = -128.0
"""Logit of entries that are not needed: the sigmoid of it is 0 in float32."""
LOGITS_PER_PATCH = 4
"""The logit map has 4h × 4w entries for every size class: a quarter of the crop side for patches of 16 px."""
MAX_MAP_ELEMENTS = 1 << 29
"""Upper bound of the numbers in the mask head's largest feature map of one crop: 2 GiB in float32."""
NAMES_SHOWN = 3
"""Names of weights that a message lists of each kind."""


def check_map_size(config: "ModelConfig", crop_size: int) -> None:
    """Checks that crops of `crop_size` px fit a network, before anything is built.

    Raises:
        ConfigError: no multiple of the patch size, or a feature map of the mask head with over `MAX_MAP_ELEMENTS`.
    """
    check_crop_size(config.arch, crop_size)
    upsampling = max(SIZE_CLASS_SCALE) * config.mask_scale_ratio_pre * max(1.0, config.mask_scale_ratio)
    side = crop_size // backbone_size(config.arch).patch * upsampling
    channels = max(config.mask_head_hidden_channel, config.mask_head_out_channel)
    if channels * side**2 > MAX_MAP_ELEMENTS:
        raise ConfigError(
            f"crop_size: {crop_size} px, model.mask_scale_ratio_pre {config.mask_scale_ratio_pre}, "
            f"model.mask_scale_ratio {config.mask_scale_ratio:g}: the mask head would have {channels} maps of "
            f"{side:.0f} x {side:.0f}, over {MAX_MAP_ELEMENTS} numbers together; reduce one of them"
        )


def check_score_model(config: "ModelConfig", score_model: ScoreModel | None) -> None:
    """Checks that a score model, if there is one, was fitted on features of this network's backbone.

    Raises:
        ConfigError: it needs another number of pooled features than the backbone has channels.
    """
    width = backbone_size(config.arch).width
    if score_model is not None and score_model.pooled != width:
        raise ConfigError(
            f"score_model: fitted on {score_model.pooled} pooled features; the backbone {config.arch} has {width}; "
            "fit it again on this network"
        )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of the network; stored in the checkpoint with the weights.

    Attributes:
        arch: name of a row of `backbones.BACKBONES`.
        mask_head_num_convs: 3×3 convolutions in the mask head, ≥ 1. `core.settings.MAX_SIZES` has the upper bounds.
        mask_head_hidden_channel: channels between them, ≥ 1.
        mask_head_out_channel: D, channels of pixel features and filters, ≥ 1.
        mask_scale_ratio_pre: upsampling before the mask head, ≥ 1.
        mask_scale_ratio: upsampling inside the mask head, in (0, 8].
        not_adjust_scale: if True, the scale does not depend on the size class; the logit map then has the side
            4 · mask_scale_ratio_pre · mask_scale_ratio · h instead of 4h, as in the published code.
        vit_dpr: stochastic depth rate of the last block, in [0, 1); applies to the student in training only.
    """

    arch: str
    mask_head_num_convs: int = 4
    mask_head_hidden_channel: int = 256
    mask_head_out_channel: int = 256
    mask_scale_ratio_pre: int = 1
    mask_scale_ratio: float = 2.0
    not_adjust_scale: bool = False
    vit_dpr: float = 0.0

    def __post_init__(self) -> None:
        backbone_size(self.arch)
        for name, most in MAX_SIZES.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"model.{name}: {str(value)[:40]}; it must be an integer from 1 to {most}")
        if not 0.0 < self.mask_scale_ratio <= MAX_SCALE_RATIO:
            raise ConfigError(
                f"model.mask_scale_ratio: {self.mask_scale_ratio}; it must lie in (0, {MAX_SCALE_RATIO:g}] (TAO uses 2)"
            )
        if not 0.0 <= self.vit_dpr < 1.0:
            raise ConfigError(f"model.vit_dpr: {self.vit_dpr}; it must lie in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form that checkpoints store."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`; raises ConfigError for a field that this version does not know."""
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        if unknown or "arch" not in data:
            raise ConfigError(f"model settings {sorted(data)}: 'arch' is required; unknown fields: {unknown}")
        return cls(**data)


def normalize(images_NHWC: Tensor) -> Tensor:
    """Normalizes crops uint8 (N, S, S, 3) RGB to float32 (N, 3, S, S) with ImageNet's mean and standard deviation.

    The only normalization in the repository: training and labeling must agree to the bit.
    """
    mean = torch.tensor(IMAGE_MEAN, device=images_NHWC.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=images_NHWC.device).view(3, 1, 1)
    pixels = images_NHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(255.0).sub_(mean).div_(std)


def probabilities(logits_N1HW: Tensor, size: int) -> Tensor:
    """Returns foreground probability float32 (N, size, size): sigmoid of bilinearly upsampled logits (N, 1, h, w)."""
    upsampled_NHW = functional.interpolate(logits_N1HW.float(), size=(size, size), mode="bilinear")[:, 0]
    if upsampled_NHW.requires_grad or upsampled_NHW.device.type != "cpu":
        return upsampled_NHW.sigmoid()
    # One crop at a time: vectorized and scalar code round differently, and the split of a tensor between threads
    # decides which entries take the scalar code.
    for crop_HW in upsampled_NHW:
        crop_HW.sigmoid_()
    return upsampled_NHW


class NetworkOutput(NamedTuple):
    """The output of one of the two networks for N crops.

    Attributes:
        logits_N1HW: float32 (N, 1, 4h, 4w); see `MaskNetwork.forward`.
        feat_NCHW: feature maps (N, C, h, w) of the backbone; float32 from an `Engine`.
    """

    logits_N1HW: Tensor
    feat_NCHW: Tensor


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(name[:100] for name in names[:NAMES_SHOWN])
    return shown + (", …" if len(names) > NAMES_SHOWN else "")


class MaskNetwork(nn.Module):
    """Backbone, mask head and RoI head: one of the two networks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.arch, config.vit_dpr)
        width, out = backbone_size(config.arch).width, config.mask_head_out_channel
        self.roi_head = RoiHead(width, out)
        self.mask_head = MaskHead(
            width, config.mask_head_hidden_channel, out, config.mask_head_num_convs, config.mask_scale_ratio
        )
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets whether the backward pass computes the blocks and the mask head again instead of keeping their maps."""
        self.grad_checkpointing = enable
        self.backbone.grad_checkpointing = enable

    def forward(self, x_NCHW: Tensor, size_class_N: Tensor, needed: Sequence[Region] | None = None) -> Tensor:
        """Returns logits float32 (N, 1, 4h, 4w) of normalized crops (N, 3, S, S).

        Args:
            x_NCHW: crops from `normalize`; ConfigError unless S is a multiple of the patch size.
            size_class_N: int64, 0 small, 1 medium, 2 large; −1 yields logits 0 (`settings.network_size_class`). Keep it
                on the CPU: its values control the flow. Ignored if `not_adjust_scale` is set.
            needed: pixels of each crop whose probabilities are needed; None: all. Logits that none of them depends on
                are computed or `OUTSIDE`; the others are the same in both cases.
        """
        return self.output(x_NCHW, size_class_N, needed).logits_N1HW

    def output(self, x_NCHW: Tensor, size_class_N: Tensor, needed: Sequence[Region] | None = None) -> NetworkOutput:
        """Returns the logits and the feature maps of crops; see `forward`."""
        feat_NCHW, filter_ND = self.features(x_NCHW)
        return NetworkOutput(self.mask_logits(feat_NCHW, filter_ND, size_class_N, needed), feat_NCHW)

    def features(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns feature maps (N, C, h, w) and filters (N, D) of normalized crops: the first half of `forward`."""
        side, height = x_NCHW.shape[-1], x_NCHW.shape[-2]
        check_crop_size(self.config.arch, side)
        if side != height:
            raise ConfigError(f"crop: {side} x {height} px; it must be square")
        feat_NCHW = self.backbone(x_NCHW)
        return feat_NCHW, self.roi_head(feat_NCHW)

    def mask_logits(
        self, feat_NCHW: Tensor, filter_ND: Tensor, size_class_N: Tensor, needed: Sequence[Region] | None = None
    ) -> Tensor:
        """Returns the logits of `forward` for feature maps and filters from `features`: its second half."""
        if self.config.not_adjust_scale:
            return resize(self._dot(feat_NCHW, filter_ND, self.config.mask_scale_ratio_pre, needed), 4.0)
        return self._by_size_class(feat_NCHW, filter_ND, size_class_N.tolist(), needed)

    def _by_size_class(
        self, feat_NCHW: Tensor, filter_ND: Tensor, size_classes: list[int], needed: Sequence[Region] | None
    ) -> Tensor:
        side = LOGITS_PER_PATCH * feat_NCHW.shape[-1]
        groups = [[n for n, c in enumerate(size_classes) if c == index] for index in range(len(SIZE_CLASS_SCALE))]
        parts: list[Tensor] = []
        for scale, members in zip(SIZE_CLASS_SCALE, groups, strict=True):
            if not members:
                continue
            is_full_batch = len(members) == len(size_classes)
            feat = feat_NCHW if is_full_batch else feat_NCHW[members]
            kernel = filter_ND if is_full_batch else filter_ND[members]
            regions = None if needed is None else [needed[n] for n in members]
            part = self._dot(feat, kernel, self.config.mask_scale_ratio_pre * scale, regions)
            if part.shape[-1] != side:
                part = functional.interpolate(part, size=(side, side), mode="bilinear")
            if is_full_batch:
                return part
            parts.append(part)
        # Zero times the filters, not plain zeros: a batch of size class −1 only must still have a backward pass.
        logits_N1HW = (0.0 * filter_ND.float().sum(1))[:, None, None, None].expand(-1, 1, side, side)
        if not parts:
            return logits_N1HW
        order = torch.tensor([n for members in groups for n in members], device=logits_N1HW.device)
        return logits_N1HW.index_copy(0, order, torch.cat(parts))

    def _dot(self, feat_NCHW: Tensor, filter_ND: Tensor, scale: float, needed: Sequence[Region] | None) -> Tensor:
        """Returns K·V, float32 (N, 1, ·, ·), with V computed from the feature map resized by `scale`."""
        map_NCHW = resize(feat_NCHW, scale)
        if needed is None:
            pixels = recomputed(self.mask_head, map_NCHW) if self.grad_checkpointing else self.mask_head(map_NCHW)
            return _filtered(pixels, filter_ND)
        side = self.mask_head.output_side(map_NCHW.shape[-1])
        crop_side = feat_NCHW.shape[-1] * backbone_size(self.config.arch).patch
        logit_side = 4 * (side if self.config.not_adjust_scale else feat_NCHW.shape[-1])
        region = bilinear_sources(bilinear_sources(union(needed), crop_side, logit_side), logit_side, side)
        pixels_NDHW, held = self.mask_head.part(map_NCHW, region)
        product_N1HW = _filtered(pixels_NDHW, filter_ND)
        logits_N1HW = product_N1HW.new_full((len(feat_NCHW), 1, side, side), OUTSIDE)
        cut(logits_N1HW, whole(side), region).copy_(cut(product_N1HW, held, region))
        return logits_N1HW


def _filtered(pixels_NDHW: Tensor, filter_ND: Tensor) -> Tensor:
    """Returns the product of each crop's filter and the features of its pixels, float32 (N, 1, H, W)."""
    if len(pixels_NDHW) == 1:
        # A linear layer for one crop: on a CPU, torch.bmm of a single bfloat16 matrix is 16 times slower.
        return functional.linear(pixels_NDHW.permute(0, 2, 3, 1), filter_ND).permute(0, 3, 1, 2).float()
    product_N1P = torch.bmm(filter_ND[:, None], pixels_NDHW.flatten(2))
    return product_N1P.view(-1, 1, *pixels_NDHW.shape[-2:]).float()


class MalNetwork(nn.Module):
    """The student, trained by gradient descent, and the teacher, the moving average of its weights.

    Weights are named `student.…` and `teacher.…`, each with `backbone`, `roi_head` and `mask_head`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.student = MaskNetwork(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.eval()
        self.has_teacher = True

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: Mapping[str, Tensor]) -> "MalNetwork":
        """Builds a network for inference that shares its weights with the given tensors, without a copy.

        Raises:
            CheckpointError: see `load`.
        """
        with torch.device("meta"), WithoutInitialization():
            network = cls(config)
        network.load({name: w.float() if w.is_floating_point() else w for name, w in weights.items()}, assign=True)
        return network

    def load(self, weights: Mapping[str, Tensor], *, assign: bool = False) -> None:
        """Loads the weights of a checkpoint: of both networks, or of the student only.

        Without a teacher, `logits` refuses all branches except student.

        Args:
            weights: name → tensor.
            assign: uses the tensors themselves instead of copying them.

        Raises:
            CheckpointError: names, shapes or types do not match.
        """
        self.has_teacher = any(name.startswith("teacher.") for name in weights)
        misfit = self.misfit(weights)
        if misfit:
            raise CheckpointError(
                f"the weights do not fit the settings of their network ({self.config.arch}): {misfit}; create the file "
                "again"
            )
        if self.has_teacher:
            self.load_state_dict(weights, assign=assign)
            return
        students = {name.removeprefix("student."): weight for name, weight in weights.items()}
        self.student.load_state_dict(students, assign=assign)
        # Shares memory with the student; a network without a teacher is never trained.
        self.teacher = self.student

    def misfit(self, weights: Mapping[str, Tensor]) -> str:
        """Describes the weights that are missing or unknown or of another shape, some by name; empty if all fit.

        Without any weight of a teacher, those of the student are enough.
        """
        has_teacher = any(name.startswith("teacher.") for name in weights)
        own = {name: w for name, w in self.state_dict().items() if has_teacher or name.startswith("student.")}
        shapes = [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(weight.shape)}"
            for name, weight in own.items()
            if name in weights and weights[name].shape != weight.shape
        ]
        types = [
            f"{name} {weights[name].dtype}"
            for name, weight in own.items()
            if name in weights and weight.is_floating_point() and not weights[name].is_floating_point()
        ]
        groups = {
            "missing": [name for name in own if name not in weights],
            "unknown": [name for name in weights if name not in own],
            "of another shape": shapes,
            "of another type": types,
        }
        return "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in groups.items() if names)

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights of both networks, or of the student if there is no teacher. Inverse of `load`."""
        return {
            name: weight
            for name, weight in self.state_dict().items()
            if self.has_teacher or name.startswith("student.")
        }

    def train(self, mode: bool = True) -> "MalNetwork":
        """Sets the mode of the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def reset_teacher(self) -> None:
        """Copies the student's weights to the teacher."""
        self.teacher.load_state_dict(self.student.state_dict())

    def logits(
        self,
        x_NCHW: Tensor,
        size_class_N: Tensor,
        branch: Branch = Branch.STUDENT,
        needed: Sequence[Region] | None = None,
    ) -> Tensor:
        """Returns logits float32 (N, 1, 4h, 4w) of one branch; see `MaskNetwork.forward`. The teacher has no gradients.

        `mixed` is the mean of both logit maps. In float32 on a CPU the last bits depend on batch size and number of
        threads, because matrix products split their sums by size.
        """
        if branch is Branch.STUDENT:
            return self._student(x_NCHW, size_class_N, needed)
        with torch.no_grad():
            teacher: Tensor = self.branch_network(Branch.TEACHER)(x_NCHW, size_class_N, needed)
        return teacher if branch is Branch.TEACHER else (self._student(x_NCHW, size_class_N, needed) + teacher) / 2

    def branch_network(self, branch: Branch) -> MaskNetwork:
        """Returns the student or the teacher. Raises ConfigError if the checkpoint has no teacher."""
        if branch is Branch.STUDENT:
            return self.student
        if not self.has_teacher:
            raise ConfigError(NO_TEACHER.format(f"branch {branch}"))
        return self.teacher

    def _student(self, x_NCHW: Tensor, size_class_N: Tensor, needed: Sequence[Region] | None) -> Tensor:
        logits_N1HW: Tensor = self.student(x_NCHW, size_class_N, needed)
        return logits_N1HW
