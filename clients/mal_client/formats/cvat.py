"""Reads masks and boxes from CVAT's exports "CVAT for images 1.1" (XML) and "COCO 1.0" (JSON)."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from mal_client.formats.boxes import BAD_ROW, BoxRecord, EmptyImage, Row, RowError
from mal_client.formats.label_files import ImageNames
from mal_client.formats.rotated import corners_of
from mal_client.formats.shapes import Shape, image_error, to_records
from mal_client.integrations.cvat.mask_encoding import mask_from_runs
from mal_client.types import BoxXywh
from mal_train.core.coco.annotations import Annotation, ImageInfo, Reason, by_image, read_coco
from mal_train.core.coco.fields import box_of, enclosing_box, rotation_of
from mal_train.core.errors import BadBox, BadDataset
from mal_train.core.masks.rle import MAX_RUNS, Rle
from mal_train.core.numbers import finite_number
from mal_train.core.settings import RotatedBoxes, RowRules

CORNERS: Final = ("xtl", "ytl", "xbr", "ybr")
REGION: Final = ("left", "top", "width", "height")
MIN_POINTS: Final = 3

_INTEGER: Final = re.compile(r"[0-9]{1,9}")


def read_cvat(path: Path, images: ImageNames, rotated_boxes: RotatedBoxes = RotatedBoxes.REFUSE) -> Iterator[Row]:
    """Yields the images of a file, each followed by its objects.

    Shapes of one label with the same group are one object, as in CVAT's own COCO export, unless several of them are
    boxes. Tracks, tags, points, polylines, ellipses, cuboids and skeletons are errors.

    Args:
        path: XML, of which one image is in memory at a time, or JSON.
        images: file names of the images; a name in the file is matched by its end.
        rotated_boxes: treatment of rotated boxes; of one that is taken, the row has the corners.

    Raises:
        BadDataset: the file cannot be read, or is not such an export.
    """
    if path.suffix.lower() == ".json":
        yield from _read_coco(path, images, rotated_boxes)
        return
    try:
        with path.open("rb") as file:
            events = ElementTree.iterparse(file, events=("start", "end"))
            yield from _read_xml(path, events, images, rotated_boxes)
    except OSError as error:
        raise BadDataset(
            f"{path}: cannot be read ({error.strerror}); give the XML or JSON file of the export"
        ) from None
    # LookupError, ValueError: an encoding that the parser does not know.
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise BadDataset(f"{path}: not valid XML ({error}); export the task as CVAT for images 1.1") from None


def _read_xml(path: Path, events: Any, images: ImageNames, rotated_boxes: RotatedBoxes) -> Iterator[Row]:
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
            yield from _read_image(node, f"{path.name}:image {node.get('name', number)}", images, rotated_boxes)
        elif node.tag == "track":
            where = f"{path.name}:track {node.get('id', number)}"
            text = "tracks are not converted; export the task as CVAT for images 1.1, which has their frames"
            yield RowError(where, BAD_ROW, f"{where}: {text}")
        node.clear()


def _read_image(
    node: ElementTree.Element, where: str, images: ImageNames, rotated_boxes: RotatedBoxes
) -> Iterator[Row]:
    name = node.get("name", "")
    matches = _find(images, name)
    if len(matches) != 1:
        yield image_error(where, name, matches)
        return
    try:
        width, height = (_integer(node, key, where) for key in ("width", "height"))
    except BadBox as error:
        yield RowError(where, BAD_ROW, str(error))
        return
    yield EmptyImage(where, matches[0])
    shapes = (
        _read_shape(child, f"{where}:{child.tag} {n}", (width, height), rotated_boxes)
        for n, child in enumerate(node, start=1)
    )
    yield from to_records(shapes, matches[0], (width, height))


def _find(images: ImageNames, name: str) -> list[str]:
    folder, _, base = name.strip("/").rpartition("/")
    return images.find(base, folder)


def _read_shape(
    node: ElementTree.Element, where: str, size_wh: tuple[int, int], rotated_boxes: RotatedBoxes
) -> Shape | RowError:
    category, group = node.get("label", ""), node.get("group_id", "")
    key = (group, category) if group not in ("", "0") else None
    try:
        if not category:
            raise BadBox(f"{where}: label is missing")
        if node.tag == "box":
            return _box_shape(node, where, (category, key), rotated_boxes)
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
    corners = _corners((x, y, w, h), degrees)
    return Shape(where, *identity, box=enclosing_box((x, y, w, h), degrees), corners=corners)


def _corners(box_xywh: BoxXywh, degrees: float) -> tuple[float, ...]:
    x, y, w, h = box_xywh
    return corners_of(x + w / 2, y + h / 2, w, h, math.radians(degrees))


def _box(node: ElementTree.Element, where: str) -> tuple[BoxXywh, float]:
    """Returns x, y, width, height, and the angle in degrees by which the box is rotated about its center."""
    degrees = _number(node.get("rotation") or "0", f"{where}: rotation") % 360
    x0, y0, x1, y1 = (_number(node.get(key, ""), f"{where}: {key}") for key in CORNERS)
    if x1 <= x0 or y1 <= y0:
        raise BadBox(f"{where}: box from {x0:g}, {y0:g} to {x1:g}, {y1:g} px has no area")
    return (x0, y0, x1 - x0, y1 - y0), degrees


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
    try:
        value = finite_number(float(text))
    except ValueError:
        value = None
    if value is None:
        raise BadBox(f"{name} {text[:100]!r}; expected a finite number")
    return value


def _read_coco(path: Path, images: ImageNames, rotated_boxes: RotatedBoxes) -> Iterator[Row]:
    """Yields the objects of CVAT's COCO export, which marks every mask as a crowd."""
    try:
        coco = read_coco(path, RowRules(rotated_boxes=rotated_boxes))
    except BadDataset as error:
        raise BadDataset(f"{error}; --from cvat reads the exports CVAT for images 1.1 and COCO 1.0") from None
    for row in coco.annotations:
        if row.image_id is None or row.image_id not in coco.images:
            yield _problem(path, row, "its image is not in the file")
    for image, rows in by_image(coco):
        where = f"{path.name}:image {image.file_name}"
        matches = _find(images, image.file_name)
        if image.size_wh is None or len(matches) != 1:
            if image.size_wh is None:
                yield RowError(where, "IMAGE_UNUSABLE", f"{where}: {image.problem or 'width and height are missing'}")
            else:
                yield image_error(where, image.file_name, matches)
            continue
        yield EmptyImage(where, matches[0])
        for row in rows:
            yield _coco_record(path, row, image, matches[0], coco.category_names)


def _coco_record(path: Path, row: Annotation, image: ImageInfo, file_name: str, names: Any) -> BoxRecord | RowError:
    if row.problem is not None or row.category_id is None:
        return _problem(path, row, "no category")
    segmentation = row.raw.get("segmentation")
    try:
        if isinstance(segmentation, dict):
            segmentation = Rle.from_coco(segmentation).to_coco()
    except BadDataset as error:
        return _problem(path, row, str(error))
    x, y, w, h = row.box_xywh
    where = f"{path.name}:annotation {row.id}"
    return BoxRecord(
        where,
        file_name,
        names[row.category_id],
        (x, y, x + w, y + h),
        stated_wh=image.size_wh,
        is_displayed=True,
        segmentation=segmentation or None,
        corners=_corners(box_of(row.raw)[0], rotation_of(row.raw)) if row.is_rotated else (),
    )


def _problem(path: Path, row: Annotation, text: str) -> RowError:
    """Returns the error of a row: the one found when it was parsed, else `text`."""
    where = f"{path.name}:annotation {row.id}"
    message = f"{where}: {text}" if row.problem is None else f"{path.name}:{row.problem}"
    return RowError(where, str(row.reason or BAD_ROW), message)
