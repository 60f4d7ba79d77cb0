"""Reads masks and boxes from CVAT's export "CVAT for images 1.1", XML."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from mal_client.formats.boxes import BAD_ROW, EmptyImage, Row, RowError
from mal_client.formats.cvat_coco import EXPORTS, find_frame, read_cvat_coco, rotated_corners
from mal_client.formats.label_files import BLANK, ImageNames, ImageRows, only_image, stated_rows, without_rivals
from mal_client.formats.shapes import Shape, to_records
from mal_client.integrations.cvat.mask_encoding import mask_from_runs
from mal_client.types import BoxXywh
from mal_train.core.coco.annotations import Reason
from mal_train.core.coco.fields import enclosing_box, turn_of
from mal_train.core.errors import BadBox, BadDataset
from mal_train.core.input_files import cause_of, open_unzipped
from mal_train.core.masks.rle import MAX_RUNS, Rle
from mal_train.core.numbers import number_of
from mal_train.core.settings import RotatedBoxes

CORNERS: Final = ("xtl", "ytl", "xbr", "ybr")
REGION: Final = ("left", "top", "width", "height")
MIN_POINTS: Final = 3

_FIRST_BYTES: Final = 64
_INTEGER: Final = re.compile(r"[0-9]{1,9}")


def read_cvat(
    path: Path, images: ImageNames, rotated_boxes: RotatedBoxes = RotatedBoxes.REFUSE, name: str | None = None
) -> Iterator[Row]:
    """Yields the images of a file, each followed by its objects.

    Shapes of one label with the same group are one object, as in CVAT's own COCO export, unless several of them are
    boxes. Tracks, tags, points, polylines, ellipses, cuboids and skeletons are errors.

    Args:
        path: XML, or JSON of COCO 1.0, which its first character shows; maybe gzip.
        images: file names of the images; a name in the file is matched by its end. If several names lead to one image,
            each is an error, except the image's exact name; and so is each item of a name that several items have.
        rotated_boxes: treatment of rotated boxes; of one that is taken, the row has the corners.
        name: name of the file in rows and messages; None: that of the path.

    Raises:
        BadDataset: the file cannot be read, or is not such an export.
    """
    name = path.name if name is None else name
    try:
        with open_unzipped(path) as file:
            first = file.peek(_FIRST_BYTES).lstrip(BLANK)[:1]
            if first in (b"{", b"["):
                yield from without_rivals(read_cvat_coco(path, images, rotated_boxes, name))
                return
            events = ElementTree.iterparse(file, events=("start", "end"))
            yield from without_rivals(_read_xml(path, name, events, images, rotated_boxes))
    except OSError as error:
        raise BadDataset(
            f"{path}: cannot be read ({cause_of(error)}); give the XML or JSON file of the export"
        ) from None
    # LookupError, ValueError: an encoding that the parser does not know.
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        text = f"not valid XML ({error})" if first else "empty file"
        raise BadDataset(f"{path}: {text}; give {EXPORTS}") from None


def _read_xml(
    path: Path, name: str, events: Any, images: ImageNames, rotated_boxes: RotatedBoxes
) -> Iterator[ImageRows | RowError]:
    depth, number = 0, 0
    for event, node in events:
        depth += 1 if event == "start" else -1
        if event == "start":
            if depth == 1 and node.tag != "annotations":
                raise BadDataset(f"{path}: root is <{node.tag[:100]}>; export the task as CVAT for images 1.1")
            continue
        if depth != 1:
            continue
        number += 1
        if node.tag == "image":
            yield _read_image(node, f"{name}:image {node.get('name', number)}", images, rotated_boxes)
        elif node.tag == "track":
            where = f"{name}:track {node.get('id', number)}"
            text = "tracks are not converted; export the task as CVAT for images 1.1, which has their frames"
            yield RowError(where, BAD_ROW, f"{where}: {text}")
        node.clear()


def _read_image(
    node: ElementTree.Element, where: str, images: ImageNames, rotated_boxes: RotatedBoxes
) -> ImageRows | RowError:
    name = node.get("name", "")
    file_name = only_image(where, name, find_frame(images, name))
    if isinstance(file_name, RowError):
        return file_name
    try:
        width, height = (_integer(node, key, where) for key in ("width", "height"))
    except BadBox as error:
        return RowError(where, BAD_ROW, str(error))
    shapes = (
        _read_shape(child, f"{where}:{child.tag} {n}", (width, height), rotated_boxes)
        for n, child in enumerate(node, start=1)
    )
    rows = [EmptyImage(where, file_name), *to_records(shapes, file_name, (width, height))]
    return stated_rows(where, name, file_name, rows)


def _read_shape(
    node: ElementTree.Element, where: str, size_wh: tuple[int, int], rotated_boxes: RotatedBoxes
) -> Shape | RowError:
    category, group = node.get("label", ""), node.get("group_id", "")
    key = (group, category) if group not in ("", "0") else None
    try:
        if not category:
            raise BadBox(f"{where}: label is missing")
        if node.tag == "box":
            shape = _box_shape(node, where, (category, key), rotated_boxes)
            is_made = node.get("source") == "auto"
            return replace(shape, is_made=is_made) if isinstance(shape, Shape) else shape
        if node.tag == "polygon":
            return Shape(where, category, key, polygon=_polygon(node, where))
        if node.tag == "mask":
            return Shape(where, category, key, rle=_mask(node, where, size_wh))
    except (BadBox, BadDataset) as error:
        return RowError(where, BAD_ROW, str(error))
    return RowError(where, BAD_ROW, f"{where}: <{node.tag[:100]}> is not converted; expected box, polygon or mask")


def _box_shape(
    node: ElementTree.Element, where: str, identity: tuple[str, Hashable], rotated_boxes: RotatedBoxes
) -> Shape | RowError:
    (x, y, w, h), degrees = _box(node, where)
    if not degrees:
        return Shape(where, *identity, box=(x, y, w, h))
    if rotated_boxes is RotatedBoxes.REFUSE:
        text = f"rotated by {degrees:g} degrees; --rotated-boxes upright takes the upright box around it"
        return RowError(where, str(Reason.BOX_ROTATED), f"{where}: {text}")
    corners = rotated_corners((x, y, w, h), degrees)
    return Shape(where, *identity, box=enclosing_box((x, y, w, h), degrees), corners=corners)


def _box(node: ElementTree.Element, where: str) -> tuple[BoxXywh, float]:
    """Returns x, y, width, height, and the angle in degrees by which the box is rotated about its center."""
    degrees = _number(node.get("rotation") or "0", f"{where}: rotation")
    x0, y0, x1, y1 = (_number(node.get(key, ""), f"{where}: {key}") for key in CORNERS)
    if x1 <= x0 or y1 <= y0:
        raise BadBox(f"{where}: box from {x0:g}, {y0:g} to {x1:g}, {y1:g} px has no area")
    box = (x0, y0, x1 - x0, y1 - y0)
    return box, turn_of(box, degrees)


def _polygon(node: ElementTree.Element, where: str) -> tuple[float, ...]:
    points = [point.split(",") for point in node.get("points", "").split(";")]
    if len(points) < MIN_POINTS or any(len(point) != 2 for point in points):
        raise BadBox(f"{where}: points are not {MIN_POINTS} or more pairs x,y")
    return tuple(_number(value, f"{where}: points") for point in points for value in point)


def _mask(node: ElementTree.Element, where: str, size_wh: tuple[int, int]) -> Rle:
    left, top, width, height = (_integer(node, key, where) for key in REGION)
    text = node.get("rle", "")
    texts = [run.strip() for run in text.split(",", MAX_RUNS)]
    if len(texts) > MAX_RUNS or not all(map(_INTEGER.fullmatch, texts)):
        raise BadBox(f"{where}: rle is not a list of up to {MAX_RUNS} integers")
    return mask_from_runs(list(map(int, texts)), (left, top, width, height), size_wh, where)


def _integer(node: ElementTree.Element, key: str, where: str) -> int:
    text = node.get(key, "")
    if not _INTEGER.fullmatch(text.strip()):
        raise BadBox(f"{where}: {key} {text[:100]!r}; expected an integer, 0 or more")
    return int(text)


def _number(text: str, name: str) -> float:
    value = number_of(text)
    if value is None:
        raise BadBox(f"{name} {text[:100]!r}; expected a finite number")
    return value
