"""Labels the boxes of many images with test-time augmentation and post-processing, for evaluation and inference.

Does what takes several passes over an image (margins) or all of its boxes (overlaps). With neither, it is the same as
`dataset_labeler.label_boxes`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mal_train.core.coco.annotations import Annotation
from mal_train.core.errors import ConfigError
from mal_train.core.masks.geometry import box_mask_in_window
from mal_train.core.settings import Compat, size_class
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.overlaps import MaskClaim, assign_pixels, logits
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions
from mal_train.offline.dataset_labeler import LabelFailure, Row, label_boxes
from mal_train.offline.edge_refinement import refine_edges


@dataclass(frozen=True)
class TtaOptions:
    """Test-time augmentation and post-processing.

    Attributes:
        options: branch and flip of each pass; agreement is not supported here.
        margins: margin rates of the passes, whose logits are averaged; (): one pass with the checkpoint's margin.
        resolve_overlaps: assigns each pixel that several instances of an image claim to one of them (`assign_pixels`).
        refine_edges: moves mask edges to color edges in each pass (`edge_refinement.refine_edges`).
    """

    options: PredictOptions = dataclasses.field(default_factory=PredictOptions)
    margins: tuple[float, ...] = ()
    resolve_overlaps: bool = False
    refine_edges: bool = False


CropClaim = tuple[Crop, MaskClaim]


def label_images(
    labeler: Labeler, rows: Sequence[Row], image_dir: Path, tta: TtaOptions, *, batch_size: int, threads: int
) -> Iterator[tuple[Annotation, Label | LabelFailure]]:
    """Yields every annotation that is not a crowd, in the order of `rows`, with its label or the reason of its failure.

    Args:
        labeler: predicts on the calling thread.
        rows: images with their annotations, from `annotations.by_image`.
        image_dir: folder that file names are relative to.
        tta: test-time augmentation and post-processing.
        batch_size: crops in a batch, ≥ 1.
        threads: worker threads of each pass, ≥ 1.

    Raises:
        ConfigError: several margins under `compat: tao`, where the labeled region depends on the margin.
    """
    if len(tta.margins) > 1 and labeler.config.compat is Compat.TAO:
        raise ConfigError(f"margins: {tta.margins}; compat: tao supports one margin only")
    with ExitStack() as stack:
        passes = []
        for margin in tta.margins or (labeler.config.margin_rate,):
            pass_labeler = labeler.with_margin(margin)
            claims = label_boxes(
                pass_labeler,
                rows,
                image_dir,
                partial(_claim, pass_labeler, tta.refine_edges),
                options=tta.options,
                batch_size=batch_size,
                threads=threads,
            )
            passes.append(stack.enter_context(closing(claims)))
        merged = (_average(claims) for claims in zip(*passes, strict=True))
        if not tta.resolve_overlaps:
            for annotation, claim in merged:
                yield annotation, _label(labeler, claim)
            return
        for _, claims_of_image in itertools.groupby(merged, key=lambda pair: pair[0].image_id):
            yield from _label_without_overlaps(labeler, list(claims_of_image))


def _average(
    claims: Sequence[tuple[Annotation, CropClaim | LabelFailure]],
) -> tuple[Annotation, CropClaim | LabelFailure]:
    """Averages the logits of one box over the passes. The box fails if one pass fails."""
    annotation, first = claims[0]
    for _, claim in claims:
        if isinstance(claim, LabelFailure):
            return annotation, claim
    if isinstance(first, LabelFailure) or len(claims) == 1:
        return annotation, first
    crop, first_claim = first
    probs = [claim[1].prob for _, claim in claims if not isinstance(claim, LabelFailure)]
    mean = np.mean([logits(prob) for prob in probs], axis=0, dtype=np.float32)
    prob = (1.0 / (1.0 + np.exp(-mean))).astype(np.float32)
    return annotation, (crop, dataclasses.replace(first_claim, prob=prob))


def _label_without_overlaps(
    labeler: Labeler, claims: Sequence[tuple[Annotation, CropClaim | LabelFailure]]
) -> Iterator[tuple[Annotation, Label | LabelFailure]]:
    valid = [claim for _, claim in claims if not isinstance(claim, LabelFailure)]
    masks = iter(assign_pixels([claim for _, claim in valid], valid[0][0].image_hw) if valid else [])
    for annotation, claim in claims:
        if isinstance(claim, LabelFailure):
            yield annotation, claim
        else:
            yield annotation, labeler.label_from_mask(*claim, next(masks))


def _label(labeler: Labeler, claim: CropClaim | LabelFailure) -> Label | LabelFailure:
    return claim if isinstance(claim, LabelFailure) else labeler.label_from_mask(*claim, claim[1].mask)


def _claim(labeler: Labeler, refine: bool, _annotation: Annotation, crop: Crop, prediction: Prediction) -> CropClaim:
    if refine:
        prediction = Prediction(_with_refined_edges(labeler, crop, prediction.prob))
    # Frees the pixels: they are no longer needed and make up most of a crop.
    return dataclasses.replace(crop, pixels=crop.pixels[:0]), labeler.claim(crop, prediction)


def _with_refined_edges(
    labeler: Labeler, crop: Crop, prob_HW: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    config = labeler.config
    box_mask_HW = box_mask_in_window(crop.box_inside, crop.window, crop.image_hw, prob_HW.shape[0], config.compat)
    return refine_edges(prob_HW, crop.pixels, box_mask_HW, config.mask_thres[int(size_class(crop.area))])
