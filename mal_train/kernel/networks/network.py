"""MalNetwork: a student and a teacher that turn normalized crops into mask logits. Tensors in, tensors out.

A logit is the dot product of a filter K, one for each crop, with a feature vector V at each pixel. The mask head that
gives V runs on the feature map at half, single or double resolution for small, medium and large boxes. Knows nothing
of boxes, images, files or training; `pretrained` and `foreign` fill it, `mal_train.kernel.labeler.labeler` runs it.

Letters: N crops, S crop side in px, h = w = S / patch, C backbone width, D width of both heads' outputs.
Source: Lan et al., "Vision transformers are good mask auto-labelers", 2023, and its public implementations.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch
from mal_train.kernel.networks.backbones import backbone_size, build_backbone, check_crop_size
from mal_train.kernel.networks.heads import MaskHead, RoiHead, resize

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
BRANCH_SCALE = (0.5, 1.0, 2.0)
"""Resolution of the mask head's input, relative to the feature map, for branches 0, 1, 2 (small, medium, large)."""
NO_TEACHER = "{}: this checkpoint holds the student alone; ask for the student, without agreement"
LOGITS_PER_PATCH = 4
"""The logit map has 4h × 4w entries whatever the branch: a quarter of the crop side for patches of 16 px."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the network; travels in the checkpoint beside the weights.

    Attributes:
        arch: a row of `mal_train.kernel.networks.backbones.BACKBONES`.
        mask_head_num_convs: 3×3 convolutions in the mask head, ≥ 1.
        mask_head_hidden_channel: width between them, ≥ 1.
        mask_head_out_channel: D, width of pixel features and filters, ≥ 1.
        mask_scale_ratio_pre: upsampling before the mask head, ≥ 1.
        mask_scale_ratio: upsampling inside the mask head, > 0.
        not_adjust_scale: True gives every box the same resolution; the logit map then has the side
            4 · mask_scale_ratio_pre · mask_scale_ratio · h instead of 4h, as in the published code.
        vit_dpr: stochastic depth rate of the last block, in [0, 1); acts in training and on the student only.
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
        for name in (
            "mask_head_num_convs",
            "mask_head_hidden_channel",
            "mask_head_out_channel",
            "mask_scale_ratio_pre",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: {getattr(self, name)}; it must be 1 or more")
        if not 0.0 < self.mask_scale_ratio <= 8.0:
            raise ConfigError(f"model.mask_scale_ratio: {self.mask_scale_ratio}; it must lie in (0, 8] (TAO uses 2)")
        if not 0.0 <= self.vit_dpr < 1.0:
            raise ConfigError(f"model.vit_dpr: {self.vit_dpr}; it must lie in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form kept in checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`; ConfigError on a field that this version does not know."""
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        if unknown or "arch" not in data:
            raise ConfigError(f"model settings {sorted(data)}: 'arch' is needed, and {unknown} are not known")
        return cls(**data)


def normalize(images_NHWC: Tensor) -> Tensor:
    """Crops uint8 (N, S, S, 3), RGB, as float32 (N, 3, S, S) with ImageNet's mean and deviation taken out.

    The only normalization in the repository: training and labeling must agree on it to the bit.
    """
    mean = torch.tensor(IMAGE_MEAN, device=images_NHWC.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=images_NHWC.device).view(3, 1, 1)
    pixels = images_NHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(255.0).sub_(mean).div_(std)


def probabilities(logits_N1HW: Tensor, size: int) -> Tensor:
    """Foreground probability float32 (N, size, size): the logits, upsampled bilinearly, through a sigmoid."""
    upsampled_NHW = functional.interpolate(logits_N1HW.float(), size=(size, size), mode="bilinear")[:, 0]
    if upsampled_NHW.requires_grad or upsampled_NHW.device.type != "cpu":
        return upsampled_NHW.sigmoid()
    # Crop by crop: how threads share a tensor decides which entries take the vector path, which rounds otherwise.
    for crop_HW in upsampled_NHW:
        crop_HW.sigmoid_()
    return upsampled_NHW


class MaskNetwork(nn.Module):
    """Backbone, mask head and RoI head of one of the two networks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.arch, config.vit_dpr)
        width, out = backbone_size(config.arch).width, config.mask_head_out_channel
        self.roi_head = RoiHead(width, out)
        self.mask_head = MaskHead(
            width, config.mask_head_hidden_channel, out, config.mask_head_num_convs, config.mask_scale_ratio
        )

    def forward(self, x_NCHW: Tensor, branch_N: Tensor) -> Tensor:
        """Logits float32 (N, 1, 4h, 4w) of normalized crops (N, 3, S, S).

        Args:
            x_NCHW: what `normalize` gives. ConfigError if S is no multiple of the patch size.
            branch_N: int64 size branch of each crop, 0 small, 1 medium, 2 large; −1 belongs to none and gets logits 0
                (`mal_train.core.settings.network_size_class`). Best on the CPU: its values steer the control flow.
                Without effect under `not_adjust_scale`.
        """
        side, height = x_NCHW.shape[-1], x_NCHW.shape[-2]
        check_crop_size(self.config.arch, side)
        if side != height:
            raise ConfigError(f"crop of {side} x {height} px; the network takes square ones")
        feat_NCHW = self.backbone(x_NCHW)
        filter_ND = self.roi_head(feat_NCHW)
        if self.config.not_adjust_scale:
            return resize(self._dot(feat_NCHW, filter_ND, self.config.mask_scale_ratio_pre), 4.0)
        return self._by_branch(feat_NCHW, filter_ND, branch_N.tolist())

    def _by_branch(self, feat_NCHW: Tensor, filter_ND: Tensor, branches: list[int]) -> Tensor:
        size = tuple(LOGITS_PER_PATCH * side for side in feat_NCHW.shape[-2:])
        groups = [[n for n, branch in enumerate(branches) if branch == wanted] for wanted in range(len(BRANCH_SCALE))]
        parts: list[Tensor] = []
        for scale, members in zip(BRANCH_SCALE, groups, strict=True):
            if not members:
                continue
            everything = len(members) == len(branches)
            feat = feat_NCHW if everything else feat_NCHW[members]
            kernel = filter_ND if everything else filter_ND[members]
            part = self._dot(feat, kernel, self.config.mask_scale_ratio_pre * scale)
            if part.shape[-2:] != size:
                part = functional.interpolate(part, size=size, mode="bilinear")
            if everything:
                return part
            parts.append(part)
        # Zero times the filters, not plain zeros: a batch that belongs to no branch still has a backward pass.
        logits_N1HW = (0.0 * filter_ND.float().sum(1))[:, None, None, None].expand(-1, 1, *size)
        if not parts:
            return logits_N1HW
        order = torch.tensor([n for members in groups for n in members], device=logits_N1HW.device)
        return logits_N1HW.index_copy(0, order, torch.cat(parts))

    def _dot(self, feat_NCHW: Tensor, filter_ND: Tensor, scale: float) -> Tensor:
        """K·V, float32 (N, 1, ·, ·)."""
        pixels_NDHW = self.mask_head(resize(feat_NCHW, scale))
        if len(pixels_NDHW) == 1:
            # One crop as a linear layer: the batched product of a single bfloat16 matrix is 16 times slower on a CPU.
            return functional.linear(pixels_NDHW.permute(0, 2, 3, 1), filter_ND).permute(0, 3, 1, 2).float()
        product_N1P = torch.bmm(filter_ND[:, None], pixels_NDHW.flatten(2))
        return product_N1P.view(-1, 1, *pixels_NDHW.shape[-2:]).float()


class MalNetwork(nn.Module):
    """The student, which learns by gradient, and the teacher, its moving average.

    Weights are named `student.…` and `teacher.…`, with `backbone`, `roi_head` and `mask_head` below each.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.student = MaskNetwork(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.eval()
        self.has_teacher = True

    @classmethod
    def of(cls, config: ModelConfig, weights: Mapping[str, Tensor]) -> "MalNetwork":
        """A network that takes these very tensors as its weights: nothing is drawn, nothing copied.

        To label with: whoever trains it changes them. RuntimeError as `load`.
        """
        with torch.device("meta"):
            network = cls(config)
        network.load({name: w.float() if w.is_floating_point() else w for name, w in weights.items()}, assign=True)
        return network

    def load(self, weights: Mapping[str, Tensor], *, assign: bool = False) -> None:
        """Fill from the weights of a checkpoint: of both networks, or of the student alone.

        A network of the student alone answers as the student; `logits` refuses the rest. RuntimeError where names or
        shapes do not fit.

        Args:
            weights: copied into those that are there.
            assign: they take the place of those that are there instead.
        """
        self.has_teacher = any(name.startswith("teacher.") for name in weights)
        if self.has_teacher:
            self.load_state_dict(weights, assign=assign)
            return
        students = {name.removeprefix("student."): weight for name, weight in weights.items()}
        self.student.load_state_dict(students, assign=assign)
        # One copy in memory; nothing may train it.
        self.teacher = self.student

    def weights(self) -> dict[str, Tensor]:
        """What `load` takes: of both networks, or of the student where there is no other."""
        return {
            name: weight
            for name, weight in self.state_dict().items()
            if self.has_teacher or name.startswith("student.")
        }

    def train(self, mode: bool = True) -> "MalNetwork":
        """Training mode of the student; the teacher never drops anything and stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def reset_teacher(self) -> None:
        """Make the teacher a copy of the student again, after the student was filled from elsewhere."""
        self.teacher.load_state_dict(self.student.state_dict())

    def logits(self, x_NCHW: Tensor, branch_N: Tensor, which: Branch = Branch.STUDENT) -> Tensor:
        """Logits float32 (N, 1, 4h, 4w) as `MaskNetwork.forward`; gradients reach the student only.

        `mixed` is the mean of both logit maps. In float32 on a CPU the last bits of a logit depend on how many crops
        share the batch and on the number of threads, because matrix products block their sums by size.
        """
        if which is Branch.STUDENT:
            return self._student(x_NCHW, branch_N)
        if not self.has_teacher:
            raise ConfigError(NO_TEACHER.format(f"branch {which}"))
        with torch.no_grad():
            teacher: Tensor = self.teacher(x_NCHW, branch_N)
        return teacher if which is Branch.TEACHER else (self._student(x_NCHW, branch_N) + teacher) / 2

    def _student(self, x_NCHW: Tensor, branch_N: Tensor) -> Tensor:
        logits_N1HW: Tensor = self.student(x_NCHW, branch_N)
        return logits_N1HW
