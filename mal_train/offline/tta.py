"""Labels the boxes of many images from several views of each, and lets the instances of an image share out its pixels.

What costs several passes or needs the whole image is done here, for `mal-train evaluate` and `mal-train inference`;
with neither asked for, this is `bulk.label_boxes` and nothing else.
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
from mal_train.kernel.labeler.labeler import Crop, Label, Labeler, Prediction, PredictOptions
from mal_train.kernel.labeler.overlaps import MaskClaim, assign_pixels, logits
from mal_train.offline.dataset_labeler import LabelFailure, Row, label_boxes
from mal_train.offline.edge_refinement import refine_edges


@dataclass(frozen=True)
class TtaOptions:
    """How much is done for a label.

    Attributes:
        options: branch, mirror image, agreement (agreement is not asked for here).
        margins: a pass for each, with this growth of the box, and their logits averaged; (): one with the checkpoint's.
        resolve_overlaps: whether a pixel that several instances claim goes to one of them (`assign_pixels`).
        refine_edges: whether edges are moved to where the colors change (`edges.refine_edges`), in each pass.
    """

    options: PredictOptions = dataclasses.field(default_factory=PredictOptions)
    margins: tuple[float, ...] = ()
    resolve_overlaps: bool = False
    refine_edges: bool = False


Claimed = tuple[Crop, MaskClaim]


def label_images(
    labeler: Labeler, rows: Sequence[Row], image_dir: Path, passes: TtaOptions, *, batch_size: int, threads: int
) -> Iterator[tuple[Annotation, Label | LabelFailure]]:
    """Every box that is no crowd, in the order of `rows`, with its label or why there is none.

    Args:
        labeler: predicts on the calling thread.
        rows: images with their annotations, as `coco.by_image` gives them.
        image_dir: folder that the file names start at.
        passes: what is done for a label.
        batch_size: crops in a batch, ≥ 1.
        threads: worker threads of each pass, ≥ 1.

    Raises:
        ConfigError: several margins under `compat: tao`, where the labeled region depends on the margin.
    """
    if len(passes.margins) > 1 and labeler.config.compat is Compat.TAO:
        raise ConfigError("margins: several of them cannot be averaged under compat: tao; give one")
    with ExitStack() as stack:
        views = []
        for margin in passes.margins or (labeler.config.margin_rate,):
            view = labeler.with_margin(margin)
            pairs = label_boxes(
                view,
                rows,
                image_dir,
                partial(_claimed, view, passes.refine_edges),
                options=passes.options,
                batch_size=batch_size,
                threads=threads,
            )
            views.append(stack.enter_context(closing(pairs)))
        found = (_together(answers) for answers in zip(*views, strict=True))
        if not passes.resolve_overlaps:
            for annotation, claimed in found:
                yield annotation, _label(labeler, claimed)
            return
        for _, of_image in itertools.groupby(found, key=lambda pair: pair[0].image_id):
            yield from _shared_out(labeler, list(of_image))


def _together(
    answers: Sequence[tuple[Annotation, Claimed | LabelFailure]],
) -> tuple[Annotation, Claimed | LabelFailure]:
    """One claim of several views of the same box: their mean logit. One view that failed fails the box."""
    annotation, first = answers[0]
    for _, other in answers:
        if isinstance(other, LabelFailure):
            return annotation, other
    if isinstance(first, LabelFailure) or len(answers) == 1:
        return annotation, first
    crop, claim = first
    values = [other[1].values for _, other in answers if not isinstance(other, LabelFailure)]
    mean = np.mean([logits(value) for value in values], axis=0, dtype=np.float32)
    return annotation, (crop, dataclasses.replace(claim, values=(1.0 / (1.0 + np.exp(-mean))).astype(np.float32)))


def _shared_out(
    labeler: Labeler, found: Sequence[tuple[Annotation, Claimed | LabelFailure]]
) -> Iterator[tuple[Annotation, Label | LabelFailure]]:
    claimed = [pair for _, pair in found if not isinstance(pair, LabelFailure)]
    kept = iter(assign_pixels([claim for _, claim in claimed], claimed[0][0].image_hw) if claimed else [])
    for annotation, pair in found:
        if isinstance(pair, LabelFailure):
            yield annotation, pair
        else:
            yield annotation, labeler.answer(*pair, next(kept))


def _label(labeler: Labeler, claimed: Claimed | LabelFailure) -> Label | LabelFailure:
    return claimed if isinstance(claimed, LabelFailure) else labeler.answer(*claimed, claimed[1].mask)


def _claimed(view: Labeler, edges_move: bool, _annotation: Annotation, crop: Crop, probability: Prediction) -> Claimed:
    if edges_move:
        probability = Prediction(_with_moved_edges(view, crop, probability.prob))
    # The pixels are no longer needed, and they are most of what a crop weighs.
    return dataclasses.replace(crop, pixels=crop.pixels[:0]), view.claim(crop, probability)


def _with_moved_edges(
    view: Labeler, crop: Crop, prob: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    config = view.config
    box_mask = box_mask_in_window(crop.box_inside, crop.window, crop.image_hw, prob.shape[0], config.compat)
    return refine_edges(prob, crop.pixels, box_mask, config.mask_thres[int(size_class(crop.area))])
