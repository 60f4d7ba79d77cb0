"""A label is finish(crop, predict(prepare(image, box))): the one implementation that everything else feeds.

Training's validation, `mal-train inference` and the server all call these three. `prepare` and `finish` are CPU work
for thread pools, `predict` belongs on the thread of its device; the object holds no state between calls.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mal_train.core.errors import BadBox, DeviceError, DeviceLost, OutOfDeviceMemory
from mal_train.core.masks import geometry, rle
from mal_train.core.masks.flags import Flag
from mal_train.core.masks.geometry import Box, Region, Window
from mal_train.core.masks.images import RgbImage
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import (
    Branch,
    Compat,
    LabelerConfig,
    calibrated,
    network_size_class,
    size_class,
)
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint
from mal_train.kernel.checkpoint.keys import DecryptionKey
from mal_train.kernel.labeler.components import has_second_part, remove_small_regions
from mal_train.kernel.labeler.overlaps import MaskClaim, assign_pixels
from mal_train.kernel.labeler.scoring import score_of
from mal_train.kernel.networks.network import MalNetwork, normalize, probabilities
from mal_train.kernel.networks.precision import Precision, resolve

ProbMap = NDArray[np.float32]

LOW_AGREEMENT_IOU = 0.8
TINY_SIDE_PX = 2.0

PIXELS_A_PASS = 4 * 512**2
"""Of one or two cores: more leaves the caches (ViT-small, 512 px, bfloat16: 545 ms a crop by four, 610 by eight, 630 by
sixteen), less does not fill the matrix kernels."""

CUDA_ERROR = "CUDA error:"
"""Begins the message of errors of the CUDA runtime: nearly all of them make each later call of the process fail too."""
CUDA_OUT_OF_MEMORY = "CUDA error: out of memory"
"""The exception: the device stays usable."""


@dataclass(frozen=True)
class Crop:
    """A box ready for the network: its pixels and the way back.

    Attributes:
        pixels: (S, S, 3) uint8 RGB.
        box_xywh: the caller's box, unchanged.
        box_inside: the part of it inside the image, which is what gets labeled.
        window: the image window that the pixels show.
        image_hw: height and width of the image in px.
        area: px² of box_inside; decides the network's size branch and the threshold.
    """

    pixels: NDArray[np.uint8]
    box_xywh: Box
    box_inside: Box
    window: Window
    image_hw: tuple[int, int]
    area: float

    @property
    def was_clipped(self) -> bool:
        """The caller's box left its image."""
        return self.box_inside != self.box_xywh


@dataclass(frozen=True)
class PredictOptions:
    """How the network is run. Crops may share a batch exactly when these are equal.

    Attributes:
        branch: student, teacher, or the mean of their logits.
        agreement: also run the other network, so that `finish` can give the IoU of student and teacher.
        flip: average the logits with those of the mirrored crop.
    """

    branch: Branch = Branch.STUDENT
    agreement: bool = False
    flip: bool = False


@dataclass(frozen=True)
class Prediction:
    """Foreground probability (S, S) float32 of one crop; student's and teacher's own maps when agreement was asked."""

    prob: ProbMap
    student: ProbMap | None = None
    teacher: ProbMap | None = None


@dataclass(frozen=True)
class Label:
    """The answer for one box.

    Attributes:
        rle: the mask in the whole image.
        score: the mask's stability (`ScoreType`), in [0, 1], or the expected IoU where the checkpoint carries a
            calibration; 0 for an empty mask.
        area: mask pixels.
        mask_box: tight box of the mask; None when it is empty.
        agreement: IoU of student's and teacher's masks, when asked.
        flags: properties to check; see `FLAG_DESCRIPTIONS`.
    """

    rle: Rle
    score: float
    area: int
    mask_box: Box | None
    agreement: float | None
    flags: tuple[Flag, ...]


class Labeler:
    """Labels boxes with one network on one device.

    Args:
        network: weights of student and teacher; moved to the device and set to evaluation.
        config: crop, thresholds, clip rule.
        device: torch device name.
        precision: number format of the network; `auto` is float32 under `compat: tao`. Masks are byte-equal across
            batch sizes only in float32 on a CPU.
    """

    def __init__(
        self,
        network: MalNetwork,
        config: LabelerConfig,
        *,
        device: str | torch.device = "cpu",
        precision: Precision | str = Precision.AUTO,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype_on(self.device, config, precision)
        self.config = config
        self.network = network.to(self.device).eval()

    @property
    def runs_crops_alone(self) -> bool:
        """Whether `predict` runs one crop a pass, however many it is given."""
        return self.device.type == "cpu" and self.dtype is torch.float32

    def crops_a_pass(self, side: int) -> int:
        """How many crops of `side` px go through the network together, however many `predict` is given."""
        if self.device.type != "cpu":
            return sys.maxsize
        if self.runs_crops_alone:
            # The reference: matrix kernels round differently for other batch sizes, and a mask must not depend on who
            # shares its batch.
            return 1
        return max(PIXELS_A_PASS * max(torch.get_num_threads(), 2) // 2 // side**2, 1)

    def with_margin(self, margin_rate: float) -> "Labeler":
        """The same network with another growth of the boxes."""
        config = dataclasses.replace(self.config, margin_rate=margin_rate)
        return Labeler(self.network, config, device=self.device, precision=str(self.dtype).removeprefix("torch."))

    def prepare(self, image: RgbImage, boxes: Sequence[Sequence[float]], *, first: int = 0) -> list[Crop | BadBox]:
        """One crop, or the reason why there is none, for each box (x, y, width, height px), in order.

        `image` is (H, W, 3) uint8 RGB. `first`: how errors count the first box, where a request comes in pieces.
        """
        return [self._prepare_one(image, box, f"box {index}") for index, box in enumerate(boxes, start=first)]

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:
        """Foreground probabilities of crops of any images, in order; maps have the side of their crops.

        Raises:
            OutOfDeviceMemory: the batch does not fit; a smaller one may.
            DeviceLost: no batch will ever run here again, for example after an illegal memory access.
            DeviceError: any other failure of the device.
        """
        if not crops:
            return []
        try:
            size = min(self.crops_a_pass(len(crops[0].pixels)), len(crops))
            parts = [self._predict_batch(crops[i : i + size], options) for i in range(0, len(crops), size)]
            return [probability for part in parts for probability in part]
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(
                f"a batch of {len(crops)} crops does not fit into {self.device}: {error}"
            ) from error
        except RuntimeError as error:
            if str(error).startswith(CUDA_OUT_OF_MEMORY):
                raise OutOfDeviceMemory(f"a batch of {len(crops)} crops does not fit into {self.device}") from error
            if str(error).startswith(CUDA_ERROR):
                raise DeviceLost(f"{self.device} is lost, start the process anew: {error}") from error
            raise DeviceError(f"{self.device} failed on a batch of {len(crops)} crops: {error}") from error

    def finish(
        self,
        crop: Crop,
        probability: Prediction,
        *,
        threshold: float | None = None,
        min_component_area_px: int = 0,
    ) -> Label:
        """Mask, score and flags in image pixels.

        Args:
            crop: from `prepare`.
            probability: its answer from `predict`.
            threshold: in (0, 1); replaces the one of the box's size class.
            min_component_area_px: connected parts with fewer pixels are taken out of the mask, the largest excepted
                (`parts.without_specks`), before score, area, box, agreement and flags are made.
        """
        claim = self.claim(crop, probability, threshold=threshold)
        mask = remove_small_regions(claim.mask, min_component_area_px)
        agreement = self._agreement(crop, probability, claim.region, claim.limit, min_component_area_px)
        return self.answer(crop, claim, mask, agreement, min_component_area_px)

    def finish_together(
        self,
        answers: Sequence[tuple[Crop, Prediction]],
        *,
        threshold: float | None = None,
        min_component_area_px: int = 0,
    ) -> list[Label]:
        """`finish` of boxes of one image, except that no pixel is in two masks (`overlaps.resolve_overlaps`).

        Specks are taken out of what each box is left with. Agreement is that of the masks before they were shared out.
        """
        claims = [self.claim(crop, probability, threshold=threshold) for crop, probability in answers]
        kept = assign_pixels(claims, answers[0][0].image_hw) if answers else []
        return [
            self.answer(
                crop,
                claim,
                remove_small_regions(mask, min_component_area_px),
                self._agreement(crop, probability, claim.region, claim.limit, min_component_area_px),
                min_component_area_px,
            )
            for (crop, probability), claim, mask in zip(answers, claims, kept, strict=True)
        ]

    def claim(self, crop: Crop, probability: Prediction, *, threshold: float | None = None) -> MaskClaim:
        """What a box claims of its image before anything is cut from it; `threshold` as in `finish`."""
        limit = self.config.mask_thres[int(size_class(crop.area))] if threshold is None else threshold
        region = self._region(crop)
        return MaskClaim(region, self._values(crop, probability.prob, region), limit)

    def answer(
        self,
        crop: Crop,
        claim: MaskClaim,
        mask: NDArray[np.bool_],
        agreement: float | None = None,
        min_component_area_px: int = 0,
    ) -> Label:
        """The label of a box that gets these of its claimed pixels (rows, columns of the claim's region)."""
        code = rle.encode_region(mask, claim.region.row0, claim.region.col0, crop.image_hw)
        area = int(np.count_nonzero(mask))
        score = score_of(self.config.score_type, claim, mask, min_component_area_px) if area else 0.0
        if self.config.calibration is not None:
            score = calibrated(score, self.config.calibration)
        return Label(
            rle=code,
            score=score,
            area=area,
            mask_box=rle.to_box(code),
            agreement=agreement,
            flags=_flags(crop, mask, area, agreement),
        )

    def label(
        self,
        image: RgbImage,
        boxes: Sequence[Sequence[float]],
        options: PredictOptions = PredictOptions(),
        *,
        threshold: float | None = None,
        batch_size: int = 8,
    ) -> list[Label | BadBox]:
        """A label, or the reason why there is none, for each box (x, y, width, height px) of an image, in order."""
        entries = self.prepare(image, boxes)
        crops = [entry for entry in entries if isinstance(entry, Crop)]
        found: list[Prediction] = []
        for start in range(0, len(crops), batch_size):
            found += self.predict(crops[start : start + batch_size], options)
        answers = iter([self.finish(crop, prob, threshold=threshold) for crop, prob in zip(crops, found, strict=True)])
        return [next(answers) if isinstance(entry, Crop) else entry for entry in entries]

    def _prepare_one(self, image: RgbImage, box: Sequence[float], name: str) -> Crop | BadBox:
        image_hw = (image.shape[0], image.shape[1])
        try:
            inside, clipped = geometry.check_box(box, image_hw, name)
        except BadBox as error:
            return error
        window = geometry.test_window(inside, self.config.margin_rate)
        pixels = geometry.resize_crop(geometry.cut(image, window), self.config.crop_size)
        x, y, w, h = (float(v) for v in box)
        users_box = (x, y, w, h) if clipped else inside
        return Crop(pixels, users_box, inside, window, image_hw, geometry.box_area(inside))

    def _predict_batch(self, crops: Sequence[Crop], options: PredictOptions) -> list[Prediction]:
        areas = [crop.area for crop in crops]
        branch = torch.from_numpy(network_size_class(areas, self.config.compat))
        stacked = torch.from_numpy(np.stack([crop.pixels for crop in crops])).to(self.device, non_blocking=True)
        with torch.inference_mode(), self._autocast():
            x = normalize(stacked)
            wanted = {options.branch} | ({Branch.STUDENT, Branch.TEACHER} if options.agreement else set())
            if Branch.MIXED in wanted:
                wanted |= {Branch.STUDENT, Branch.TEACHER}
            logits = {which: self._logits(x, branch, which, options.flip) for which in wanted - {Branch.MIXED}}
            if Branch.MIXED in wanted:
                logits[Branch.MIXED] = (logits[Branch.STUDENT] + logits[Branch.TEACHER]) / 2
            maps = {which: probabilities(z.float(), x.shape[-1]).cpu().numpy() for which, z in logits.items()}
        main = maps[options.branch]
        if not options.agreement:
            return [Prediction(prob) for prob in main]
        students, teachers = maps[Branch.STUDENT], maps[Branch.TEACHER]
        return [Prediction(*triple) for triple in zip(main, students, teachers, strict=True)]

    def _logits(self, x: torch.Tensor, branch: torch.Tensor, which: Branch, flip: bool) -> torch.Tensor:
        logits = self.network.logits(x, branch, which).float()
        if flip:
            logits = (logits + self.network.logits(x.flip(-1), branch, which).float().flip(-1)) / 2
        return logits

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _region(self, crop: Crop) -> Region:
        if self.config.compat is Compat.TAO:
            height, width = crop.image_hw
            window = crop.window
            return Region(max(window.x0, 0), max(window.y0, 0), min(window.x1, width), min(window.y1, height))
        return geometry.box_pixels(crop.box_inside, crop.image_hw)

    def _values(self, crop: Crop, prob: ProbMap, region: Region) -> ProbMap:
        if region.is_empty:
            return np.zeros((max(region.row1 - region.row0, 0), max(region.col1 - region.col0, 0)), np.float32)
        if self.config.compat is Compat.TAO:
            # The published code cuts at the box on the crop's grid, not in the image; the edge is blurred on the way.
            prob = prob * geometry.box_mask_in_window(
                crop.box_inside, crop.window, crop.image_hw, prob.shape[0], Compat.TAO
            ).astype(np.float32)
        return geometry.paste(prob, crop.window, region)

    def _agreement(
        self, crop: Crop, probability: Prediction, region: Region, limit: float, min_component_area_px: int
    ) -> float | None:
        if probability.student is None or probability.teacher is None:
            return None
        a, b = (
            remove_small_regions(self._values(crop, prob, region) > limit, min_component_area_px)
            for prob in (probability.student, probability.teacher)
        )
        union = np.count_nonzero(a | b)
        return float(np.count_nonzero(a & b) / union) if union else 1.0


def dtype_on(device: torch.device, config: LabelerConfig, precision: Precision | str) -> torch.dtype:
    """The number format in which a labeler of these settings computes; ConfigError for float16 on a CPU."""
    if config.compat is Compat.TAO and precision == Precision.AUTO:
        precision = Precision.FLOAT32  # whoever asks for the published numbers wants their digits, too
    return resolve(precision, device)


def load_labeler(
    path: Path,
    *,
    key: DecryptionKey | None = None,
    device: str | torch.device = "cpu",
    precision: Precision | str = Precision.AUTO,
) -> tuple[Labeler, Checkpoint]:
    """A labeler from a sealed checkpoint, and the checkpoint itself (categories, provenance).

    Raises:
        CheckpointError: see `mal_train.kernel.checkpoint.checkpoint.load_checkpoint`.
    """
    # An optimizer's state in a resume file is never held.
    checkpoint = load_checkpoint(path, key, weights_only_kind=True)
    return build_labeler(checkpoint, device=device, precision=precision), checkpoint


def build_labeler(
    checkpoint: Checkpoint, *, device: str | torch.device = "cpu", precision: Precision | str = Precision.AUTO
) -> Labeler:
    """A labeler with a checkpoint's weights; on the CPU they are those of the checkpoint itself, not a copy."""
    network = MalNetwork.of(checkpoint.model, checkpoint.weights)
    return Labeler(network, checkpoint.labeler, device=device, precision=precision)


def _flags(crop: Crop, mask: NDArray[np.bool_], area: int, agreement: float | None) -> tuple[Flag, ...]:
    box = geometry.box_pixels(crop.box_inside, crop.image_hw)
    box_count = 0 if box.is_empty else (box.col1 - box.col0) * (box.row1 - box.row0)
    found = {
        Flag.BOX_CLIPPED: crop.was_clipped,
        Flag.EMPTY_MASK: area == 0,
        Flag.FULL_BOX: area > 0 and area >= box_count,
        Flag.TOO_SMALL: min(crop.box_inside[2:]) <= TINY_SIDE_PX,
        Flag.LOW_AGREEMENT: agreement is not None and agreement < LOW_AGREEMENT_IOU,
        Flag.MULTI_PART: area > 0 and has_second_part(mask),
    }
    return tuple(name for name, is_set in found.items() if is_set)
