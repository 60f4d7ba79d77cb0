"""COCO files on the way in: read, and checked row by row.

Knows nothing of pixels. A file is refused as a whole only when its rows cannot be told apart (not JSON, a list missing,
an id used twice); every other fault belongs to one row, which stays in its place and says what is wrong with it.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from mal_train.core.errors import BadDataset
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.rle import MAX_PIXELS

JsonId = int | float | str
"""An id as JSON holds it; 1 and "1" are different ids."""

NO_BOX: Final[Box] = (math.nan, math.nan, math.nan, math.nan)
"""Stands where a row holds no readable box."""

_REQUIRED = ("images", "annotations", "categories")
_LISTED = 5


class Reason(StrEnum):
    """Why a row gets no mask, is not trained on or is not counted; written into files and reports."""

    NOT_AN_OBJECT = "NOT_AN_OBJECT"
    BAD_ID = "BAD_ID"
    IMAGE_UNKNOWN = "IMAGE_UNKNOWN"
    IMAGE_UNUSABLE = "IMAGE_UNUSABLE"
    CATEGORY_UNKNOWN = "CATEGORY_UNKNOWN"
    BAD_BOX = "BAD_BOX"
    BAD_ISCROWD = "BAD_ISCROWD"
    BAD_SCORE = "BAD_SCORE"
    CROWD = "CROWD"
    BOX_TOO_SMALL = "BOX_TOO_SMALL"
    BOX_TOO_LARGE = "BOX_TOO_LARGE"
    BOX_OUT_OF_BOUNDS = "BOX_OUT_OF_BOUNDS"
    NOT_ANSWERED = "NOT_ANSWERED"
    REPEATED = "REPEATED"
    FRAME_MISMATCH = "FRAME_MISMATCH"
    NO_GROUND_TRUTH = "NO_GROUND_TRUTH"
    BAD_GROUND_TRUTH = "BAD_GROUND_TRUTH"


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One row of `images`.

    Attributes:
        id: as in the file.
        file_name: path below the image folder; "" where `problem` says that it is missing.
        width: px, None where the file does not say (the picture itself then does).
        height: likewise.
        problem: what makes the row unusable, as a sentence; None when nothing does.
    """

    id: JsonId
    file_name: str
    width: int | None
    height: int | None
    problem: str | None = None

    @property
    def size_wh(self) -> tuple[int, int] | None:
        """(width, height) in px; None where the file leaves one of them out."""
        return None if self.width is None or self.height is None else (self.width, self.height)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One row of `annotations`, with or without a fault.

    Attributes:
        id: as in the file; None where it is missing or no id.
        image_id: likewise.
        category_id: likewise.
        box_xywh: the user's numbers, finite unless `problem` is set (else `NO_BOX` or what could be read). Whether the
            box is positive and meets its image is for `geometry.check_box` to say.
        iscrowd: a region of many objects: never trained on, never counted, copied through when labeling.
        raw: the row itself, unknown fields included; {} where the row is no object.
        problem: the first fault found, as a sentence that names the row; None when there is none.
        reason: the kind of that fault.
    """

    id: JsonId | None
    image_id: JsonId | None
    category_id: JsonId | None
    box_xywh: Box
    iscrowd: bool
    raw: Mapping[str, Any]
    problem: str | None = None
    reason: Reason | None = None


@dataclass(frozen=True)
class CocoFile:
    """A COCO file in memory.

    Attributes:
        raw: the whole JSON object; nothing in it is changed by this module.
        images: by id, in file order.
        annotations: one for each row of raw["annotations"], in that order.
        categories: the rows of raw["categories"] that are objects.
        notes: faults of `images` and `categories` rows that no annotation can carry, one sentence each.
    """

    raw: dict[str, Any]
    images: dict[JsonId, ImageInfo]
    annotations: list[Annotation]
    categories: list[dict[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def category_names(self) -> dict[JsonId, str]:
        """Names by id, in file order; the id itself where a row has no name."""
        names: dict[JsonId, str] = {}
        for row in self.categories:
            category_id = _id_of(row, "id")
            if category_id is not None:
                names.setdefault(category_id, str(row.get("name", category_id)))
        return names

    def problem_counts(self) -> Counter[str]:
        """Number of annotations with a fault, by reason."""
        return Counter(str(row.reason) for row in self.annotations if row.reason is not None)


def read_coco(path: Path) -> CocoFile:
    """Reads a COCO annotation file whole; see `parse_coco`.

    Raises:
        BadDataset: from `read_json` or `parse_coco`.
    """
    return parse_coco(read_json(path), str(path))


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        BadDataset: no such file, not readable, or not JSON (UTF-8, UTF-16 or UTF-32).
    """
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise BadDataset(f"{path}: cannot be read ({fault.strerror}); give the path of a COCO JSON file") from fault
    try:
        raw = json.loads(content)
    except RecursionError:
        raise BadDataset(f"{path}: nested too deeply to be a COCO file") from None
    except ValueError as fault:
        detail = "empty file" if not content.strip() else str(fault)
        raise BadDataset(f"{path}: not JSON ({detail}); a COCO annotation file is needed") from fault
    return raw


def parse_coco(raw: Any, name: str = "dataset") -> CocoFile:
    """Checks every row of a parsed COCO file and loses none.

    >>> coco = parse_coco({"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 3, "name": "cup"}],
    ...                    "annotations": [{"id": "a", "image_id": 1, "category_id": 3, "bbox": [0, 0, 4, 4]},
    ...                                    {"id": "b", "image_id": 2, "category_id": 3, "bbox": [0, 0, 4, 4]}]})
    >>> [row.problem for row in coco.annotations]
    [None, 'annotation "b": image_id 2 is not among the images of the file']

    Args:
        raw: what `json.loads` gave.
        name: how messages call the file.

    Raises:
        BadDataset: not an object, a missing or wrong top-level list, or an annotation id or image id used twice.
    """
    if not isinstance(raw, dict):
        hint = " (a list is a COCO results file)" if isinstance(raw, list) else ""
        raise BadDataset(f"{name}: holds {kind(raw)}{hint}; an object with {', '.join(_REQUIRED)} is needed")
    missing = [key for key in _REQUIRED if key not in raw]
    if missing:
        raise BadDataset(f"{name}: has no {', '.join(map(repr, missing))}; a COCO file needs {', '.join(_REQUIRED)}")
    for key in _REQUIRED:
        if not isinstance(raw[key], list):
            raise BadDataset(f"{name}: {key!r} is {kind(raw[key])}; it must be a list")
    _refuse_duplicates(raw["images"], f"{name}: image id")
    _refuse_duplicates(raw["annotations"], f"{name}: annotation id")

    notes: list[str] = []
    images = read_images(raw["images"], notes)
    categories = [row for row in raw["categories"] if isinstance(row, dict)]
    known_categories = category_ids(raw["categories"], notes)
    annotations = [read_annotation(row, at, images, known_categories) for at, row in enumerate(raw["annotations"])]
    return CocoFile(raw, images, annotations, categories, tuple(notes))


def by_image(coco: CocoFile) -> Iterator[tuple[ImageInfo, list[Annotation]]]:
    """Every image once, in file order, with its annotations in file order, those with a problem included.

    An image without annotations comes with an empty list. Annotations of an unknown image belong to no image and do
    not appear: `annotations` of the file has them, with their problem.
    """
    rows: dict[JsonId, list[Annotation]] = {image_id: [] for image_id in coco.images}
    for annotation in coco.annotations:
        if annotation.image_id is not None and annotation.image_id in rows:
            rows[annotation.image_id].append(annotation)
    for image_id, image in coco.images.items():
        yield image, rows.pop(image_id)


def id_order(value: JsonId) -> tuple[bool, float, str]:
    """Sort key for ids of mixed types: numbers by value, then strings."""
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")


def is_id(value: object) -> bool:
    """Whether a JSON value can be an id: a string or a finite number."""
    if isinstance(value, bool):
        return False
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _id_of(row: Mapping[str, Any], key: str) -> JsonId | None:
    value = row.get(key)
    return value if is_id(value) else None


def _refuse_duplicates(rows: Sequence[Any], what: str) -> None:
    seen: set[JsonId] = set()
    twice: dict[JsonId, None] = {}
    for row in rows:
        row_id = _id_of(row, "id") if isinstance(row, dict) else None
        if row_id is not None:
            note_id(row_id, seen, twice)
    refuse_repeated(twice, what)


def note_id(row_id: JsonId, seen: set[JsonId], twice: dict[JsonId, None]) -> None:
    """Adds an id to `seen`, or to `twice` when it is there already."""
    if row_id in seen:
        twice[row_id] = None
    seen.add(row_id)


def refuse_repeated(repeated: Iterable[JsonId], what: str) -> None:
    """Raises BadDataset when there are ids that stand more than once; lists the first few."""
    twice = list(repeated)
    if twice:
        listed = ", ".join(_shown(value) for value in twice[:_LISTED])
        more = f" and {len(twice) - _LISTED} more" if len(twice) > _LISTED else ""
        raise BadDataset(f"{what} {listed}{more} used more than once; ids must be unique, so renumber them")


def read_images(rows: Iterable[Any], notes: list[str]) -> dict[JsonId, ImageInfo]:
    """The rows of `images` by id; `notes` takes a sentence for each that has none."""
    images: dict[JsonId, ImageInfo] = {}
    for at, row in enumerate(rows):
        if not isinstance(row, dict):
            notes.append(f"images[{at}]: {kind(row)}; an object is needed")
            continue
        image_id = _id_of(row, "id")
        if image_id is None:
            notes.append(f"images[{at}]: id {_shown(row.get('id'))}; a number or a string is needed")
            continue
        images[image_id] = _read_image_row(row, image_id)
    return images


def _read_image_row(row: Mapping[str, Any], image_id: JsonId) -> ImageInfo:
    file_name = row.get("file_name")
    width, height = (_side(row.get(key)) for key in ("width", "height"))
    called = f"image {_shown(image_id)}"
    problem = None
    if not isinstance(file_name, str) or not file_name or "\0" in file_name:
        problem = f"{called}: file_name {_shown(file_name)}; the path of the picture below the image folder is needed"
        file_name = ""
    for key, side in (("width", width), ("height", height)):
        if side is None and row.get(key) is not None and problem is None:
            problem = f"{called}: {key} {_shown(row[key])}; a whole number of pixels is needed, or none at all"
    if width is not None and height is not None and width * height > MAX_PIXELS and problem is None:
        problem = f"{called}: {width} x {height} px; the limit is {MAX_PIXELS} px in all"
    return ImageInfo(image_id, file_name, width, height, problem)


def _side(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= MAX_PIXELS:
        return None
    return int(value) if value == int(value) else None


def category_ids(rows: Iterable[Any], notes: list[str]) -> set[JsonId]:
    """The ids of `categories`; `notes` takes a sentence for each row without one, or with one used before."""
    ids: set[JsonId] = set()
    for at, row in enumerate(rows):
        category_id = _id_of(row, "id") if isinstance(row, dict) else None
        if category_id is None:
            notes.append(f"categories[{at}]: no id that is a number or a string")
        elif category_id in ids:
            notes.append(f"categories[{at}]: id {_shown(category_id)} used before; the first one counts")
        else:
            ids.add(category_id)
    return ids


def read_annotation(
    row: Any, at: int, images: Mapping[JsonId, ImageInfo], known_categories: Collection[JsonId]
) -> Annotation:
    """Row `at` of `annotations` with the first fault that is found in it."""
    if not isinstance(row, dict):
        problem = f"annotations[{at}]: {kind(row)}; an object is needed"
        return Annotation(None, None, None, NO_BOX, False, {}, problem, Reason.NOT_AN_OBJECT)
    annotation_id, image_id, category_id = (_id_of(row, key) for key in ("id", "image_id", "category_id"))
    box, box_fault = _read_box(row)
    crowd = row.get("iscrowd", 0)
    fault: tuple[Reason, str] | None = None
    if annotation_id is None:
        fault = Reason.BAD_ID, f"id {_shown(row.get('id'))}; a number or a string is needed"
    elif image_id is None or image_id not in images:
        fault = Reason.IMAGE_UNKNOWN, _unknown_image(row, images)
    elif (image_problem := images[image_id].problem) is not None:
        fault = Reason.IMAGE_UNUSABLE, image_problem
    elif category_id is None or category_id not in known_categories:
        fault = (
            Reason.CATEGORY_UNKNOWN,
            f"category_id {_shown(row.get('category_id'))} is not among the categories of the file",
        )
    elif box_fault is not None:
        fault = Reason.BAD_BOX, box_fault
    elif crowd not in (0, 1, None):
        fault = Reason.BAD_ISCROWD, f"iscrowd {_shown(crowd)}; 0 or 1 is needed"
    if fault is None:
        return Annotation(annotation_id, image_id, category_id, box, crowd in (1, True), row)
    reason, text = fault
    problem = f"{f'annotations[{at}]' if annotation_id is None else called(annotation_id)}: {text}"
    return Annotation(annotation_id, image_id, category_id, box, crowd in (1, True), row, problem, reason)


def _unknown_image(row: Mapping[str, Any], images: Mapping[JsonId, ImageInfo]) -> str:
    value = row.get("image_id")
    message = f"image_id {_shown(value)} is not among the images of the file"
    if isinstance(value, str) and value.isdecimal() and len(value) < 19 and int(value) in images:
        message += f" (there is an image {int(value)}, a number: the types must be the same)"
    elif isinstance(value, int) and str(value) in images:
        message += f' (there is an image "{value}", a string: the types must be the same)'
    return message


def _read_box(row: Mapping[str, Any]) -> tuple[Box, str | None]:
    box = row.get("bbox")
    rule = "four finite numbers x, y, width, height are needed"
    if box is None:
        return NO_BOX, f"has no bbox; {rule}"
    if not isinstance(box, list) or len(box) != 4:
        return NO_BOX, f"bbox {_shown(box)}; {rule}"
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in box):
        return NO_BOX, f"bbox {_shown(box)}; {rule}"
    try:
        x, y, w, h = (float(value) for value in box)
    except OverflowError:
        return NO_BOX, f"bbox {_shown(box)}; {rule}"
    return (x, y, w, h), None if all(map(math.isfinite, (x, y, w, h))) else f"bbox {_shown(box)}; {rule}"


def called(annotation_id: object) -> str:
    """How messages call a row: `annotation "a"`."""
    return f"annotation {_shown(annotation_id)}"


def _shown(value: object) -> str:
    """A value as JSON, cut where it would flood a message."""
    try:
        text = json.dumps(value)
    except ValueError:
        # An integer of thousands of digits has no decimal form in Python.
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    return {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }.get(type(value), "null")
