"""Labels boxes: crop → probabilities → mask. The one implementation for validation, `mal-train` and the server.

    labeler, checkpoint = load_labeler(Path("model.malckpt"), device="cuda")

    crops = labeler.prepare(image, boxes)             # CPU: image (H, W, 3) uint8 RGB; boxes (x, y, w, h) in px
    predictions = labeler.predict(crops)              # device: foreground probability (S, S) float32 of each crop
    labels = [labeler.finish(crop, prediction)        # CPU: mask, score and flags in image coordinates
              for crop, prediction in zip(crops, predictions)]

    labels = labeler.label(image, boxes)              # the three steps in one call

`prepare` returns a `BadBox` for a box that cannot be labeled; leave it out before `predict`. A labeler holds no state
between calls: `prepare` and `finish` may run on any thread, `predict` runs on one thread per device.
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
from mal_train.kernel.labeler.components import has_second_component, remove_small_regions
from mal_train.kernel.labeler.overlaps import MaskClaim, assign_pixels
from mal_train.kernel.labeler.scoring import mask_score
from mal_train.kernel.networks.network import MalNetwork, normalize, probabilities
from mal_train.kernel.networks.precision import Precision, resolve

ProbMap = NDArray[np.float32]

LOW_AGREEMENT_IOU = 0.8
TINY_SIDE_PX = 2.0

CPU_PIXELS_PER_PASS = 4 * 512**2
"""Pixels in one forward pass on one or two CPU cores. More exceed the caches (ViT-small, 512 px, bfloat16: 545 ms per
crop for 4 crops, 610 for 8, 630 for 16); fewer do not fill the matrix kernels."""

CUDA_ERROR = "CUDA error:"
"""Prefix of CUDA runtime errors. After nearly all of them every later call of the process fails too."""
CUDA_OUT_OF_MEMORY = "CUDA error: out of memory"
"""The exception to that: the device stays usable."""


@dataclass(frozen=True)
class Crop:
    """The network's input for one box, and the geometry that maps its output back to the image.

    Attributes:
        pixels: (S, S, 3) uint8 RGB.
        box_xywh: the caller's box, unchanged.
        box_inside: the box clipped to the image, as x, y, w, h; this is the box that is labeled.
        window: image region that the pixels show; it may extend beyond the image.
        image_hw: height and width of the image in px.
        area: area of box_inside in px²; selects the size class of the network and the threshold.
    """

    pixels: NDArray[np.uint8]
    box_xywh: Box
    box_inside: Box
    window: Window
    image_hw: tuple[int, int]
    area: float

    @property
    def was_clipped(self) -> bool:
        """True if the caller's box extends beyond the image."""
        return self.box_inside != self.box_xywh


@dataclass(frozen=True)
class PredictOptions:
    """Options of a forward pass. Crops share a batch only if their options are equal.

    Attributes:
        branch: student, teacher, or the mean of their logits.
        agreement: also runs the other network, so that `finish` can compute the IoU of student and teacher.
        flip: averages the logits with those of the mirrored crop.
    """

    branch: Branch = Branch.STUDENT
    agreement: bool = False
    flip: bool = False


@dataclass(frozen=True)
class Prediction:
    """The network's output for one crop.

    Attributes:
        prob: foreground probability (S, S) float32, in [0, 1], of the requested branch.
        student: the student's map, if `PredictOptions.agreement` is set.
        teacher: the teacher's map, if `PredictOptions.agreement` is set.
    """

    prob: ProbMap
    student: ProbMap | None = None
    teacher: ProbMap | None = None


@dataclass(frozen=True)
class Label:
    """The result for one box.

    Attributes:
        rle: mask of the full image.
        score: in [0, 1]: the expected IoU if the checkpoint carries a calibration, else the mask's `ScoreType`; 0 for
            an empty mask.
        area: pixels in the mask.
        mask_box: tight box of the mask as x, y, w, h; None for an empty mask.
        agreement: IoU of the student's and the teacher's mask; None unless requested.
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
        network: weights of student and teacher; moved to the device and switched to evaluation mode.
        config: crop size, thresholds, clip rule and calibration.
        device: torch device.
        precision: dtype of the forward pass; `auto` is float32 under `compat: tao`. Masks are identical for every batch
            size only in float32 on a CPU.
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
        self.dtype = compute_dtype(self.device, config, precision)
        self.config = config
        self.network = network.to(self.device).eval()

    def prepare(self, image: RgbImage, boxes: Sequence[Sequence[float]], *, first: int = 0) -> list[Crop | BadBox]:
        """Cuts a crop for each box, in order.

        Args:
            image: (H, W, 3) uint8 RGB.
            boxes: x, y, width, height in px of the image.
            first: index of the first box in error messages, for requests that arrive in pieces.

        Returns:
            A crop for each box, or the `BadBox` that says why the box cannot be labeled.
        """
        return [self._prepare_one(image, box, f"box {index}") for index, box in enumerate(boxes, start=first)]

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:
        """Runs the network on crops of any images. Returns one prediction for each crop, in order.

        Raises:
            OutOfDeviceMemory: the batch does not fit; a smaller one may (`oom.predict_split`).
            DeviceLost: no further batch can run in this process, for example after an illegal memory access.
            DeviceError: any other failure of the device.
        """
        if not crops:
            return []
        try:
            size = min(self.max_crops_per_pass(len(crops[0].pixels)), len(crops))
            passes = [self._predict_batch(crops[i : i + size], options) for i in range(0, len(crops), size)]
            return [prediction for batch in passes for prediction in batch]
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(
                f"a batch of {len(crops)} crops does not fit into {self.device}: {error}"
            ) from error
        except RuntimeError as error:
            if str(error).startswith(CUDA_OUT_OF_MEMORY):
                raise OutOfDeviceMemory(f"a batch of {len(crops)} crops does not fit into {self.device}") from error
            if str(error).startswith(CUDA_ERROR):
                raise DeviceLost(f"{self.device} is lost; restart the process: {error}") from error
            raise DeviceError(f"{self.device} failed on a batch of {len(crops)} crops: {error}") from error

    def finish(
        self,
        crop: Crop,
        prediction: Prediction,
        *,
        threshold: float | None = None,
        min_component_area_px: int = 0,
    ) -> Label:
        """Returns the label of one box: mask, score and flags in image coordinates.

        Args:
            crop: returned by `prepare`.
            prediction: returned by `predict` for this crop.
            threshold: in (0, 1); replaces the threshold of the box's size class.
            min_component_area_px: connected components with fewer pixels are removed from the mask, except the largest
                (`remove_small_regions`), before score, area, box, agreement and flags are computed.
        """
        claim = self.claim(crop, prediction, threshold=threshold)
        mask = remove_small_regions(claim.mask, min_component_area_px)
        agreement = self._agreement(crop, prediction, claim, min_component_area_px)
        return self.label_from_mask(crop, claim, mask, agreement, min_component_area_px)

    def finish_without_overlaps(
        self,
        pairs: Sequence[tuple[Crop, Prediction]],
        *,
        threshold: float | None = None,
        min_component_area_px: int = 0,
    ) -> list[Label]:
        """Returns the labels of all boxes of one image, with each pixel in at most one mask (`assign_pixels`).

        Small components are removed after pixels are assigned. Agreement is computed from the masks before that.

        Args:
            pairs: crop and prediction of each box.
            threshold: see `finish`.
            min_component_area_px: see `finish`.
        """
        claims = [self.claim(crop, prediction, threshold=threshold) for crop, prediction in pairs]
        masks = assign_pixels(claims, pairs[0][0].image_hw) if pairs else []
        return [
            self.label_from_mask(
                crop,
                claim,
                remove_small_regions(mask, min_component_area_px),
                self._agreement(crop, prediction, claim, min_component_area_px),
                min_component_area_px,
            )
            for (crop, prediction), claim, mask in zip(pairs, claims, masks, strict=True)
        ]

    def label(
        self,
        image: RgbImage,
        boxes: Sequence[Sequence[float]],
        options: PredictOptions = PredictOptions(),
        *,
        threshold: float | None = None,
        batch_size: int = 8,
    ) -> list[Label | BadBox]:
        """Labels boxes of one image: `prepare`, `predict` and `finish` in one call.

        Args:
            image: (H, W, 3) uint8 RGB.
            boxes: x, y, width, height in px of the image.
            options: options of the forward pass.
            threshold: see `finish`.
            batch_size: crops in a batch, ≥ 1.

        Returns:
            A label for each box in order, or the `BadBox` that says why there is none.
        """
        prepared = self.prepare(image, boxes)
        crops = [crop for crop in prepared if isinstance(crop, Crop)]
        predictions: list[Prediction] = []
        for start in range(0, len(crops), batch_size):
            predictions += self.predict(crops[start : start + batch_size], options)
        labels = iter([self.finish(crop, p, threshold=threshold) for crop, p in zip(crops, predictions, strict=True)])
        return [next(labels) if isinstance(crop, Crop) else crop for crop in prepared]

    def claim(self, crop: Crop, prediction: Prediction, *, threshold: float | None = None) -> MaskClaim:
        """Maps a prediction to image pixels, before small components and overlaps are removed.

        The first half of `finish`, for callers that combine several predictions or several boxes.
        """
        limit = self.config.mask_thres[int(size_class(crop.area))] if threshold is None else threshold
        region = self._region(crop)
        return MaskClaim(region, self._paste(crop, prediction.prob, region), limit)

    def label_from_mask(
        self,
        crop: Crop,
        claim: MaskClaim,
        mask: NDArray[np.bool_],
        agreement: float | None = None,
        min_component_area_px: int = 0,
    ) -> Label:
        """Returns the label for a mask. The second half of `finish`.

        Args:
            crop: the box's crop.
            claim: the box's claim.
            mask: (rows, columns) bool, in the claim's region; a subset of `claim.mask`.
            agreement: IoU of student and teacher.
            min_component_area_px: limit below which components were removed from the mask.
        """
        code = rle.encode_region(mask, claim.region.row0, claim.region.col0, crop.image_hw)
        area = int(np.count_nonzero(mask))
        score = mask_score(self.config.score_type, claim, mask, min_component_area_px) if area else 0.0
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

    def with_margin(self, margin_rate: float) -> "Labeler":
        """Returns a labeler that shares the network and crops with another margin around the box."""
        config = dataclasses.replace(self.config, margin_rate=margin_rate)
        return Labeler(self.network, config, device=self.device, precision=str(self.dtype).removeprefix("torch."))

    def max_crops_per_pass(self, crop_size: int) -> int:
        """Returns the number of crops of `crop_size` px in one forward pass. `predict` splits larger batches."""
        if self.device.type != "cpu":
            return sys.maxsize
        if self.dtype is torch.float32:
            # The reference: matrix kernels round differently for other batch sizes, and a mask must not depend on the
            # other crops of its batch.
            return 1
        return max(CPU_PIXELS_PER_PASS * max(torch.get_num_threads(), 2) // 2 // crop_size**2, 1)

    def _prepare_one(self, image: RgbImage, box: Sequence[float], name: str) -> Crop | BadBox:
        image_hw = (image.shape[0], image.shape[1])
        try:
            inside, clipped = geometry.check_box(box, image_hw, name)
        except BadBox as error:
            return error
        window = geometry.test_window(inside, self.config.margin_rate)
        pixels = geometry.resize_crop(geometry.cut(image, window), self.config.crop_size)
        x, y, w, h = (float(v) for v in box)
        original = (x, y, w, h) if clipped else inside
        return Crop(pixels, original, inside, window, image_hw, geometry.box_area(inside))

    def _predict_batch(self, crops: Sequence[Crop], options: PredictOptions) -> list[Prediction]:
        size_class_N = torch.from_numpy(network_size_class([crop.area for crop in crops], self.config.compat))
        crops_NHWC = torch.from_numpy(np.stack([crop.pixels for crop in crops])).to(self.device, non_blocking=True)
        with torch.inference_mode(), self._autocast():
            x_NCHW = normalize(crops_NHWC)
            needed = {options.branch} | ({Branch.STUDENT, Branch.TEACHER} if options.agreement else set())
            if Branch.MIXED in needed:
                needed |= {Branch.STUDENT, Branch.TEACHER}
            logits = {
                branch: self._logits(x_NCHW, size_class_N, branch, options.flip) for branch in needed - {Branch.MIXED}
            }
            if Branch.MIXED in needed:
                logits[Branch.MIXED] = (logits[Branch.STUDENT] + logits[Branch.TEACHER]) / 2
            side = x_NCHW.shape[-1]
            probs = {branch: probabilities(z.float(), side).cpu().numpy() for branch, z in logits.items()}
        if not options.agreement:
            return [Prediction(prob) for prob in probs[options.branch]]
        maps = zip(probs[options.branch], probs[Branch.STUDENT], probs[Branch.TEACHER], strict=True)
        return [Prediction(prob, student, teacher) for prob, student, teacher in maps]

    def _logits(self, x_NCHW: torch.Tensor, size_class_N: torch.Tensor, branch: Branch, flip: bool) -> torch.Tensor:
        logits_N1HW = self.network.logits(x_NCHW, size_class_N, branch).float()
        if flip:
            mirrored_N1HW = self.network.logits(x_NCHW.flip(-1), size_class_N, branch).float().flip(-1)
            logits_N1HW = (logits_N1HW + mirrored_N1HW) / 2
        return logits_N1HW

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

    def _paste(self, crop: Crop, prob: ProbMap, region: Region) -> ProbMap:
        if region.is_empty:
            return np.zeros((max(region.row1 - region.row0, 0), max(region.col1 - region.col0, 0)), np.float32)
        if self.config.compat is Compat.TAO:
            # The published code clips to the box on the crop's grid, not in the image, so pasting blurs the edge.
            prob = prob * geometry.box_mask_in_window(
                crop.box_inside, crop.window, crop.image_hw, prob.shape[0], Compat.TAO
            ).astype(np.float32)
        return geometry.paste(prob, crop.window, region)

    def _agreement(
        self, crop: Crop, prediction: Prediction, claim: MaskClaim, min_component_area_px: int
    ) -> float | None:
        if prediction.student is None or prediction.teacher is None:
            return None
        student, teacher = (
            remove_small_regions(self._paste(crop, prob, claim.region) > claim.limit, min_component_area_px)
            for prob in (prediction.student, prediction.teacher)
        )
        union = np.count_nonzero(student | teacher)
        return float(np.count_nonzero(student & teacher) / union) if union else 1.0


def compute_dtype(device: torch.device, config: LabelerConfig, precision: Precision | str) -> torch.dtype:
    """Returns the dtype of a labeler's forward pass; raises ConfigError for float16 on a CPU."""
    if config.compat is Compat.TAO and precision == Precision.AUTO:
        precision = Precision.FLOAT32  # the published numbers need the published precision
    return resolve(precision, device)


def load_labeler(
    path: Path,
    *,
    key: DecryptionKey | None = None,
    device: str | torch.device = "cpu",
    precision: Precision | str = Precision.AUTO,
) -> tuple[Labeler, Checkpoint]:
    """Loads a checkpoint; returns its labeler and the checkpoint, which holds categories and provenance.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    # Never loads the optimizer's state of a resume file.
    checkpoint = load_checkpoint(path, key, skip_training_state=True)
    return build_labeler(checkpoint, device=device, precision=precision), checkpoint


def build_labeler(
    checkpoint: Checkpoint, *, device: str | torch.device = "cpu", precision: Precision | str = Precision.AUTO
) -> Labeler:
    """Returns a labeler with a checkpoint's weights. On the CPU it shares them with the checkpoint."""
    network = MalNetwork.from_weights(checkpoint.model, checkpoint.weights)
    return Labeler(network, checkpoint.labeler, device=device, precision=precision)


def _flags(crop: Crop, mask: NDArray[np.bool_], area: int, agreement: float | None) -> tuple[Flag, ...]:
    box = geometry.box_pixels(crop.box_inside, crop.image_hw)
    box_pixel_count = 0 if box.is_empty else (box.col1 - box.col0) * (box.row1 - box.row0)
    conditions = {
        Flag.BOX_CLIPPED: crop.was_clipped,
        Flag.EMPTY_MASK: area == 0,
        Flag.FULL_BOX: area > 0 and area >= box_pixel_count,
        Flag.TOO_SMALL: min(crop.box_inside[2:]) <= TINY_SIDE_PX,
        Flag.LOW_AGREEMENT: agreement is not None and agreement < LOW_AGREEMENT_IOU,
        Flag.MULTI_PART: area > 0 and has_second_component(mask),
    }
    return tuple(name for name, is_set in conditions.items() if is_set)
