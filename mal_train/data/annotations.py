"""From a COCO file to the boxes one trains on, and their order. Opens a picture only to learn an unstated size.

Boxes are kept in arrays, not objects: a million of them cross into the loader's processes for nothing.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mal_train.core.coco.annotations import Annotation, CocoFile, ImageInfo, Reason, by_image, read_coco
from mal_train.core.coco.box_filter import training_refusal
from mal_train.core.coco.detections import MASK_SCORE
from mal_train.core.errors import BadBox, BadDataset, BadImage
from mal_train.core.masks import rle
from mal_train.core.masks.geometry import Box, box_iou, check_box
from mal_train.core.masks.images import read_image
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Compat

Supervision = Literal["box", "mask", "auto", "pseudo"]
"""What is learned from: boxes alone, masks alone, masks where there are any and boxes for the rest, or the boxes of
all and beside them masks that an earlier model guessed."""

WINDOW_IMAGES = 64
"""Images whose boxes are mixed with each other: few enough to stay decoded, many enough for a good shuffle."""
WINDOW_BYTES = 128 << 20
"""Decoded bytes of these images, at most (one image alone may be larger)."""


@dataclass(frozen=True)
class TrainingBoxes:
    """What there is to train on.

    Attributes:
        paths: one picture file for each image that has a box.
        size_wh: (images, 2) int64, width and height in px.
        image_of_box: (boxes,) int64 index into `paths`.
        boxes_xywh: (boxes, 4) float64, inside their images.
        total: annotations in the file.
        refused: how many are not trained on, by reason.
        masks: the mask of each box, None where it has none; empty where masks are not used.
        mask_weights: (boxes,) float32, how much each mask counts, 1 on average; None: all alike.
    """

    paths: tuple[Path, ...]
    size_wh: NDArray[np.int64]
    image_of_box: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    total: int
    refused: Counter[str]
    masks: tuple[Rle | None, ...] = ()
    mask_weights: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.image_of_box)

    def box(self, index: int) -> Box:
        """Box number `index` as x, y, width, height."""
        x, y, w, h = (float(v) for v in self.boxes_xywh[index])
        return x, y, w, h

    def digest(self) -> str:
        """Names what there is to train on: equal exactly where boxes, their order and their masks are."""
        found = hashlib.sha256(json.dumps([path.name for path in self.paths]).encode())
        for array in (self.size_wh, self.image_of_box, self.boxes_xywh):
            found.update(array.tobytes())
        for mask in self.masks:
            found.update(b"-" if mask is None else mask.counts)
        return found.hexdigest()

    def summary(self) -> str:
        """One line for people: what is kept, and what is not and why."""
        text = f"training on {len(self)} of {self.total} boxes in {len(self.paths)} images"
        if self.masks:
            text += f", {sum(mask is not None for mask in self.masks)} of them with their masks"
        if self.refused:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.refused.most_common())
            text += f"; left out: {reasons}"
        return text


def read_training_boxes(
    ann_path: Path, image_dir: Path, *, min_area: float, max_area: float, compat: Compat
) -> TrainingBoxes:
    """The boxes of a COCO file that `training_refusal` lets through, areas in px² strictly between the bounds.

    Raises:
        BadDataset: the file is refused as a whole, or nothing is left to train on.
    """
    return select_boxes(
        read_coco(ann_path), image_dir, min_area=min_area, max_area=max_area, compat=compat, name=str(ann_path)
    )


def select_boxes(
    coco: CocoFile,
    image_dir: Path,
    *,
    min_area: float,
    max_area: float,
    compat: Compat,
    supervision: Supervision = "box",
    name: str = "dataset",
) -> TrainingBoxes:
    """`read_training_boxes` of a file already in memory, with masks as `supervision` says.

    `box` leaves masks alone, `auto` takes those that can be read, `mask` leaves out boxes without one, and `pseudo`
    weighs those that can be read by `guess_weight`.
    """
    refused: Counter[str] = Counter()
    paths: list[Path] = []
    sizes: list[tuple[int, int]] = []
    image_of_box: list[int] = []
    boxes: list[Box] = []
    masks: list[Rle | None] = []
    weights: list[float] = []
    seen = 0
    for image, annotations in by_image(coco):
        seen += len(annotations)
        if not annotations:
            continue
        size = _usable_size(image, image_dir)
        if size is None:
            refused[str(Reason.IMAGE_UNUSABLE)] += len(annotations)
            continue
        kept: list[Box] = []
        for annotation in annotations:
            try:
                inside, _ = check_box(annotation.box_xywh, (size[1], size[0]))
            except BadBox:
                inside = None
            reason = training_refusal(annotation, inside, size, min_area=min_area, max_area=max_area, compat=compat)
            if reason is None and inside is None:
                reason = Reason.BAD_BOX
            mask = None if supervision == "box" or reason is not None else _mask(annotation, size)
            if reason is None and supervision == "mask" and mask is None:
                reason = Reason.NO_GROUND_TRUTH
            if reason is not None or inside is None:
                refused[str(reason)] += 1
            else:
                kept.append(inside)
                masks.append(mask)
                # Beside a detector's score stands the mask's own.
                score = annotation.raw.get(MASK_SCORE, annotation.raw.get("score"))
                weights.append(guess_weight(score, mask, inside))
        if kept:
            image_of_box += [len(paths)] * len(kept)
            boxes += kept
            paths.append(image_dir / image.file_name)
            sizes.append(size)
    # Rows that name no known image appear with no image at all.
    if len(coco.annotations) > seen:
        refused[str(Reason.IMAGE_UNKNOWN)] += len(coco.annotations) - seen
    if not boxes:
        reasons = ", ".join(f"{count} {reason}" for reason, count in refused.most_common()) or "it holds none"
        raise BadDataset(
            f"{name}: no box to train on ({reasons}); check dataset.train_img_dir, min_obj_size and max_obj_size"
        )
    return TrainingBoxes(
        tuple(paths),
        np.asarray(sizes, dtype=np.int64),
        np.asarray(image_of_box, dtype=np.int64),
        np.asarray(boxes, dtype=np.float64),
        len(coco.annotations),
        refused,
        () if supervision == "box" else tuple(masks),
        _on_average_one(weights) if supervision == "pseudo" else None,
    )


def guess_weight(score: object, mask: Rle | None, box_inside: Box) -> float:
    """How far a guessed mask is to be trusted, in [0, 1]: its score times how tightly it fills its box.

    Tightness is the IoU of the mask's own tight box with the given one, which is the one thing known for certain.
    A mask without a score (a finite number) counts by its tightness alone; no mask, or an empty one, has weight 0.
    """
    tight = None if mask is None else rle.to_box(mask)
    if tight is None:
        return 0.0
    trust = float(score) if isinstance(score, int | float) and math.isfinite(score) else 1.0
    return min(max(trust, 0.0), 1.0) * box_iou(tight, box_inside)


def _on_average_one(weights: list[float]) -> NDArray[np.float32]:
    """The weights scaled so that those above 0 have the mean 1: the loss's size then says nothing of the guesses'."""
    array = np.asarray(weights, dtype=np.float64)
    known = array > 0.0
    return (array / array[known].mean() if known.any() else array).astype(np.float32)


def epoch_order(boxes: TrainingBoxes, seed: int, epoch: int) -> NDArray[np.int64]:
    """Every box index once, in an order that depends on seed and epoch alone.

    Images are shuffled and taken in windows; the boxes of a window are shuffled together. A batch thus mixes images,
    and a loader that keeps one window decoded opens every picture once.
    """
    rng = np.random.default_rng([seed, epoch])
    by_picture = np.argsort(boxes.image_of_box, kind="stable")
    starts = np.searchsorted(boxes.image_of_box[by_picture], np.arange(len(boxes.paths) + 1))
    decoded_bytes = 3 * boxes.size_wh.prod(axis=1)
    parts: list[NDArray[np.int64]] = []
    window: list[NDArray[np.int64]] = []
    held = 0
    for image in rng.permutation(len(boxes.paths)):
        if window and (len(window) == WINDOW_IMAGES or held + decoded_bytes[image] > WINDOW_BYTES):
            parts.append(rng.permutation(np.concatenate(window)))
            window, held = [], 0
        window.append(by_picture[starts[image] : starts[image + 1]])
        held += int(decoded_bytes[image])
    parts.append(rng.permutation(np.concatenate(window)))
    return np.concatenate(parts)


def _mask(annotation: Annotation, size_wh: tuple[int, int]) -> Rle | None:
    """The annotation's mask; None where it has none, an empty one or one that cannot be read."""
    segmentation = annotation.raw.get("segmentation")
    if not segmentation:
        return None
    try:
        mask = rle.from_segmentation(segmentation, size_wh[1], size_wh[0])
    except BadDataset:
        return None
    return mask if rle.area(mask) else None


def _usable_size(image: ImageInfo, image_dir: Path) -> tuple[int, int] | None:
    """Width and height; None where the row has a problem or there is no such file."""
    if image.problem is not None or not (image_dir / image.file_name).is_file():
        return None
    if image.size_wh is not None:
        return image.size_wh
    try:
        pixels = read_image(image_dir / image.file_name)
    except BadImage:
        return None
    return pixels.shape[1], pixels.shape[0]
