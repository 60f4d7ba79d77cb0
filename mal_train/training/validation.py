"""Labels the validation set with the one Labeler and compares; one pass also fits thresholds and score where asked."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mal_train.core.coco.annotations import Annotation, CocoFile, by_image
from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.metrics.evaluator import Evaluator, InstanceComparison
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Crop, Label, Labeler, Prediction, PredictOptions
from mal_train.kernel.networks.network import MalNetwork
from mal_train.offline.dataset_labeler import LabelFailure, Row, label_boxes
from mal_train.training.calibration import fit_calibration, held_out
from mal_train.training.thresholds import best_thresholds, iou_curve

FIT_BYTES = 128 << 20
"""Probability maps kept to fit thresholds on; a larger set is fitted on evenly spread images of it."""


@dataclass(frozen=True)
class Validation:
    """What one validation found.

    Attributes:
        report: figures with the thresholds of `config`. Where a calibration was fitted, each score is by a map that did
            not see its image.
        config: the labeler's settings, thresholds and calibration fitted where that was asked for and possible.
        compared: the masks with their ground truth, lowest IoU first.
    """

    report: EvaluationReport
    config: LabelerConfig
    compared: Sequence[InstanceComparison] = ()


@dataclass(frozen=True)
class Validated:
    """A validation and what pictures of it are made from."""

    found: Validation
    coco: CocoFile
    image_dir: Path


@dataclass(frozen=True)
class Validator:
    """Measures a network on one COCO file with masks.

    Attributes:
        coco: the file.
        image_dir: folder of its images.
        batch_size: crops in a batch.
        fit_thresholds: whether the thresholds may be replaced by better ones.
        precision: arithmetic of the network.
        device: torch device name.
        fit_calibration: whether the map from score to expected IoU is fitted anew.
        threads: for decoding and encoding.
        options: whose answer is measured.
    """

    coco: CocoFile
    image_dir: Path
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
    ) -> Validation:
        """Puts the network into evaluation mode and leaves it there; `on_box` is called for every box that is done."""
        if self.fit_calibration:
            config = dataclasses.replace(config, calibration=None, calibrated_with_flip=False)
        labeler = Labeler(network, config, device=self.device, precision=self.precision)
        rows = list(by_image(self.coco))
        evaluator = evaluator_of(self.coco, rows)
        first, rest = _split_for_fit(rows, config.crop_size) if self.fit_thresholds else ([], rows)
        kept = list(self._predict(labeler, first))
        found = best_thresholds(*_curves(kept, config))
        if found is not None:
            config = dataclasses.replace(config, mask_thres=found)
            labeler = Labeler(network, config, device=self.device, precision=self.precision)
        for annotation, pair in kept:
            add_answer(evaluator, annotation, pair if isinstance(pair, LabelFailure) else labeler.finish(*pair))
            on_box()
        for annotation, label in self._answers(labeler, rest):
            add_answer(evaluator, annotation, label)
            on_box()
        if self.fit_calibration:
            config = _calibrate(evaluator, config, with_flip=self.options.flip)
        return Validation(evaluator.report(), config, evaluator.compared)

    def _answers(self, labeler: Labeler, rows: Sequence[Row]) -> Iterator[tuple[Annotation, Label | LabelFailure]]:
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
            # The pixels are no longer needed, and they are most of what a crop weighs.
            lambda _annotation, crop, probability: (dataclasses.replace(crop, pixels=_NOTHING), probability),
            options=self.options,
            batch_size=self.batch_size,
            threads=self.threads,
        )


def evaluator_of(coco: CocoFile, rows: Sequence[Row]) -> Evaluator:
    """An evaluator that knows the file's crowds, which are neither labeled nor counted."""
    evaluator = Evaluator(coco.category_names)
    for image, annotations in rows:
        for annotation in annotations:
            if annotation.iscrowd and image.problem is None:
                evaluator.add(annotation, None, 0.0)
    return evaluator


_NOTHING = np.zeros((0, 0, 3), dtype=np.uint8)


def has_masks(coco: CocoFile) -> bool:
    """Whether any annotation that counts carries a segmentation."""
    return any(
        annotation.raw.get("segmentation") and annotation.problem is None and not annotation.iscrowd
        for annotation in coco.annotations
    )


def _split_for_fit(rows: Sequence[Row], crop_size: int) -> tuple[list[Row], list[Row]]:
    """(images to fit on, the others): every n-th image, so many that their maps fit into FIT_BYTES."""
    boxes = sum(len(annotations) for _, annotations in rows)
    every = max(1, -(-boxes * crop_size**2 * 4 // FIT_BYTES))
    return (
        [row for n, row in enumerate(rows) if n % every == 0],
        [row for n, row in enumerate(rows) if n % every],
    )


def _curves(
    kept: Sequence[tuple[Annotation, tuple[Crop, Prediction] | LabelFailure]], config: LabelerConfig
) -> tuple[list[float], list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]]:
    areas, curves = [], []
    for annotation, pair in kept:
        segmentation = annotation.raw.get("segmentation")
        if isinstance(pair, LabelFailure) or not segmentation:
            continue
        crop, probability = pair
        try:
            truth = rle.decode_mask(rle.from_segmentation(segmentation, *crop.image_hw))
        except BadDataset:
            continue
        areas.append(crop.area)
        curves.append(iou_curve(crop, probability.prob, truth, config.compat))
    return areas, curves


def _calibrate(evaluator: Evaluator, config: LabelerConfig, *, with_flip: bool) -> LabelerConfig:
    """The settings with a map fitted to what was compared, where it can be checked; the scores become held-out ones."""
    rows = evaluator.rows
    scores, ious = [row.score for row in rows], [row.iou for row in rows]
    knots, checked = fit_calibration(scores, ious), held_out(scores, ious, [row.image_id for row in rows])
    if knots is None or checked is None:
        return config
    evaluator.rescore(checked.tolist())
    return dataclasses.replace(config, calibration=knots, calibrated_with_flip=with_flip)


def add_answer(evaluator: Evaluator, annotation: Annotation, label: Label | LabelFailure) -> None:
    """Compares an answer with its ground truth, or notes why there is none."""
    if isinstance(label, LabelFailure):
        evaluator.skip(annotation, label.reason, label.message)
    else:
        evaluator.add(annotation, label.rle, label.score)
