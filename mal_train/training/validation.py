"""Labels the validation set, compares with its boxes and masks, and fits thresholds and score in one pass."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mal_train.core.coco.annotations import Annotation, CocoFile, by_image, row_name, without_image
from mal_train.core.coco.fields import has_segmentation
from mal_train.core.coco.ground_truth import read_ground_truth
from mal_train.core.errors import BadDataset
from mal_train.core.images.files import ImageSource
from mal_train.core.metrics.evaluator import Evaluator, InstanceComparison
from mal_train.core.metrics.lvis import Federation
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.score_model import MASK_FEATURES
from mal_train.core.settings import Compat, FittedScore, LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.scoring import score_features
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions
from mal_train.kernel.networks.backbones import backbone_size
from mal_train.kernel.networks.network import MalNetwork
from mal_train.offline.dataset_labeler import LabelFailure, Row, label_boxes
from mal_train.offline.tta import resolve_overlaps
from mal_train.training.box_proxy import BoxProxy, BoxProxyMeter
from mal_train.training.score_fit import FeaturesOfMasks, fit_resolved_score, fit_score
from mal_train.training.thresholds import best_thresholds, iou_curve

FIT_BYTES = 128 << 20
"""Memory for the probability maps that thresholds are fitted to; a larger set is subsampled by image."""
SCORE_FIT_BYTES = 256 << 20
"""Memory for the features of masks that a score is fitted to; with more masks, only the calibration is fitted."""


@dataclass(frozen=True)
class ValidationResult:
    """Result of a validation.

    Attributes:
        report: metrics at the thresholds of `config`. Fitted scores are cross-validated: each is from a model and a map
            that were fitted without its image.
        config: labeler settings, with fitted thresholds, score model and calibration if requested and possible.
        proxy: what the boxes alone say of the masks, at the same thresholds.
        compared: masks with their ground truth, lowest IoU first.
    """

    report: EvaluationReport
    config: LabelerConfig
    proxy: BoxProxy
    compared: Sequence[InstanceComparison] = ()


@dataclass(frozen=True)
class ValidationSnapshot:
    """Result of a validation, with the data set to draw its masks from."""

    result: ValidationResult
    coco: CocoFile
    image_dir: ImageSource


@dataclass(frozen=True)
class Validator:
    """Measures a network on one COCO file; without masks, only what its boxes say.

    Attributes:
        coco: the file.
        image_dir: folder of its images.
        batch_size: crops per batch.
        fit_thresholds: fit the mask thresholds.
        precision: data type of the network.
        device: torch device name.
        fit_calibration: fit the model of the score, and the map from score to expected IoU.
        threads: threads that decode images and encode masks.
        options: network branch and test-time augmentation.
    """

    coco: CocoFile
    image_dir: ImageSource
    batch_size: int
    fit_thresholds: bool
    precision: str
    device: str
    fit_calibration: bool = False
    threads: int = 2
    options: PredictOptions = dataclasses.field(default_factory=PredictOptions)

    def run(
        self,
        network: MalNetwork,
        config: LabelerConfig,
        *,
        on_box: Callable[[], object] = lambda: None,
    ) -> ValidationResult:
        """Validates a network.

        Args:
            network: student and teacher; left in evaluation mode.
            config: labeler settings.
            on_box: called after each box.
        """
        if self.fit_calibration:
            config = config.without_fitted_score()
        labeler = Labeler(network, config, device=self.device, precision=self.precision)
        rows = list(by_image(self.coco))
        evaluator, meter = new_evaluator(self.coco, rows), BoxProxyMeter()
        features: FeaturesOfMasks = {}
        with_features = self._fits_score(network, config, sum(len(annotations) for _, annotations in rows))

        def add(annotation: Annotation, result: _Finished | LabelFailure) -> None:
            label = result if isinstance(result, LabelFailure) else result.label
            add_result(evaluator, annotation, label)
            if isinstance(result, _Finished):
                meter.add(annotation.box_xywh, result.label)
                # Of rows with one id, the first is compared.
                features.setdefault((annotation.image_id, annotation.id), result.features)
            on_box()

        fit_rows, other_rows = _split_for_fit(rows, config.crop_size) if self.fit_thresholds else ([], rows)
        predicted = list(self._predict(labeler, fit_rows))
        thresholds = best_thresholds(*_curves(predicted, config))
        if thresholds is not None:
            config = dataclasses.replace(config, mask_thres=thresholds)
            labeler = Labeler(network, config, device=self.device, precision=self.precision)
        for annotation, prediction in predicted:
            add(
                annotation,
                prediction if isinstance(prediction, LabelFailure) else _finish(labeler, *prediction, with_features),
            )
        for annotation, result in self._label(labeler, other_rows, with_features):
            add(annotation, result)
        if self.fit_calibration:
            config = fit_score(evaluator, features, config, with_flip=self.options.flip)
        return ValidationResult(evaluator.report(), config, meter.result(), evaluator.compared)

    def fit_resolved(self, network: MalNetwork, config: LabelerConfig) -> tuple[FittedScore, EvaluationReport] | None:
        """Labels the set again with overlaps resolved, and fits the score of such masks.

        Args:
            network: see `run`.
            config: labeler settings from `run`, with a fitted model of the score.

        Returns:
            The score of such masks, and the metrics with their cross-validated scores; None if `fit_resolved_score`
            fits none.
        """
        labeler = Labeler(network, config, device=self.device, precision=self.precision)
        rows = list(by_image(self.coco))
        evaluator = new_evaluator(self.coco, rows)
        features: FeaturesOfMasks = {}
        boxes = self._predict(labeler, rows, resolves_overlaps=True)
        for _, of_image in itertools.groupby(boxes, key=lambda box: box[0].image_id):
            for annotation, result in resolve_overlaps([labeler], [[box] for box in of_image]):
                if isinstance(result, LabelFailure):
                    add_result(evaluator, annotation, result)
                    continue
                label, (crop, claim, kept) = result.label(labeler), result
                add_result(evaluator, annotation, label)
                found = score_features(crop, claim, kept.mask, kept.overlap).astype(np.float32) if label.area else None
                # Of rows with one id, the first is compared.
                features.setdefault((annotation.image_id, annotation.id), found)
        fitted = fit_resolved_score(evaluator, features)
        return None if fitted is None else (fitted, evaluator.report())

    def _fits_score(self, network: MalNetwork, config: LabelerConfig, boxes: int) -> bool:
        """Returns True if a score is fitted to features of masks. The published score is none that is fitted."""
        count = len(MASK_FEATURES) + backbone_size(network.config.arch).width
        return self.fit_calibration and config.compat is not Compat.TAO and 4 * count * boxes <= SCORE_FIT_BYTES

    def _label(
        self, labeler: Labeler, rows: Sequence[Row], with_features: bool
    ) -> Iterator[tuple[Annotation, "_Finished | LabelFailure"]]:
        return label_boxes(
            labeler,
            rows,
            self.image_dir,
            lambda _annotation, crop, prediction: _finish(labeler, crop, prediction, with_features),
            options=self.options,
            batch_size=self.batch_size,
            threads=self.threads,
        )

    def _predict(
        self, labeler: Labeler, rows: Sequence[Row], *, resolves_overlaps: bool = False
    ) -> Iterator[tuple[Annotation, tuple[Crop, Prediction] | LabelFailure]]:
        return label_boxes(
            labeler,
            rows,
            self.image_dir,
            # The pixels are most of the size of a crop, and no longer needed.
            lambda _annotation, crop, probability: (dataclasses.replace(crop, pixels=_NO_PIXELS), probability),
            options=self.options,
            batch_size=self.batch_size,
            threads=self.threads,
            resolves_overlaps=resolves_overlaps,
        )


@dataclass(frozen=True)
class _Finished:
    """The label of a box and the features of its mask (`score_features`), (F,) float32; None: not computed."""

    label: Label
    features: NDArray[np.float32] | None


def _finish(labeler: Labeler, crop: Crop, prediction: Prediction, with_features: bool) -> _Finished:
    """Returns the label of a box, and the features of its mask if a score is fitted to them."""
    claim = labeler.claim(crop, prediction)
    label = labeler.label_from_mask(crop, claim, claim.mask)
    has_features = with_features and label.area > 0
    return _Finished(label, score_features(crop, claim, claim.mask).astype(np.float32) if has_features else None)


def new_evaluator(coco: CocoFile, rows: Sequence[Row]) -> Evaluator:
    """Returns an evaluator that has noted the rows which are not labeled: crowd regions, and those without an image."""
    evaluator = Evaluator(coco.category_names, Federation.of(coco))
    for _, annotations in rows:
        for annotation in annotations:
            if annotation.iscrowd:
                evaluator.add(annotation, None, 0.0)
    for annotation in without_image(coco):
        evaluator.skip(annotation, str(annotation.reason), annotation.problem or "")
    return evaluator


_NO_PIXELS = np.zeros((0, 0, 3), dtype=np.uint8)


def has_masks(coco: CocoFile) -> bool:
    """Returns True if any valid annotation that is not a crowd has a segmentation."""
    return any(
        has_segmentation(annotation.raw) and annotation.problem is None and not annotation.iscrowd
        for annotation in coco.annotations
    )


def _split_for_fit(rows: Sequence[Row], crop_size: int) -> tuple[list[Row], list[Row]]:
    """Returns (images to fit on, other images): every n-th image, with n such that their maps fit into `FIT_BYTES`."""
    boxes = sum(len(annotations) for _, annotations in rows)
    every = max(1, -(-boxes * crop_size**2 * 4 // FIT_BYTES))
    return (
        [row for n, row in enumerate(rows) if n % every == 0],
        [row for n, row in enumerate(rows) if n % every],
    )


def _curves(
    predicted: Sequence[tuple[Annotation, tuple[Crop, Prediction] | LabelFailure]], config: LabelerConfig
) -> tuple[list[float], list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]]:
    """Returns area in px² and IoU curve of each prediction with a readable ground-truth mask."""
    areas, curves = [], []
    for annotation, prediction in predicted:
        if isinstance(prediction, LabelFailure):
            continue
        crop, probability = prediction
        try:
            truth = read_ground_truth(annotation.raw, crop.image_hw, row_name(annotation.id))
            curve = iou_curve(crop, probability.prob, truth, config.compat)
        except BadDataset:
            continue
        areas.append(crop.area)
        curves.append(curve)
    return areas, curves


def add_result(evaluator: Evaluator, annotation: Annotation, label: Label | LabelFailure) -> None:
    """Compares a label with its ground truth, or notes the reason of a failure."""
    if isinstance(label, LabelFailure):
        evaluator.skip(annotation, label.reason, label.message)
    else:
        evaluator.add(annotation, label.rle, label.score)
