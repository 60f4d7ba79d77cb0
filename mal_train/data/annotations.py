"""Selects the boxes of a COCO file to train on and orders them for each epoch. Decodes images only for missing sizes.

Boxes are stored in arrays instead of objects, so that loader processes share a million of them without copies.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mal_train.core.coco.annotations import Annotation, CocoFile, ImageInfo, JsonId, Reason, by_image, read_coco
from mal_train.core.coco.box_filter import training_exclusion
from mal_train.core.coco.output import CORRECTED, mask_score_of
from mal_train.core.errors import BadBox, BadDataset, BadImage
from mal_train.core.images.files import Images, ImageSource, images_of, read_image
from mal_train.core.images.header import DEFAULT_LIMITS, ImageLimits
from mal_train.core.images.large_tiff import open_large
from mal_train.core.masks import rle
from mal_train.core.masks.geometry import Box, box_iou, check_box
from mal_train.core.masks.rle import Rle
from mal_train.core.numbers import counted, finite_number
from mal_train.core.settings import Compat
from mal_train.core.storage.addresses import Location, base_name
from mal_train.core.storage.hosts import AllowedHosts
from mal_train.core.storage.read_ahead import ReadAhead

Supervision = Literal["box", "mask", "auto", "pseudo"]
"""Training target: `box` ignores masks, `mask` excludes boxes without a mask, `auto` uses masks where there are any and
boxes for the rest, `pseudo` uses all boxes and weighs masks of an earlier model by `pseudo_label_weight`."""

SHUFFLE_IMAGES = 64
"""Images whose boxes are shuffled together: few enough to keep them decoded, enough for a good shuffle."""
SHUFFLE_BYTES = 128 << 20
"""Maximum decoded size of these images in bytes; a single larger image forms a group of its own."""


@dataclass(frozen=True)
class TrainingBoxes:
    """Boxes to train on.

    Attributes:
        paths: image files, or addresses of images; only images with a box.
        hosts: web hosts that these addresses may lead to; None for addresses that the user gave.
        limits: of the images.
        size_wh: (images, 2) int64, width and height in px.
        image_of_box: (boxes,) int64 index into `paths`.
        boxes_xywh: (boxes, 4) float64, inside their images.
        total: number of annotations in the file.
        excluded: number of annotations that are not trained on, by reason.
        masks: mask of each box, None for a box without one; empty if masks are not used.
        mask_weights: (boxes,) float32 weight of each mask, 1 on average; None for equal weights.
    """

    paths: tuple[Location, ...]
    size_wh: NDArray[np.int64]
    image_of_box: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    total: int
    excluded: Counter[str]
    masks: tuple[Rle | None, ...] = ()
    mask_weights: NDArray[np.float32] | None = None
    hosts: AllowedHosts | None = None
    limits: ImageLimits = DEFAULT_LIMITS

    def __len__(self) -> int:
        return len(self.image_of_box)

    def box(self, index: int) -> Box:
        """Returns box `index` as x, y, width, height."""
        x, y, w, h = (float(v) for v in self.boxes_xywh[index])
        return x, y, w, h

    def take(self, index: NDArray[np.int64]) -> "TrainingBoxes":
        """Returns the boxes at `index`, (n,) ascending, with their images; `total` and `excluded` stay."""
        used, image_of_box = np.unique(self.image_of_box[index], return_inverse=True)
        return dataclasses.replace(
            self,
            paths=tuple(self.paths[image] for image in used),
            size_wh=self.size_wh[used],
            image_of_box=image_of_box.astype(np.int64),
            boxes_xywh=self.boxes_xywh[index],
            masks=tuple(self.masks[box] for box in index) if self.masks else (),
            mask_weights=None if self.mask_weights is None else self.mask_weights[index],
        )

    def digest(self) -> str:
        """Returns a SHA-256 that is equal only for equal image names, boxes, box order and masks."""
        sha256 = hashlib.sha256(json.dumps([base_name(path) for path in self.paths]).encode())
        for array in (self.size_wh, self.image_of_box, self.boxes_xywh):
            sha256.update(array.tobytes())
        for mask in self.masks:
            sha256.update(b"-" if mask is None else mask.counts)
        return sha256.hexdigest()

    def summary(self) -> str:
        """Returns one line for the log: the number of boxes, and the excluded annotations by reason."""
        text = f"training on {len(self)} of {counted(self.total, 'box')} in {counted(len(self.paths), 'image')}"
        if self.masks:
            text += f", {sum(mask is not None for mask in self.masks)} with masks"
        if self.excluded:
            text += f"; excluded: {_counts(self.excluded)}"
        return text


def read_training_boxes(
    ann_path: Path, image_dir: ImageSource, *, min_area: float, max_area: float, compat: Compat
) -> TrainingBoxes:
    """Reads a COCO file and selects its boxes; see `select_boxes`.

    Raises:
        BadDataset: the file is rejected, or no box is left to train on.
    """
    return select_boxes(
        read_coco(ann_path), image_dir, min_area=min_area, max_area=max_area, compat=compat, name=str(ann_path)
    )


def select_boxes(
    coco: CocoFile,
    image_dir: ImageSource,
    *,
    min_area: float,
    max_area: float,
    compat: Compat,
    supervision: Supervision = "box",
    name: str = "dataset",
) -> TrainingBoxes:
    """Selects the boxes that `training_exclusion` accepts, with masks according to `supervision`.

    Args:
        coco: the file.
        image_dir: folder that its file names are relative to. Remote images are looked at only where the file states no
            size; one that turns out to be missing is treated like a damaged one.
        min_area: exclusive lower bound of the box area in px².
        max_area: exclusive upper bound in px².
        compat: rule of the filter.
        supervision: training target.
        name: name of the file in messages.

    Raises:
        BadDataset: no box is left to train on.
    """
    selection = _Selection(_BoxRule(min_area, max_area, compat, supervision), images_of(image_dir))
    selection.read_remote_sizes(coco)
    n_rows_with_image = 0
    for image, annotations in by_image(coco):
        n_rows_with_image += len(annotations)
        if annotations:
            selection.add_image(image, annotations)
    n_rows_without_image = len(coco.annotations) - n_rows_with_image
    if n_rows_without_image:
        selection.excluded[str(Reason.IMAGE_UNKNOWN)] += n_rows_without_image
    if not selection.boxes:
        reasons = _counts(selection.excluded) or "it has no annotations"
        raise BadDataset(
            f"{name}: no box to train on ({reasons}); check dataset.train_img_dir, min_obj_size and max_obj_size"
        )
    return selection.to_boxes(len(coco.annotations))


class _SelectedBox(NamedTuple):
    box_inside: Box
    mask: Rle | None
    mask_weight: float


@dataclass(frozen=True)
class _BoxRule:
    """Rule that selects single boxes; the fields are arguments of `select_boxes`."""

    min_area: float
    max_area: float
    compat: Compat
    supervision: Supervision

    def apply(self, annotation: Annotation, size_wh: tuple[int, int]) -> _SelectedBox | Reason:
        """Returns the clipped box with its mask, or the reason for which it is excluded."""
        box_inside = _clipped(annotation, size_wh)
        reason = training_exclusion(
            annotation, box_inside, size_wh, min_area=self.min_area, max_area=self.max_area, compat=self.compat
        )
        if reason is not None:
            return reason
        if box_inside is None:
            return Reason.BAD_BOX
        mask = None if self.supervision == "box" else _mask(annotation, size_wh)
        if mask is None and self.supervision == "mask":
            return Reason.NO_GROUND_TRUTH
        # A user has checked this mask.
        score = 1.0 if annotation.raw.get(CORRECTED) is True else mask_score_of(annotation.raw)
        weight = pseudo_label_weight(score, mask, box_inside)
        return _SelectedBox(box_inside, mask, weight)


@dataclass
class _Selection:
    """Boxes selected so far."""

    rule: _BoxRule
    images: Images
    sizes_read: dict[JsonId, tuple[int, int] | None] = field(default_factory=dict)
    paths: list[Location] = field(default_factory=list)
    sizes_wh: list[tuple[int, int]] = field(default_factory=list)
    image_of_box: list[int] = field(default_factory=list)
    boxes: list[_SelectedBox] = field(default_factory=list)
    excluded: Counter[str] = field(default_factory=Counter)

    def read_remote_sizes(self, coco: CocoFile) -> None:
        """Reads the sizes of remote images that the file does not state, several at a time."""
        if not self.images.is_remote:
            return
        unknown = [image for image in coco.images.values() if image.size_wh is None and image.problem is None]
        with ReadAhead(unknown, lambda image: _read_size(image, self.images), lambda _: 0, attrgetter("id")) as ahead:
            for image in ahead:
                self.sizes_read[image.id] = ahead.take(image)

    def add_image(self, image: ImageInfo, annotations: Sequence[Annotation]) -> None:
        """Adds the selected boxes of an image, and the image if there is one; counts the others by reason."""
        size_wh = self._usable_size(image)
        if size_wh is None:
            self.excluded[str(Reason.IMAGE_UNUSABLE)] += len(annotations)
            return
        n_before = len(self.boxes)
        for annotation in annotations:
            selected = self.rule.apply(annotation, size_wh)
            if isinstance(selected, Reason):
                self.excluded[str(selected)] += 1
            else:
                self.boxes.append(selected)
                self.image_of_box.append(len(self.paths))
        if len(self.boxes) > n_before:
            self.paths.append(self.images.locate(image.file_name))
            self.sizes_wh.append(size_wh)

    def to_boxes(self, total: int) -> TrainingBoxes:
        """Returns the selection as arrays; `total` is the number of annotations in the file."""
        supervision = self.rule.supervision
        weights = [box.mask_weight for box in self.boxes]
        return TrainingBoxes(
            tuple(self.paths),
            np.asarray(self.sizes_wh, dtype=np.int64),
            np.asarray(self.image_of_box, dtype=np.int64),
            np.asarray([box.box_inside for box in self.boxes], dtype=np.float64),
            total,
            self.excluded,
            () if supervision == "box" else tuple(box.mask for box in self.boxes),
            _with_mean_one(weights) if supervision == "pseudo" else None,
            self.images.hosts,
            self.images.limits,
        )

    def _usable_size(self, image: ImageInfo) -> tuple[int, int] | None:
        """Returns width and height; None if the row is invalid or the file is missing or cannot be decoded."""
        if image.problem is not None:
            return None
        if image.id in self.sizes_read:
            return self.sizes_read[image.id]
        try:
            location = self.images.locate(image.file_name)
        except BadImage:
            return None
        if not self.images.is_remote and not Path(location).is_file():
            return None
        return image.size_wh or _read_size(image, self.images)


def pseudo_label_weight(score: object, mask: Rle | None, box_inside: Box) -> float:
    """Returns the weight of a pseudo label in [0, 1]: its score times the IoU of its tight box with the given box.

    The given box is the only ground truth, so a mask that does not fill it is less trustworthy. A mask without a finite
    score is weighted by the IoU alone; a missing or empty mask has weight 0.
    """
    tight_box = None if mask is None else rle.to_box(mask)
    if tight_box is None:
        return 0.0
    confidence = finite_number(score)
    return min(max(1.0 if confidence is None else confidence, 0.0), 1.0) * box_iou(tight_box, box_inside)


def _with_mean_one(weights: list[float]) -> NDArray[np.float32]:
    """Scales weights so that the positive ones have mean 1; the size of the loss is then independent of the scores."""
    array = np.asarray(weights, dtype=np.float64)
    is_positive = array > 0.0
    return (array / array[is_positive].mean() if is_positive.any() else array).astype(np.float32)


def epoch_order(boxes: TrainingBoxes, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns a permutation of the box indices that depends only on `seed` and `epoch`.

    Images are shuffled and split into groups; the boxes of a group are shuffled together. Batches thus mix images, and
    a loader that keeps one group decoded opens every image once.
    """
    rng = np.random.default_rng([seed, epoch])
    by_image_index = np.argsort(boxes.image_of_box, kind="stable")
    starts = np.searchsorted(boxes.image_of_box[by_image_index], np.arange(len(boxes.paths) + 1))
    decoded_bytes = 3 * boxes.size_wh.prod(axis=1)
    parts: list[NDArray[np.int64]] = []
    group: list[NDArray[np.int64]] = []
    group_bytes = 0
    for image in rng.permutation(len(boxes.paths)):
        if group and (len(group) == SHUFFLE_IMAGES or group_bytes + decoded_bytes[image] > SHUFFLE_BYTES):
            parts.append(rng.permutation(np.concatenate(group)))
            group, group_bytes = [], 0
        group.append(by_image_index[starts[image] : starts[image + 1]])
        group_bytes += int(decoded_bytes[image])
    parts.append(rng.permutation(np.concatenate(group)))
    return np.concatenate(parts)


def _counts(excluded: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in excluded.most_common())


def _clipped(annotation: Annotation, size_wh: tuple[int, int]) -> Box | None:
    """Returns the part of the box inside the image; None if `check_box` rejects it."""
    width, height = size_wh
    try:
        box_inside, _ = check_box(annotation.box_xywh, (height, width))
    except BadBox:
        return None
    return box_inside


def _mask(annotation: Annotation, size_wh: tuple[int, int]) -> Rle | None:
    """Returns the mask of the annotation; None if it is missing, empty or cannot be read."""
    segmentation = annotation.raw.get("segmentation")
    if not segmentation:
        return None
    try:
        mask = rle.from_segmentation(segmentation, size_wh[1], size_wh[0])
    except BadDataset:
        return None
    return mask if rle.area(mask) else None


def _read_size(image: ImageInfo, images: Images) -> tuple[int, int] | None:
    """Returns width and height of a file; None if it is missing or cannot be decoded."""
    try:
        location = images.locate(image.file_name)
        large = open_large(location, images.limits, str(location))
        if large is not None:
            return large[0].size_wh
        pixels = read_image(location, limits=images.limits, hosts=images.hosts)
    except BadImage:
        return None
    return pixels.shape[1], pixels.shape[0]
