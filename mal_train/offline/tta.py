"""Labels the boxes of many images with test-time augmentation and post-processing, for evaluation and inference.

Does what takes several passes over an image (margins) or all of its boxes (overlaps). With neither, it is the same as
`dataset_labeler.label_boxes`.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from mal_train.core.coco.annotations import Annotation
from mal_train.core.errors import ConfigError
from mal_train.core.images.files import ImageSource
from mal_train.core.masks.geometry import box_mask_in_window
from mal_train.core.settings import Compat
from mal_train.core.size_class import size_class
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.overlaps import KeptPixels, MaskClaim, PixelOwners, logits
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions
from mal_train.offline.dataset_labeler import LabelFailure, Row, label_boxes
from mal_train.offline.edge_refinement import refine_edges


@dataclass(frozen=True)
class TtaOptions:
    """Test-time augmentation and post-processing.

    Attributes:
        options: branch and flip of each pass; agreement is not supported here.
        margins: margin rates of the passes, whose logits are averaged; (): one pass with the checkpoint's margin.
        resolve_overlaps: assigns pixels that several instances of an image claim to one of them (`PixelOwners`).
        refine_edges: moves mask edges to color edges in each pass (`edge_refinement.refine_edges`).
    """

    options: PredictOptions = dataclasses.field(default_factory=PredictOptions)
    margins: tuple[float, ...] = ()
    resolve_overlaps: bool = False
    refine_edges: bool = False


CropClaim = tuple[Crop, MaskClaim]
CropMap = tuple[Crop, Prediction]


class ResolvedClaim(NamedTuple):
    """The claim of one box, and what it keeps of it."""

    crop: Crop
    claim: MaskClaim
    kept: KeptPixels

    def label(self, labeler: Labeler) -> Label:
        """Returns the label of the box."""
        return labeler.label_from_mask(self.crop, self.claim, self.kept.mask, overlap=self.kept.overlap)


Result = TypeVar("Result")


def label_images(
    labeler: Labeler, rows: Iterable[Row], image_dir: ImageSource, tta: TtaOptions, *, batch_size: int, threads: int
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
    # An edge outside the box, too, changes the pixels near it.
    options = dataclasses.replace(tta.options, whole_map=tta.refine_edges)
    labelers = [labeler.with_margin(margin) for margin in tta.margins or (labeler.config.margin_rate,)]
    with ExitStack() as stack:
        passes = [
            stack.enter_context(
                closing(
                    label_boxes(
                        pass_labeler,
                        rows_of_pass,
                        image_dir,
                        partial(_maps if tta.resolve_overlaps else _claim, pass_labeler, tta.refine_edges),
                        options=options,
                        batch_size=batch_size,
                        threads=threads,
                        resolves_overlaps=tta.resolve_overlaps,
                    )
                )
            )
            # The passes advance together, so that few rows wait for the slowest.
            for pass_labeler, rows_of_pass in zip(labelers, itertools.tee(rows, len(labelers)), strict=True)
        ]
        boxes = zip(*passes, strict=True)
        if tta.resolve_overlaps:
            for _, boxes_of_image in itertools.groupby(boxes, key=lambda box: box[0][0].image_id):
                for annotation, resolved in resolve_overlaps(labelers, list(boxes_of_image)):
                    yield annotation, resolved if isinstance(resolved, LabelFailure) else resolved.label(labeler)
            return
        for box in boxes:
            annotation, claims = _merged(box)
            yield annotation, claims if isinstance(claims, LabelFailure) else _label(labeler, claims)


def _merged(
    passes: Sequence[tuple[Annotation, Result | LabelFailure]],
) -> tuple[Annotation, list[Result] | LabelFailure]:
    """Returns the results of one box in all passes. The box fails if one pass fails."""
    results: list[Result] = []
    for _, result in passes:
        if isinstance(result, LabelFailure):
            return passes[0][0], result
        results.append(result)
    return passes[0][0], results


def _label(labeler: Labeler, claims: Sequence[CropClaim]) -> Label:
    claim = _average([claim for _, claim in claims])
    return labeler.label_from_mask(claims[0][0], claim, claim.mask)


def resolve_overlaps(
    labelers: Sequence[Labeler], boxes: Sequence[Sequence[tuple[Annotation, CropMap | LabelFailure]]]
) -> Iterator[tuple[Annotation, ResolvedClaim | LabelFailure]]:
    """Yields what each box of one image keeps of its claim. Pastes each twice, but holds the pixels of one at a time.

    Args:
        labelers: one for each pass.
        boxes: all boxes of the image; of each its crop and map in each pass.
    """
    merged = [_merged(box) for box in boxes]
    crops = [maps[0][0] for _, maps in merged if not isinstance(maps, LabelFailure)]
    owners = PixelOwners(crops[0].image_hw) if crops else None

    def claim_of(maps: Sequence[CropMap]) -> MaskClaim:
        return _average([labeler.claim(*one) for labeler, one in zip(labelers, maps, strict=True)])

    for index, (_, maps) in enumerate(merged):
        if owners is not None and not isinstance(maps, LabelFailure):
            owners.add(index, claim_of(maps))
    for index, (annotation, maps) in enumerate(merged):
        if isinstance(maps, LabelFailure):
            yield annotation, maps
        elif owners is not None:
            claim = claim_of(maps)
            yield annotation, ResolvedClaim(maps[0][0], claim, owners.kept(index, claim))


def _average(claims: Sequence[MaskClaim]) -> MaskClaim:
    """Averages the logits and the pooled features of one box over the passes."""
    if len(claims) == 1:
        return claims[0]
    mean = np.mean([logits(claim.prob) for claim in claims], axis=0, dtype=np.float32)
    prob = (1.0 / (1.0 + np.exp(-mean))).astype(np.float32)
    pooled = [claim.pooled for claim in claims if claim.pooled is not None]
    return dataclasses.replace(
        claims[0], prob=prob, pooled=np.mean(pooled, axis=0, dtype=np.float32) if pooled else None
    )


def _claim(labeler: Labeler, refine: bool, annotation: Annotation, crop: Crop, prediction: Prediction) -> CropClaim:
    crop, prediction = _maps(labeler, refine, annotation, crop, prediction)
    return crop, labeler.claim(crop, prediction)


def _maps(labeler: Labeler, refine: bool, _annotation: Annotation, crop: Crop, prediction: Prediction) -> CropMap:
    if refine:
        prediction = Prediction(_with_refined_edges(labeler, crop, prediction.prob), pooled=prediction.pooled)
    return crop.for_finish(), prediction


def _with_refined_edges(
    labeler: Labeler, crop: Crop, prob_HW: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    config = labeler.config
    box_mask_HW = box_mask_in_window(crop.box_inside, crop.window, crop.image_hw, prob_HW.shape[0], config.compat)
    return refine_edges(prob_HW, crop.pixels, box_mask_HW, config.mask_thres[int(size_class(crop.area))])
