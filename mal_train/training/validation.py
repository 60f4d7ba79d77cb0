"""Labels the validation set, compares with its boxes and masks, and fits thresholds and calibration in one pass."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mal_train.core.coco.annotations import Annotation, CocoFile, Reason, by_image
from mal_train.core.coco.fields import has_segmentation
from mal_train.core.errors import BadDataset
from mal_train.core.images.files import ImageSource
from mal_train.core.masks import rle
from mal_train.core.metrics.evaluator import Evaluator, InstanceComparison
from mal_train.core.metrics.lvis import Federation
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.numbers import counted
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions
from mal_train.kernel.networks.network import MalNetwork
from mal_train.offline.dataset_labeler import LabelFailure, Row, label_boxes
from mal_train.training.box_proxy import BoxProxy, BoxProxyMeter
from mal_train.training.calibration import fit_calibration, held_out_scores
from mal_train.training.thresholds import best_thresholds, iou_curve

FIT_BYTES = 128 << 20
"""Memory for the probability maps that thresholds are fitted to; a larger set is subsampled by image."""


@dataclass(frozen=True)
class ValidationResult:
    """Result of a validation.

    Attributes:
        report: metrics at the thresholds of `config`. With a fitted calibration, the scores are cross-validated: each
            is from a map that was fitted without its image.
        config: labeler settings, with fitted thresholds and calibration if requested and possible.
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
        fit_calibration: fit the map from score to expected IoU.
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
            config = dataclasses.replace(config, calibration=None, calibrated_with_flip=False)
        labeler = Labeler(network, config, device=self.device, precision=self.precision)
        rows = list(by_image(self.coco))
        evaluator, meter = new_evaluator(self.coco, rows), BoxProxyMeter()

        def add(annotation: Annotation, label: Label | LabelFailure) -> None:
            add_result(evaluator, annotation, label)
            if isinstance(label, Label):
                meter.add(annotation.box_xywh, label)
            on_box()

        fit_rows, other_rows = _split_for_fit(rows, config.crop_size) if self.fit_thresholds else ([], rows)
        predicted = list(self._predict(labeler, fit_rows))
        thresholds = best_thresholds(*_curves(predicted, config))
        if thresholds is not None:
            config = dataclasses.replace(config, mask_thres=thresholds)
            labeler = Labeler(network, config, device=self.device, precision=self.precision)
        for annotation, prediction in predicted:
            add(annotation, prediction if isinstance(prediction, LabelFailure) else labeler.finish(*prediction))
        for annotation, label in self._label(labeler, other_rows):
            add(annotation, label)
        if self.fit_calibration:
            config = _calibrate(evaluator, config, with_flip=self.options.flip)
        return ValidationResult(evaluator.report(), config, meter.result(), evaluator.compared)

    def _label(self, labeler: Labeler, rows: Sequence[Row]) -> Iterator[tuple[Annotation, Label | LabelFailure]]:
        return label_boxes(
            labeler,
            rows,
            self.image_dir,
            lambda _annotation, crop, probability: labeler.finish(crop, probability),
            options=self.options,
            batch_size=self.batch_size,
            threads=self.threads,
        )

    def _predict(
        self, labeler: Labeler, rows: Sequence[Row]
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
        )


def new_evaluator(coco: CocoFile, rows: Sequence[Row]) -> Evaluator:
    """Returns an evaluator that has noted the crowd annotations; they are neither labeled nor counted."""
    evaluator = Evaluator(coco.category_names, Federation.of(coco))
    for image, annotations in rows:
        for annotation in annotations:
            if annotation.iscrowd and image.problem is None:
                evaluator.add(annotation, None, 0.0)
    return evaluator


_NO_PIXELS = np.zeros((0, 0, 3), dtype=np.uint8)


def has_masks(coco: CocoFile) -> bool:
    """Returns True if any valid annotation that is not a crowd has a segmentation."""
    return any(
        has_segmentation(annotation.raw) and annotation.problem is None and not annotation.iscrowd
        for annotation in coco.annotations
    )


def why_no_masks(coco: CocoFile) -> str:
    """Returns the reason why a file has no mask to compare with, for a message."""
    crowds = sum(row.iscrowd and row.problem is None for row in coco.annotations)
    counts = Counter({str(Reason.CROWD): crowds}) + coco.problem_counts()
    missing = len(coco.annotations) - counts.total()
    counts += Counter({str(Reason.NO_GROUND_TRUTH): missing})
    reasons = "".join(f", {count} {reason}" for reason, count in counts.most_common())
    remedy = "; if each crowd region is one object, as in files of CVAT, set dataset.crowd_as_objects=true"
    return f"{counted(len(coco.annotations), 'annotation')}, none with a mask{reasons}{remedy if crowds else ''}"


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
        segmentation = annotation.raw.get("segmentation")
        if isinstance(prediction, LabelFailure) or not segmentation:
            continue
        crop, probability = prediction
        try:
            truth = rle.from_segmentation(segmentation, *crop.image_hw)
            curve = iou_curve(crop, probability.prob, truth, config.compat)
        except BadDataset:
            continue
        areas.append(crop.area)
        curves.append(curve)
    return areas, curves


def _calibrate(evaluator: Evaluator, config: LabelerConfig, *, with_flip: bool) -> LabelerConfig:
    """Returns `config` with a calibration fitted to the results, and replaces their scores with cross-validated ones.

    With too few instances to fit, returns `config` and keeps the scores.
    """
    rows = evaluator.rows
    scores, ious = [row.score for row in rows], [row.iou for row in rows]
    knots, held_out = fit_calibration(scores, ious), held_out_scores(scores, ious, [row.image_id for row in rows])
    if knots is None or held_out is None:
        return config
    evaluator.rescore(held_out.tolist())
    return dataclasses.replace(config, calibration=knots, calibrated_with_flip=with_flip)


def add_result(evaluator: Evaluator, annotation: Annotation, label: Label | LabelFailure) -> None:
    """Compares a label with its ground truth, or notes the reason of a failure."""
    if isinstance(label, LabelFailure):
        evaluator.skip(annotation, label.reason, label.message)
    else:
        evaluator.add(annotation, label.rle, label.score)
