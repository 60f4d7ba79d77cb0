"""Labels boxes: crop → probabilities → mask. The one implementation for validation, `mal-train` and the server.

    labeler, checkpoint = load_labeler(Path("model.malckpt"), device="cuda")      # in mal_train.kernel.labeler.load
    labels = labeler.label(image, boxes)              # image (H, W, 3) uint8 RGB; boxes (N, 4) x, y, w, h in px

`label` runs three steps, which callers with many images run on different threads:

    crops = labeler.prepare(image, boxes)             # CPU: pixels (S, S, 3) uint8 around each box; S is the crop size
    predictions = labeler.predict(crops)              # device: foreground probability (S, S) float32 of each crop
    labels = [labeler.finish(crop, prediction)        # CPU: mask, score and flags in image coordinates
              for crop, prediction in zip(crops, predictions)]

For a box that cannot be labeled, `prepare` returns a `BadBox` instead of a crop; leave it out before `predict`. Points
that correct the mask of a box are given to `prepare` and travel with its crop (`clicks`).

A labeler keeps nothing of a call. `prepare` and `finish` may run on any thread, and so may `predict` on a CPU; on a GPU
it runs on one thread.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mal_train.core.errors import BadBox
from mal_train.core.images.decoder import RgbImage
from mal_train.core.masks import geometry, rle
from mal_train.core.masks.flags import Flag
from mal_train.core.masks.geometry import Box, Region, Window
from mal_train.core.masks.image_patch import ImagePatch
from mal_train.core.masks.points import Point, check_points
from mal_train.core.settings import Compat, LabelerConfig, NetworkEngine, Precision
from mal_train.core.size_class import size_class
from mal_train.kernel.labeler.clicks import corrected
from mal_train.kernel.labeler.components import has_second_component, remove_small_regions
from mal_train.kernel.labeler.crop_predictor import CropPredictor
from mal_train.kernel.labeler.engine import Engine, TorchEngine
from mal_train.kernel.labeler.overlaps import MaskClaim, Overlap, PixelOwners
from mal_train.kernel.labeler.scoring import mask_score
from mal_train.kernel.labeler.types import DEFAULT_PREDICT_OPTIONS, Crop, Label, Prediction, PredictOptions, ProbMap
from mal_train.kernel.networks.network import MalNetwork
from mal_train.kernel.networks.precision import resolve

LOW_AGREEMENT_IOU = 0.8
"""Labels with an agreement below this IoU get the flag LOW_AGREEMENT."""

TINY_SIDE_PX = 2.0
"""Boxes with a side up to this length inside the image get the flag TOO_SMALL."""


class Labeler:
    """Labels boxes with one network on one device.

    >>> from mal_train.kernel.networks.network import ModelConfig
    >>> network = MalNetwork(ModelConfig("vit-micro/16"))  # random weights; `load_labeler` loads trained ones
    >>> labeler = Labeler(network, LabelerConfig(crop_size=64), device="cpu")
    >>> (label,) = labeler.label(np.zeros((48, 96, 3), np.uint8), [(10, 10, 20, 16)])
    >>> rle.decode_mask(label.rle).shape
    (48, 96)

    Args:
        network: student and teacher; moved to the device and switched to evaluation mode.
        config: crop size, thresholds, clip rule and calibration.
        device: torch device.
        precision: dtype of the forward pass. `auto` is float32 under `compat: tao`, and otherwise bfloat16 where the
            device is fast at it. Only in float32 and int8 on a CPU is the mask of a box independent of the other crops
            in its batch, to the bit.
        engine: runs the network, in a precision of its own; None: torch, in the given precision.

    Attributes:
        network: the network, on the device.
        engine: the engine that runs it.
        config: the given settings.
        device: the given device.
        dtype: torch dtype of the forward pass.

    Raises:
        ConfigError: float16 on a CPU.
    """

    def __init__(
        self,
        network: MalNetwork,
        config: LabelerConfig,
        *,
        device: str | torch.device = "cpu",
        precision: Precision | str = Precision.AUTO,
        engine: Engine | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.config = config
        self.network = network.to(self.device).eval()
        self.engine = engine or TorchEngine(self.network, self.device, compute_dtype(self.device, config, precision))
        self.dtype = self.engine.dtype
        self._predictor = CropPredictor(self.engine, self.device, config.compat)

    def label(
        self,
        image: RgbImage,
        boxes: Sequence[Sequence[float]],
        options: PredictOptions = DEFAULT_PREDICT_OPTIONS,
        *,
        points: Sequence[Sequence[Point]] | None = None,
        threshold: float | None = None,
        batch_size: int = 8,
    ) -> list[Label | BadBox]:
        """Labels boxes of one image: `prepare`, `predict` and `finish` in one call.

        Args:
            image: (H, W, 3) uint8 RGB.
            boxes: (N, 4) x, y, width, height in px of the image.
            options: options of the forward pass.
            points: see `prepare`.
            threshold: see `finish`.
            batch_size: crops in a batch, at least 1.

        Returns:
            N results in order: a label, or the `BadBox` that says why the box cannot be labeled.

        Raises:
            ConfigError, DeviceError: see `predict`.
        """
        prepared = self.prepare(image, boxes, points=points)
        crops = [crop for crop in prepared if isinstance(crop, Crop)]
        predictions: list[Prediction] = []
        for start in range(0, len(crops), batch_size):
            predictions += self.predict(crops[start : start + batch_size], options)
        labels = iter([self.finish(crop, p, threshold=threshold) for crop, p in zip(crops, predictions, strict=True)])
        return [next(labels) if isinstance(crop, Crop) else crop for crop in prepared]

    def prepare(
        self,
        image: RgbImage | ImagePatch,
        boxes: Sequence[Sequence[float]],
        *,
        first: int = 0,
        points: Sequence[Sequence[Point]] | None = None,
    ) -> list[Crop | BadBox]:
        """Cuts the crop of each box from the image.

        Args:
            image: (H, W, 3) uint8 RGB, or the part of a large image that holds the crops.
            boxes: (N, 4) x, y, width, height in px of the image.
            first: index of the first box in error messages, for a request whose boxes are prepared in several calls.
            points: N sequences with the points that each mask obeys, in px of the image; None: no points.

        Returns:
            N results in order: a crop, or the `BadBox` (`BadPoint` for its points) that says why the box cannot be
            labeled.
        """
        each = zip(boxes, [()] * len(boxes) if points is None else points, strict=True)
        return [self._prepare_one(image, *one, f"box {index}") for index, one in enumerate(each, start=first)]

    def preparing_bytes(self, image_hw: tuple[int, int], boxes: Sequence[Sequence[float]]) -> int:
        """Returns the memory that `prepare` takes at most for its largest box, beside the image and the crops.

        Args:
            image_hw: height and width of the image in px.
            boxes: (N, 4) x, y, width, height in px of the image; those that cannot be labeled take none.
        """
        size_bytes = 0
        for box in boxes:
            with contextlib.suppress(BadBox):
                _, window = self._window(box, image_hw, "box")
                size_bytes = max(size_bytes, geometry.resizing_bytes(window, self.config.crop_size))
        return size_bytes

    def predict(self, crops: Sequence[Crop], options: PredictOptions = DEFAULT_PREDICT_OPTIONS) -> list[Prediction]:
        """Runs the network on crops, which may come from several images; returns their predictions in order.

        Raises:
            ConfigError: the checkpoint has no teacher, and the options need one.
            OutOfDeviceMemory: the batch does not fit; a smaller one may (`oom.predict_split`).
            DeviceLost: no further batch can run in this process, for example after an illegal memory access.
            DeviceError: any other failure of the device.
        """
        return self._predictor.predict(crops, options)

    def finish(
        self,
        crop: Crop,
        prediction: Prediction,
        *,
        threshold: float | None = None,
        min_component_area_px: int = 0,
        owners: PixelOwners | None = None,
        index: int = 0,
    ) -> Label:
        """Returns the label of one box: mask, score and flags in image coordinates.

        Args:
            crop: crop from `prepare`, or its `Crop.for_finish`.
            prediction: prediction from `predict` for this crop.
            threshold: probability in (0, 1) above which a pixel belongs to the mask; None uses the checkpoint's
                threshold for the size class of the box.
            min_component_area_px: remove connected components with fewer pixels from the mask, except the largest and
                those with a positive point (`remove_small_regions`), before score, area, box, agreement and flags are
                computed; 0 removes none.
            owners: owners of the image's pixels, with the claims of all its boxes; None: the mask keeps all pixels.
                Small components are removed after the pixels are assigned. Agreement compares masks before, and the
                flag DOMINATED, which is only set with owners, depends on the claims.
            index: index of the box in `owners`.
        """
        claim = self.claim(crop, prediction, threshold=threshold)
        kept = None if owners is None else owners.kept(index, claim)
        mask = remove_small_regions(claim.mask if kept is None else kept.mask, min_component_area_px, claim.inside)
        agreement = self._agreement(crop, prediction, claim, min_component_area_px)
        overlap = None if kept is None else kept.overlap
        return self.label_from_mask(crop, claim, mask, agreement, min_component_area_px, overlap=overlap)

    def claim(self, crop: Crop, prediction: Prediction, *, threshold: float | None = None) -> MaskClaim:
        """Maps a prediction, corrected by the points of its crop, to image pixels: the first half of `finish`.

        For callers that combine predictions or boxes before they make the label with `label_from_mask`.

        Args:
            crop: crop from `prepare`.
            prediction: prediction from `predict` for this crop.
            threshold: see `finish`.
        """
        if threshold is None:
            threshold = self.config.mask_thres[int(size_class(crop.area))]
        region = self._region(crop)
        return dataclasses.replace(self._claim_map(crop, prediction.prob, region, threshold), pooled=prediction.pooled)

    def label_from_mask(
        self,
        crop: Crop,
        claim: MaskClaim,
        mask: NDArray[np.bool_],
        agreement: float | None = None,
        min_component_area_px: int = 0,
        *,
        overlap: Overlap | None = None,
    ) -> Label:
        """Returns the label of a box with a given mask: the second half of `finish`.

        Args:
            crop: crop of the box.
            claim: claim of the box, from `claim`.
            mask: (rows, columns) bool on the claim's region; a subset of `claim.mask`.
            agreement: IoU of the masks of student and teacher, if known.
            min_component_area_px: as passed to `remove_small_regions` for this mask; the stability score repeats it.
            overlap: what other boxes have of the claim, for the score and the flag DOMINATED; None: overlaps are not
                resolved.
        """
        code = rle.encode_region(mask, claim.region.row0, claim.region.col0, crop.image_hw)
        area = int(np.count_nonzero(mask))
        score = mask_score(self.config, crop, claim, mask, min_component_area_px, overlap=overlap) if area else 0.0
        return Label(
            rle=code,
            score=score,
            area=area,
            mask_box=rle.to_box(code),
            agreement=agreement,
            flags=_flags(crop, mask, area, agreement, is_dominated=overlap is not None and overlap.is_dominated),
        )

    def with_margin(self, margin_rate: float) -> "Labeler":
        """Returns a labeler with another `LabelerConfig.margin_rate` that shares the engine. Raises ConfigError."""
        config = dataclasses.replace(self.config, margin_rate=margin_rate)
        return Labeler(self.network, config, device=self.device, engine=self.engine)

    def _prepare_one(
        self, image: RgbImage | ImagePatch, box: Sequence[float], points: Sequence[Point], name: str
    ) -> Crop | BadBox:
        image_hw = image.image_hw if isinstance(image, ImagePatch) else (image.shape[0], image.shape[1])
        try:
            inside, window = self._window(box, image_hw, name)
            checked = check_points(points, image_hw, self._box_pixels(inside, image_hw), name)
            if isinstance(image, ImagePatch):
                pixels = geometry.resized_window(image.pixels, image.inside(window, name), self.config.crop_size)
            else:
                pixels = geometry.resized_window(image, window, self.config.crop_size)
        except BadBox as error:
            return error
        x, y, w, h = (float(v) for v in box)
        return Crop(pixels, (x, y, w, h), inside, window, image_hw, geometry.box_area(inside), checked)

    def _window(self, box: Sequence[float], image_hw: tuple[int, int], name: str) -> tuple[Box, Window]:
        """Returns the part of a box inside the image and the window of its crop. Raises BadBox."""
        inside, _ = geometry.check_box(box, image_hw, name)
        return inside, geometry.inference_window(inside, self.config.margin_rate)

    def _box_pixels(self, box_inside: Box, image_hw: tuple[int, int]) -> Region:
        """Returns the pixels of a box, by the clip rule."""
        if self.config.compat is Compat.TAO:
            return geometry.inclusive_pixels(box_inside, image_hw)
        return geometry.box_pixels(box_inside, image_hw)

    def _region(self, crop: Crop) -> Region:
        """Returns the image region that the mask may cover: the box, or under `compat: tao` the crop's window."""
        if self.config.compat is Compat.TAO:
            height, width = crop.image_hw
            window = crop.window
            return Region(max(window.x0, 0), max(window.y0, 0), min(window.x1, width), min(window.y1, height))
        return self._box_pixels(crop.box_inside, crop.image_hw)

    def _claim_map(self, crop: Crop, prob: ProbMap, region: Region, threshold: float) -> MaskClaim:
        """Maps a map (S, S) on the crop, corrected by the points of the crop, to the pixels of an image region."""
        prob = corrected(prob, crop, threshold, self.config.compat)
        return MaskClaim(region, self._paste(crop, prob, region), threshold, crop.points)

    def _paste(self, crop: Crop, prob: ProbMap, region: Region) -> ProbMap:
        """Resamples a map (S, S) on the crop to the pixels of an image region, (rows, columns) float32."""
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
        """Returns the IoU of the masks of student and teacher, 1 if both are empty; None if they were not predicted."""
        if prediction.student is None or prediction.teacher is None:
            return None
        student, teacher = (
            remove_small_regions(one.mask, min_component_area_px, one.inside)
            for one in (
                claim if prob is prediction.prob else self._claim_map(crop, prob, claim.region, claim.threshold)
                for prob in (prediction.student, prediction.teacher)
            )
        )
        union = np.count_nonzero(student | teacher)
        return float(np.count_nonzero(student & teacher) / union) if union else 1.0


def compute_dtype(
    device: torch.device,
    config: LabelerConfig,
    precision: Precision | str,
    engine: NetworkEngine | str = NetworkEngine.TORCH,
) -> torch.dtype:
    """Returns the dtype of a labeler's forward pass. Raises ConfigError like `precision.resolve`."""
    if config.compat is Compat.TAO and precision == Precision.AUTO:
        precision = Precision.FLOAT32  # the published numbers need the published precision
    return resolve(precision, device, engine)


def _flags(
    crop: Crop, mask: NDArray[np.bool_], area: int, agreement: float | None, *, is_dominated: bool
) -> tuple[Flag, ...]:
    box = geometry.box_pixels(crop.box_inside, crop.image_hw)
    box_pixel_count = 0 if box.is_empty else (box.col1 - box.col0) * (box.row1 - box.row0)
    conditions = {
        Flag.BOX_CLIPPED: crop.was_clipped,
        Flag.EMPTY_MASK: area == 0,
        Flag.FULL_BOX: area > 0 and area >= box_pixel_count,
        Flag.TOO_SMALL: min(crop.box_inside[2:]) <= TINY_SIDE_PX,
        Flag.LOW_AGREEMENT: agreement is not None and agreement < LOW_AGREEMENT_IOU,
        Flag.MULTI_PART: area > 0 and has_second_component(mask),
        Flag.DOMINATED: is_dominated,
    }
    return tuple(flag for flag, is_set in conditions.items() if is_set)
