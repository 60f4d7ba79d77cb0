"""Selects the boxes of a COCO file to train on and orders them for each epoch. Decodes images only for missing sizes.

Boxes are stored in arrays instead of objects, so that loader processes share a million of them without copies.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mal_train.core.coco.annotations import (
    Annotation,
    CocoFile,
    ImageInfo,
    JsonId,
    Reason,
    by_image,
    read_coco,
    row_name,
    without_image,
)
from mal_train.core.coco.box_filter import training_exclusion
from mal_train.core.coco.fields import has_segmentation
from mal_train.core.coco.ground_truth import read_ground_truth
from mal_train.core.coco.left_out import LeftOut
from mal_train.core.coco.output import CORRECTED, mask_score_of
from mal_train.core.errors import BadBox, BadDataset, BadGroundTruth, BadImage
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
        left_out: annotations that are not trained on.
        masks_left_out: boxes that are trained on without their masks, which are damaged or empty.
        masks: mask of each box, None for a box without one; empty if masks are not used.
        mask_weights: (boxes,) float32 weight of each mask, 1 on average; None for equal weights.
    """

    paths: tuple[Location, ...]
    size_wh: NDArray[np.int64]
    image_of_box: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    total: int
    left_out: LeftOut
    masks: tuple[Rle | None, ...] = ()
    mask_weights: NDArray[np.float32] | None = None
    hosts: AllowedHosts | None = None
    limits: ImageLimits = DEFAULT_LIMITS
    masks_left_out: LeftOut = field(default_factory=LeftOut)

    def __len__(self) -> int:
        return len(self.image_of_box)

    def box(self, index: int) -> Box:
        """Returns box `index` as x, y, width, height."""
        x, y, w, h = (float(v) for v in self.boxes_xywh[index])
        return x, y, w, h

    def take(self, index: NDArray[np.int64]) -> "TrainingBoxes":
        """Returns the boxes at `index`, (n,) ascending, with their images; `total` and `left_out` stay."""
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

    def summary(self, *, reasons: bool = True) -> str:
        """Returns one line for the log: the number of boxes, and of the annotations that are left out.

        Args:
            reasons: count those by reason.
        """
        text = f"training on {len(self)} of {counted(self.total, 'box')} in {counted(len(self.paths), 'image')}"
        if self.masks:
            text += f", {sum(mask is not None for mask in self.masks)} with masks"
        n_left_out = self.left_out.counts.total()
        if n_left_out:
            text += f"; excluded: {self.left_out.summary() if reasons else n_left_out}"
        if n_not_taken := self.total - n_left_out - len(self):
            text += f"; not needed for these steps: {n_not_taken}"
        return text

    def notes(self, name: str) -> list[str]:
        """Returns lines that name the first rows which are left out of a file, or lose their masks."""
        return [
            *self.left_out.lines(f"{name}: not trained on"),
            *self.masks_left_out.lines(f"{name}: trained on without the mask"),
        ]


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
    for image, annotations in by_image(coco):
        selection.add_image(image, annotations)
    for row in without_image(coco):
        selection.leave_out(row, str(row.reason), row.problem or "")
    if not selection.boxes:
        raise BadDataset(f"{name}: no box to train on{_why_none(selection.left_out)}")
    return selection.to_boxes(len(coco.annotations))


def _why_none(left_out: LeftOut) -> str:
    """Returns the end of a message on a file without a box to train on: reasons, remedies, and an example."""
    if not left_out.counts:
        return ": it has no annotations; give a file with boxes"
    reasons = [reason for reason, _ in left_out.counts.most_common()]
    remedies = dict.fromkeys(_REMEDIES.get(reason, _CORRECT_ROWS) for reason in reasons)
    return f" ({left_out.summary()}); {'; '.join(remedies)}. The first: {left_out.examples()[0]}"


_CORRECT_ROWS: Final = "correct the rows, which mal-client check lists"

_CORRECT_IMAGES: Final = "replace the images, which mal-client check lists"

_ADD_MASKS: Final = "correct the masks, or set train.supervision to box or auto"

_REMEDIES: Final[dict[str, str]] = {
    "IMAGE_NOT_FOUND": "check dataset.train_img_dir and the file names",
    "IMAGE_FORMAT": _CORRECT_IMAGES,
    "IMAGE_DECODE_FAILED": _CORRECT_IMAGES,
    "IMAGE_TOO_LARGE": "raise limits.max_pixels, max_side or max_image_bytes, or cut the images",
    Reason.CROWD: "if each crowd region is one object, as in files of CVAT, set dataset.crowd_as_objects=true",
    Reason.BOX_TOO_SMALL: "lower dataset.min_obj_size",
    Reason.BOX_TOO_LARGE: "raise dataset.max_obj_size",
    Reason.BOX_OUT_OF_BOUNDS: "set compat=none, which clips boxes to their images",
    Reason.BOX_ROTATED: "set dataset.rotated_boxes=upright, which takes the upright boxes around them",
    Reason.NO_GROUND_TRUTH: "set train.supervision to box or auto, which need no masks",
    Reason.BAD_GROUND_TRUTH: _ADD_MASKS,
    Reason.EMPTY_GROUND_TRUTH: _ADD_MASKS,
}
"""Remedies by the reason for which rows were left out; for other reasons, the rows are at fault."""


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

    def check(self, annotation: Annotation, size_wh: tuple[int, int]) -> Box:
        """Returns the part of the box inside its image. Raises _Excluded for a box that is not trained on."""
        problem = ""
        box_inside: Box | None = None
        try:
            box_inside, _ = check_box(annotation.box_xywh, (size_wh[1], size_wh[0]))
        except BadBox as error:
            problem = error.problem
        reason = training_exclusion(
            annotation, box_inside, size_wh, min_area=self.min_area, max_area=self.max_area, compat=self.compat
        )
        if reason is None and box_inside is not None:
            return box_inside
        raise _Excluded(reason or Reason.BAD_BOX, problem or self._problem(annotation, size_wh))

    def mask(self, annotation: Annotation, size_wh: tuple[int, int]) -> Rle | None:
        """Returns the mask to train on; None without one. Raises BadGroundTruth for one that cannot be used."""
        if self.supervision == "box" or (self.supervision != "mask" and not has_segmentation(annotation.raw)):
            return None
        return read_ground_truth(annotation.raw, (size_wh[1], size_wh[0]), row_name(annotation.id))

    def _problem(self, annotation: Annotation, size_wh: tuple[int, int]) -> str:
        x, y, w, h = annotation.box_xywh
        bounds = f"dataset.min_obj_size is {self.min_area:g} px², max_obj_size {self.max_area:g} px²"
        return f"box [{x:g}, {y:g}, {w:g}, {h:g}] in an image of {size_wh[0]}x{size_wh[1]} px; {bounds}"


class _Excluded(Exception):
    """A box that is not trained on."""

    def __init__(self, reason: Reason, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


@dataclass
class _Selection:
    """Boxes selected so far."""

    rule: _BoxRule
    images: Images
    sizes_read: dict[JsonId, tuple[int, int] | BadImage] = field(default_factory=dict)
    paths: list[Location] = field(default_factory=list)
    sizes_wh: list[tuple[int, int]] = field(default_factory=list)
    image_of_box: list[int] = field(default_factory=list)
    boxes: list[_SelectedBox] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    masks_left_out: LeftOut = field(default_factory=LeftOut)

    def read_remote_sizes(self, coco: CocoFile) -> None:
        """Reads the sizes of remote images that the file does not state, several at a time."""
        if not self.images.is_remote:
            return
        unknown = [image for image in coco.images.values() if image.size_wh is None and image.problem is None]
        with ReadAhead(unknown, lambda image: _read_size(image, self.images), lambda _: 0, attrgetter("id")) as ahead:
            for image in ahead:
                self.sizes_read[image.id] = ahead.take(image)

    def add_image(self, image: ImageInfo, annotations: Sequence[Annotation]) -> None:
        """Adds the selected boxes of an image, and the image if there is one; leaves out the others."""
        usable: list[Annotation] = []
        for row in annotations:
            if row.reason is not None:
                self.leave_out(row, row.reason, row.problem or "")
            elif row.iscrowd:
                self.leave_out(row, Reason.CROWD, f"{row_name(row.id)}: crowd regions (iscrowd 1) are not trained on")
            else:
                usable.append(row)
        if not usable:
            return
        size_wh = self._size(image)
        if isinstance(size_wh, BadImage):
            for row in usable:
                self.leave_out(row, size_wh.reason, str(size_wh))
            return
        n_before = len(self.boxes)
        for row in usable:
            self._add_box(row, size_wh)
        if len(self.boxes) > n_before:
            self.paths.append(self.images.locate(image.file_name))
            self.sizes_wh.append(size_wh)

    def leave_out(self, row: Annotation, reason: str, message: str) -> None:
        """Counts a row that is not trained on."""
        self.left_out.add(reason, message, row.id)

    def _add_box(self, row: Annotation, size_wh: tuple[int, int]) -> None:
        mask: Rle | None = None
        try:
            box_inside = self.rule.check(row, size_wh)
        except _Excluded as error:
            self.leave_out(row, error.reason, f"{row_name(row.id)}: {error}")
            return
        try:
            mask = self.rule.mask(row, size_wh)
        except BadGroundTruth as error:
            if self.rule.supervision == "mask":
                self.leave_out(row, error.reason, str(error))
                return
            self.masks_left_out.add(error.reason, str(error), row.id)
        # A user has checked this mask.
        score = 1.0 if row.raw.get(CORRECTED) is True else mask_score_of(row.raw)
        self.boxes.append(_SelectedBox(box_inside, mask, pseudo_label_weight(score, mask, box_inside)))
        self.image_of_box.append(len(self.paths))

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
            self.left_out,
            () if supervision == "box" else tuple(box.mask for box in self.boxes),
            _with_mean_one(weights) if supervision == "pseudo" else None,
            self.images.hosts,
            self.images.limits,
            self.masks_left_out,
        )

    def _size(self, image: ImageInfo) -> tuple[int, int] | BadImage:
        """Returns width and height, or why the image cannot be used. Decodes it only if the file states no size."""
        if image.id in self.sizes_read:
            return self.sizes_read[image.id]
        try:
            location = self.images.locate(image.file_name)
            if not self.images.is_remote and not Path(location).is_file():
                missing = f"{location}: no such file; check the image folder and the file name"
                return BadImage(missing, "IMAGE_NOT_FOUND")
        except BadImage as error:
            return error
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


def _read_size(image: ImageInfo, images: Images) -> tuple[int, int] | BadImage:
    """Returns width and height of a file, or why it cannot be decoded."""
    try:
        location = images.locate(image.file_name)
        large = open_large(location, images.limits, str(location))
        if large is not None:
            return large[0].size_wh
        pixels = read_image(location, limits=images.limits, hosts=images.hosts)
    except BadImage as error:
        return error
    return pixels.shape[1], pixels.shape[0]
