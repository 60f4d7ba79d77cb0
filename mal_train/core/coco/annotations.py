"""Reads COCO files and checks them row by row. Reads no pixels.

A file is rejected only if its rows cannot be identified: not JSON, a list is missing, an id is used twice. Every other
error concerns one row, which keeps its index and carries the description of the error.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeGuard

from mal_train.core.coco.fields import (
    NO_BOX,
    box_of,
    enclosing_box,
    file_name_of,
    integers_of,
    points_of,
    rotation_of,
    side_of,
)
from mal_train.core.coco.json_file import open_json, remedy
from mal_train.core.coco.json_reader import REQUIRED_LISTS, missing_lists, not_a_list, not_an_object
from mal_train.core.coco.json_values import as_json, check_nesting, json_problem, json_type, too_deep
from mal_train.core.coco.parquet_reader import read_parquet
from mal_train.core.coco.parquet_schema import is_parquet
from mal_train.core.errors import BadDataset
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.points import Point
from mal_train.core.masks.rle import MAX_PIXELS
from mal_train.core.settings import COCO_RULES, RotatedBoxes, RowRules
from mal_train.core.storage.addresses import Location, redact

JsonId = int | float | str
"""Id as JSON represents it; 1 and "1" are different ids."""

NO_CATEGORY: Final = "(none)"
"""Name of the category of rows without one, in reports."""

_MAX_LISTED_IDS: Final = 5


class Reason(StrEnum):
    """Reason for which a row gets no mask, is not trained on or is not counted; written into files and reports."""

    NOT_AN_OBJECT = "NOT_AN_OBJECT"
    BAD_ID = "BAD_ID"
    IMAGE_UNKNOWN = "IMAGE_UNKNOWN"
    IMAGE_UNUSABLE = "IMAGE_UNUSABLE"
    BAD_BOX = "BAD_BOX"
    BOX_ROTATED = "BOX_ROTATED"
    BAD_POINT = "BAD_POINT"
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
    EMPTY_GROUND_TRUTH = "EMPTY_GROUND_TRUTH"


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One row of `images`.

    Attributes:
        id: as in the file.
        file_name: path relative to the image folder; "" if it is missing (see `problem`).
        width: width in px; None if the file does not state it (the image itself is read then).
        height: height in px; None if the file does not state it.
        negative_category_ids: LVIS: categories that are known to be absent; None where the row does not say. Integers,
            as all ids of LVIS.
        not_exhaustive_category_ids: LVIS: categories of which not every object is annotated; None where not said.
        problem: description of what makes the row unusable; None for a usable row.
    """

    id: JsonId
    file_name: str
    width: int | None
    height: int | None
    problem: str | None = None
    negative_category_ids: Sequence[int] | None = None
    not_exhaustive_category_ids: Sequence[int] | None = None

    @property
    def is_federated(self) -> bool:
        """The row says which categories are judged in the image, as in LVIS."""
        return self.negative_category_ids is not None or self.not_exhaustive_category_ids is not None

    @property
    def size_wh(self) -> tuple[int, int] | None:
        """(width, height) in px; None if the file omits one of them."""
        return None if self.width is None or self.height is None else (self.width, self.height)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One row of `annotations`, valid or not.

    Attributes:
        id: as in the file; None if it is missing or not an id.
        image_id: as in the file; None if it is missing or not an id.
        category_id: as in the file; None if it is missing or not an id. Masks need none, so it is no error.
        box_xywh: the user's numbers; of a rotated box, the smallest upright box around it. Finite unless `problem` is
            set, in which case it is `NO_BOX` or what was read. `geometry.check_box` checks that the box is positive and
            intersects its image.
        iscrowd: the row is a region of many objects: never trained on, never counted, copied when labeling.
        raw: the row itself with unknown fields; {} if the row is not an object.
        problem: description of the first error, which names the row; None for a valid row.
        reason: machine-readable reason of `problem`.
        points: points that the mask obeys, in px of the image.
    """

    id: JsonId | None
    image_id: JsonId | None
    category_id: JsonId | None
    box_xywh: Box
    iscrowd: bool
    raw: Mapping[str, Any]
    problem: str | None = None
    reason: Reason | None = None
    points: tuple[Point, ...] = ()

    @property
    def is_rotated(self) -> bool:
        """The box of the row is rotated."""
        return rotation_of(self.raw, box_of(self.raw)[0])[0] != 0.0


@dataclass(frozen=True)
class CocoFile:
    """A COCO file in memory.

    Attributes:
        raw: the complete JSON object, unchanged.
        images: by id, in file order.
        annotations: one per row of raw["annotations"], in that order.
        categories: the rows of raw["categories"] that are objects.
        notes: one sentence per invalid row of `images` and `categories`, which no annotation can carry.
    """

    raw: dict[str, Any]
    images: dict[JsonId, ImageInfo]
    annotations: list[Annotation]
    categories: list[dict[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def category_names(self) -> dict[JsonId, str]:
        """Category names by id, in file order; the id itself for a row without a name."""
        names: dict[JsonId, str] = {}
        for row in self.categories:
            category_id = _id_of(row, "id")
            if category_id is not None:
                names.setdefault(category_id, str(row.get("name", category_id)))
        return names

    @property
    def used_category_names(self) -> dict[JsonId | None, str]:
        """`category_names`, then the ids that only annotations name; None, for rows without a category, comes last."""
        names = dict[JsonId | None, str](self.category_names.items())
        has_none = False
        for row in self.annotations:
            if row.category_id is not None:
                names.setdefault(row.category_id, str(row.category_id))
            else:
                has_none |= row.problem is None
        return {**names, None: NO_CATEGORY} if has_none else names

    @property
    def category_frequencies(self) -> dict[JsonId, str]:
        """Frequencies of categories in LVIS by their ids; see `frequencies_of`."""
        return frequencies_of(self.categories)

    def file_names(self) -> Iterator[str]:
        """Yields the file name of each image."""
        return (image.file_name for image in self.images.values())

    def problem_counts(self) -> Counter[str]:
        """Returns the number of invalid annotations by reason."""
        return Counter(str(row.reason) for row in self.annotations if row.reason is not None)


def read_coco(path: Location, rules: RowRules = COCO_RULES, instead: str | None = None) -> CocoFile:
    """Reads a COCO annotation file in JSON or, by its suffix, in parquet into memory; see `parse_coco`.

    For uses of boxes and masks: annotations come `without_points`, which only labeling reads.

    Raises:
        BadDataset: from `read_json`, `read_parquet` or `parse_coco`.
        ConfigError: parquet, and pyarrow is not installed.
    """
    raw = read_parquet(path) if is_parquet(path) else read_json(Path(path), instead)
    coco = parse_coco(raw, redact(path), rules, instead)
    return replace(coco, annotations=[without_points(row) for row in coco.annotations])


def read_json(path: Path, instead: str | None = None) -> Any:
    """Reads a JSON file in UTF-8, UTF-16 or UTF-32, also compressed by gzip.

    Raises:
        BadDataset: the file is missing, unreadable, not JSON, or nested more than MAX_NESTING deep.
    """
    with open_json(path, instead) as file:
        content = file.read()
    try:
        return check_nesting(json.loads(content), path)
    except RecursionError:
        raise too_deep(path) from None
    except ValueError as error:
        raise BadDataset(f"{path}: not JSON ({json_problem(error)}); {instead or remedy(path)}") from error


def parse_coco(raw: Any, name: str = "dataset", rules: RowRules = COCO_RULES, instead: str | None = None) -> CocoFile:
    """Checks every row of a parsed COCO file; invalid rows are kept with their error.

    >>> coco = parse_coco({"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 3, "name": "cup"}],
    ...                    "annotations": [{"id": "a", "image_id": 1, "category_id": 3, "bbox": [0, 0, 4, 4]},
    ...                                    {"id": "b", "image_id": 2, "category_id": 3, "bbox": [0, 0, 4, 4]}]})
    >>> [row.problem for row in coco.annotations]
    [None, 'annotation "b": image_id 2 is not among the images of the file']

    Args:
        raw: result of `json.loads`.
        name: name of the file in messages.
        rules: how rows are read.
        instead: what to give in place of another file, for errors; None: `json_file.remedy`.

    Raises:
        BadDataset: not an object, a required list is missing or not a list, or an annotation or image id is repeated.
    """
    if not isinstance(raw, dict):
        raise BadDataset(not_an_object(name, raw, instead))
    missing = [key for key in REQUIRED_LISTS if key not in raw]
    if missing:
        raise BadDataset(missing_lists(name, missing))
    rows_of_categories = raw.get("categories")
    for key, value in (*((key, raw[key]) for key in REQUIRED_LISTS), ("categories", rows_of_categories or [])):
        if not isinstance(value, list):
            raise BadDataset(not_a_list(name, key, value))
    for kind, member in (("image", "images"), ("annotation", "annotations")):
        _check_unique_ids(raw[member], f"{name}: {kind} id", member)

    notes: list[str] = []
    images = dict(read_images(raw["images"], notes))
    categories = [row for row in rows_of_categories or [] if isinstance(row, dict)]
    category_ids(rows_of_categories or [], notes)
    annotations = [read_annotation(row, n, images, rules) for n, row in enumerate(raw["annotations"])]
    return CocoFile(raw, images, annotations, categories, tuple(notes))


def by_image(coco: CocoFile) -> Iterator[tuple[ImageInfo, list[Annotation]]]:
    """Yields every image with its annotations, valid or not, both in file order.

    An image without annotations has an empty list. Annotations of an unknown image are not yielded; they are in
    `CocoFile.annotations`, with their problem.
    """
    rows: dict[JsonId, list[Annotation]] = {image_id: [] for image_id in coco.images}
    for annotation in coco.annotations:
        if annotation.image_id is not None and annotation.image_id in rows:
            rows[annotation.image_id].append(annotation)
    for image_id, image in coco.images.items():
        yield image, rows.pop(image_id)


def without_image(coco: CocoFile) -> list[Annotation]:
    """Returns the annotations that `by_image` does not yield, since they name no image of the file."""
    return [row for row in coco.annotations if row.image_id is None or row.image_id not in coco.images]


def without_points(annotation: Annotation) -> Annotation:
    """Returns an annotation for uses of its box alone; a field `points` of another meaning is no problem there."""
    if annotation.reason is Reason.BAD_POINT:
        return replace(annotation, problem=None, reason=None)
    return replace(annotation, points=()) if annotation.points else annotation


def id_order(value: JsonId) -> tuple[bool, float, str]:
    """Returns the sort key of an id: numbers by value, then strings."""
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")


def is_id(value: object) -> TypeGuard[JsonId]:
    """Returns True if a JSON value can be an id: a string or a finite number."""
    if isinstance(value, bool):
        return False
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _id_of(row: Mapping[str, Any], key: str) -> JsonId | None:
    value = row.get(key)
    return value if type(value) is int or is_id(value) else None


def _check_unique_ids(rows: Sequence[Any], name: str, member: str) -> None:
    seen: set[JsonId] = set()
    repeated: dict[JsonId, None] = {}
    for row in rows:
        row_id = _id_of(row, "id") if isinstance(row, dict) else None
        if row_id is not None:
            record_id(row_id, seen, repeated)
    reject_duplicate_ids(repeated, name, member, lambda: rows)


def record_id(row_id: JsonId, seen: set[JsonId], repeated: dict[JsonId, None]) -> None:
    """Adds an id to `seen`, and to `repeated` if it was in `seen` before."""
    if row_id in seen:
        repeated[row_id] = None
    seen.add(row_id)


def reject_duplicate_ids(
    repeated: Collection[JsonId], name: str, member: str = "", rows: Callable[[], Iterable[Any]] | None = None
) -> None:
    """Raises BadDataset if `repeated` is not empty; the message begins with `name` and lists the first ids.

    With the name of their list and its rows, which are read again then, it also tells the first two places of each.
    """
    if repeated:
        first = list(islice(repeated, _MAX_LISTED_IDS))
        places = {} if rows is None else _places(first, member, rows())
        listed = ", ".join(as_json(value) + places.get(value, "") for value in first)
        n_more = len(repeated) - _MAX_LISTED_IDS
        more = f" and {n_more} more" if n_more > 0 else ""
        raise BadDataset(f"{name} {listed}{more} used more than once; ids must be unique: renumber them")


def _places(ids: Sequence[JsonId], member: str, rows: Iterable[Any]) -> dict[JsonId, str]:
    """Returns the first two places of each id among rows: " (annotations[0], annotations[7])"."""
    found: dict[JsonId, list[str]] = {value: [] for value in ids}
    for index, row in enumerate(rows):
        row_id = _id_of(row, "id") if isinstance(row, dict) else None
        if row_id is not None and row_id in found:
            found[row_id].append(f"{member}[{index}]")
    return {value: f" ({', '.join(places[:2])})" for value, places in found.items()}


def read_images(rows: Iterable[Any], notes: list[str], start: int = 0) -> Iterator[tuple[JsonId, ImageInfo]]:
    """Yields (id, image) of each row of `images`; appends a sentence to `notes` for each row without an id.

    Args:
        rows: JSON values of the rows.
        notes: receives the sentences.
        start: index of the first row in the file.
    """
    for index, row in enumerate(rows, start):
        if not isinstance(row, dict):
            notes.append(f"images[{index}]: {json_type(row)}; it must be an object")
            continue
        image_id = _id_of(row, "id")
        if image_id is None:
            notes.append(f"images[{index}]: id {as_json(row.get('id'))}; it must be a number or a string")
            continue
        yield image_id, _read_image(row, image_id)


def _read_image(row: Mapping[str, Any], image_id: JsonId) -> ImageInfo:
    file_name = file_name_of(row)
    (width, width_error), (height, height_error) = (side_of(row.get(key)) for key in ("width", "height"))
    problem = None
    if not file_name:
        shown = as_json(row.get("file_name"))
        problem = f"file_name {shown}; it must be the path of the image in the image folder"
    elif width_error or height_error:
        key, error = ("width", width_error) if width_error else ("height", height_error)
        problem = f"{key} {as_json(row.get(key))}; {error}"
    elif width is not None and height is not None and width * height > MAX_PIXELS:
        problem = f"{width} x {height} px; the limit is {MAX_PIXELS} px"
    message = None if problem is None else f"image {as_json(image_id)}: {problem}"
    return ImageInfo(
        image_id,
        file_name,
        width,
        height,
        message,
        integers_of(row.get("neg_category_ids")),
        integers_of(row.get("not_exhaustive_category_ids")),
    )


def frequencies_of(rows: Iterable[Any]) -> dict[JsonId, str]:
    """Returns the frequency of each category by its id, where the row states one, as in LVIS."""
    stated = ((_id_of(row, "id"), row.get("frequency")) for row in rows if isinstance(row, dict))
    return {key: value for key, value in stated if key is not None and isinstance(value, str)}


def category_ids(rows: Iterable[Any], notes: list[str]) -> set[JsonId]:
    """Returns the ids of `categories`; appends a sentence to `notes` for each row with a missing or repeated id."""
    ids: set[JsonId] = set()
    for index, row in enumerate(rows):
        category_id = _id_of(row, "id") if isinstance(row, dict) else None
        if category_id is None:
            notes.append(f"categories[{index}]: no id that is a number or a string")
        elif category_id in ids:
            notes.append(f"categories[{index}]: id {as_json(category_id)} is repeated; the first row is used")
        else:
            ids.add(category_id)
    return ids


def read_annotation(
    row: Any, index: int, images: Mapping[JsonId, ImageInfo], rules: RowRules = COCO_RULES
) -> Annotation:
    """Parses row `index` of `annotations`; records the first error found in it."""
    if not isinstance(row, dict):
        problem = f"annotations[{index}]: {json_type(row)}; it must be an object"
        return Annotation(None, None, None, NO_BOX, False, {}, problem, Reason.NOT_AN_OBJECT)
    annotation_id, image_id, category_id = _id_of(row, "id"), _id_of(row, "image_id"), _id_of(row, "category_id")
    box, box_error = box_of(row)
    points, point_error = points_of(row)
    iscrowd = row.get("iscrowd", 0) in (1, True) and not rules.crowd_as_objects
    rotation, rotation_error = rotation_of(row, box)
    error: tuple[Reason, str] | None = None
    if annotation_id is None:
        error = Reason.BAD_ID, f"id {as_json(row.get('id'))}; it must be a number or a string"
    elif image_id is None or image_id not in images:
        error = Reason.IMAGE_UNKNOWN, _unknown_image(row, images)
    elif (image_problem := images[image_id].problem) is not None:
        error = Reason.IMAGE_UNUSABLE, image_problem
    elif box_error is not None:
        error = Reason.BAD_BOX, box_error
    elif rotation_error is not None:
        error = Reason.BAD_BOX, rotation_error
    elif row.get("iscrowd", 0) not in (0, 1, None):
        error = Reason.BAD_ISCROWD, f"iscrowd {as_json(row['iscrowd'])}; it must be 0 or 1"
    elif rotation and rules.rotated_boxes is RotatedBoxes.REFUSE:
        error = Reason.BOX_ROTATED, _rotated(rotation)
    elif point_error is not None:  # the last one, so that `without_points` hides no other
        error = Reason.BAD_POINT, point_error
    if rotation and box_error is None:
        box = enclosing_box(box, rotation)
    if error is None:
        return Annotation(annotation_id, image_id, category_id, box, iscrowd, row, points=points)
    reason, text = error
    name = f"annotations[{index}]" if annotation_id is None else row_name(annotation_id)
    return Annotation(annotation_id, image_id, category_id, box, iscrowd, row, f"{name}: {text}", reason)


def _rotated(degrees: float) -> str:
    return (
        f"box is rotated by {degrees:g} degrees (attributes.rotation); draw it without rotation, or label the upright "
        "box around it with --rotated-boxes upright (in mal-train: dataset.rotated_boxes=upright)"
    )


def _unknown_image(row: Mapping[str, Any], images: Mapping[JsonId, ImageInfo]) -> str:
    value = row.get("image_id")
    message = f"image_id {as_json(value)} is not among the images of the file"
    if isinstance(value, str) and value.isdecimal() and len(value) < 19 and int(value) in images:
        message += f" (image {int(value)} exists as a number; the JSON types must match)"
    elif isinstance(value, int) and str(value) in images:
        message += f' (image "{value}" exists as a string; the JSON types must match)'
    return message


def row_name(annotation_id: object) -> str:
    """Returns the name of a row in messages: `annotation "a"`."""
    return f"annotation {as_json(annotation_id)}"
