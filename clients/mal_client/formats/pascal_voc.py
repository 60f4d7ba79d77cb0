"""Reads boxes from Pascal VOC XML files, one per image."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree
from xml.parsers.expat import errors
from xml.parsers.expat.errors import codes

from mal_client.formats.boxes import BAD_FILE, BAD_ROW, BoxRecord, Row, RowError, are_shares, parse_numbers
from mal_client.formats.image_sets import ImageSet
from mal_client.formats.label_files import (
    BLANK,
    ImageNames,
    ImageRows,
    annotation_files,
    broken_file,
    file_rows,
    match_stated,
    read_label_file,
    unreadable,
    without_rivals,
    without_suffix,
)
from mal_client.formats.rotated import corners_of, extent
from mal_client.formats.row_forms import Corners
from mal_train.core.input_files import decode_text
from mal_train.core.numbers import counted, number_of

CORNERS: Final = ("xmin", "ymin", "xmax", "ymax")
ROTATED: Final = ("cx", "cy", "w", "h", "angle")
KEPT: Final = ("pose", "truncated", "difficult", "occluded")
SCORES: Final = ("confidence", "score", "conf")

# Encodings of several bytes per character, which the XML parser does not know.
MULTI_BYTE: Final = frozenset(
    {"gbk", "gb2312", "gb18030", "big5", "big5hkscs", "cp950", "cp932", "cp949", "johab", "hz"}
    | {"shift_jis", "shift_jis_2004", "euc_jp", "euc_jis_2004", "euc_kr", "iso2022_jp", "iso2022_kr"}
)
_OF_ENCODING: Final = frozenset(
    codes[getattr(errors, f"XML_ERROR_{name}")]
    for name in ("INVALID_TOKEN", "PARTIAL_CHAR", "UNKNOWN_ENCODING", "INCORRECT_ENCODING")
)
"""Errors of the XML parser at bytes that another encoding explains."""
_DECLARED: Final = re.compile(rb"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9._-]{1,40})[\"']")


# By which an outline exceeds coordinates; the index of a pixel is its center.
_OUTLINE_SHIFT: Final = {Corners.INDICES: 0.5, Corners.FROM_0: 0.0, Corners.FROM_1: 1.0}


def read_voc(
    labels_dir: Path,
    images: ImageNames,
    *,
    corners: Corners | None = None,
    image_set: ImageSet | None = None,
    encoding: str | None = None,
    on_notice: Callable[[str], object] = lambda _: None,
) -> Iterator[Row]:
    """Yields the boxes of all XML files below a folder, file by file.

    Args:
        labels_dir: folder of the XML files.
        images: the images. An XML file belongs to the image at its own path or of its own name, or that its `filename`
            names; if these are two images, the file is an error.
        corners: meaning of the corners; None: indices, and a notice says so.
        image_set: read only the files that it lists.
        encoding: encoding of files without a byte order mark, in place of the declared one.
        on_notice: receives a sentence on the corners, after the last row, if they show another form or none was given.
    """
    evidence, form = _Evidence(), corners or Corners.INDICES
    files = (
        _read_file(path, name, images, form, evidence, encoding=encoding)
        for path, name in annotation_files(labels_dir, ".xml")
        if image_set is None or image_set.takes(without_suffix(name))
    )
    yield from without_rivals(files)
    if image_set is not None:
        yield from image_set.missing()
    if notice := evidence.notice(corners):
        on_notice(notice)


def _read_file(
    path: Path, name: str, images: ImageNames, form: Corners, evidence: _Evidence, *, encoding: str | None
) -> ImageRows | RowError:
    root = _parse(path, name, encoding)
    if isinstance(root, RowError):
        return broken_file(root, images)
    image = match_stated(root.findtext("filename") or "", name, images)
    if isinstance(image, RowError):
        return image
    try:
        size = _size_of(root)
    except ValueError as error:
        return file_rows(name, image, [RowError(name, BAD_FILE, f"{name}: size: {error}")])
    evidence.add_file(root)
    rows: list[Row] = []
    for number, node in enumerate(root.iter("object"), start=1):
        row = _read_object(node, f"{name}:object {number}", image, size, form)
        evidence.add(row)
        rows.append(row)
    return file_rows(name, image, rows)


class _Evidence:
    """Counts of what the files of a folder show of the form of their corners."""

    def __init__(self) -> None:
        self._boxes = self._beyond = self._from_roboflow = 0

    def add_file(self, root: ElementTree.Element) -> None:
        """Counts a file that names Roboflow as its source."""
        self._from_roboflow += (root.findtext("source/database") or "").strip().lower().startswith("roboflow")

    def add(self, row: BoxRecord | RowError) -> None:
        """Counts a box, and one that ends 1 px beyond its image, as only coordinates from 1 do."""
        if isinstance(row, BoxRecord) and not row.corners:
            self._boxes += 1
            if row.stated_wh is not None:
                ends = zip(row.xyxy[2:], row.stated_wh, strict=True)
                self._beyond += any(side and end == side + 1 for end, side in ends)

    def notice(self, given: Corners | None) -> str | None:
        """Returns a sentence for the user; None if the form was given, and nothing contradicts it."""
        if given is Corners.FROM_1 or not self._boxes:
            return None
        remedy = f"if all are coordinates from 1, give --corners {Corners.FROM_1}"
        if self._beyond:
            return f"{counted(self._beyond, 'box')} of {self._boxes} end 1 px beyond the image; {remedy}"
        if given is not None:
            return None
        if self._from_roboflow:
            return (
                f"{counted(self._from_roboflow, 'file')} of Roboflow, which writes coordinates from 1, were read as "
                f"indices of pixels; {remedy}"
            )
        return (
            "corners were read as VOC's indices of pixels, from 1 and inclusive; if they are coordinates, boxes are up "
            f"to 1 px off: give --corners {Corners.FROM_0} or {Corners.FROM_1}"
        )


def _parse(path: Path, name: str, encoding: str | None) -> ElementTree.Element | RowError:
    try:
        data = read_label_file(path)
        if not data.strip(BLANK):
            return RowError(name, BAD_FILE, f"{name}: empty file; export it again, or delete it")
        root = ElementTree.fromstring(_decoded(data, encoding))
    except OSError as error:
        return RowError(name, BAD_FILE, f"{name}: {unreadable(error, encoding)}")
    except ElementTree.ParseError as error:
        is_text = error.code in _OF_ENCODING
        remedy = "its encoding may not be the declared one: give --encoding" if is_text else "export it again"
        return RowError(name, BAD_FILE, f"{name}: not valid XML ({error}); {remedy}")
    # An encoding that the parser does not know, or that the file does not have.
    except (LookupError, ValueError) as error:
        return RowError(name, BAD_FILE, f"{name}: cannot be decoded ({error}); give its encoding with --encoding")
    if root.tag != "annotation":
        return RowError(name, BAD_FILE, f"{name}: root element <{root.tag[:100]}>; expected <annotation>")
    return root


def _decoded(data: bytes, encoding: str | None) -> str | bytes:
    """Returns the text of an XML file in an encoding that the parser does not know, else its bytes."""
    if encoding is not None:
        return decode_text(data, encoding)
    declared = _DECLARED.match(data)
    name = "utf-8" if declared is None else codecs.lookup(declared[1].decode("ascii")).name
    return decode_text(data, name) if name in MULTI_BYTE else data


def _read_object(
    node: ElementTree.Element, where: str, file_name: str, stated_wh: tuple[int, int] | None, form: Corners
) -> BoxRecord | RowError:
    try:
        category = _text(node, "name")
        if not category:
            raise ValueError("name is missing")
        boxes, rotated = node.findall("bndbox"), node.findall("robndbox")
        if len(boxes) + len(rotated) != 1:
            raise ValueError(f"{len(boxes)} bndbox, {len(rotated)} robndbox; expected one of them")
        extra: dict[str, Any] = {key: text for key in KEPT if (text := node.findtext(key)) is not None}
        extra |= _score(node, where)
        if rotated:
            corners = corners_of(*_numbers(rotated[0], ROTATED, where))
            return BoxRecord(
                where, file_name, category, extent(corners), stated_wh=stated_wh, corners=corners, extra=extra
            )
        xyxy = _corners(boxes[0], where, form)
        if parts := node.findall("part"):
            extra["parts"] = [_part(part, where, form) for part in parts]
        polygon = _polygon(node, where, form)
    except ValueError as error:
        return RowError(where, BAD_ROW, f"{where}: {str(error).removeprefix(f'{where}: ')}")
    return BoxRecord(where, file_name, category, xyxy, stated_wh=stated_wh, polygon=polygon, extra=extra)


def _text(node: ElementTree.Element, name: str) -> str:
    """Returns the text of the only child of this name, "" without one. Raises ValueError for several."""
    found = node.findall(name)
    if len(found) > 1:
        raise ValueError(f"{name} is given {len(found)} times")
    return (found[0].text or "").strip() if found else ""


def _numbers(node: ElementTree.Element, names: tuple[str, ...], where: str) -> tuple[float, ...]:
    values = parse_numbers((_text(node, name) for name in names), names, where)
    if isinstance(values, RowError):
        raise ValueError(values.message)
    return values


def _corners(node: ElementTree.Element, where: str, form: Corners) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = _numbers(node, CORNERS, where)
    if are_shares((x0, y0, x1, y1)):
        raise ValueError(f"corners {x0:g}, {y0:g}, {x1:g}, {y1:g}; expected pixels, not shares")
    if form is Corners.FROM_0:
        return x0, y0, x1, y1
    if min(x0, y0) < 1:
        remedy = f"for coordinates from 0, give --corners {Corners.FROM_0}"
        raise ValueError(f"corner {x0:g}, {y0:g}; --corners {form} begin at 1; {remedy}")
    end = 1 if form is Corners.FROM_1 else 0
    return x0 - 1, y0 - 1, x1 - end, y1 - end


def _part(node: ElementTree.Element, where: str, form: Corners) -> dict[str, Any]:
    """Returns a part of an object, such as a head, as a name and a box x, y, w, h."""
    boxes = node.findall("bndbox")
    if len(boxes) != 1:
        raise ValueError(f"part with {len(boxes)} bndbox; expected one")
    x0, y0, x1, y1 = _corners(boxes[0], where, form)
    return {"name": _text(node, "name"), "bbox": [x0, y0, x1 - x0, y1 - y0]}


def _polygon(node: ElementTree.Element, where: str, form: Corners) -> tuple[float, ...]:
    """Returns the outline of `polygon` with x1, y1, x2, y2, …, as Roboflow writes it."""
    polygon = node.find("polygon")
    if polygon is None or not len(polygon):
        return ()
    count = len(polygon) // 2
    if count < 3 or len(polygon) % 2:
        raise ValueError(f"polygon with {len(polygon)} coordinates; expected x1, y1, … of three points or more")
    names = tuple(f"{axis}{number}" for number in range(1, count + 1) for axis in "xy")
    return tuple(value - _OUTLINE_SHIFT[form] for value in _numbers(polygon, names, where))


def _score(node: ElementTree.Element, where: str) -> dict[str, float]:
    name = next((name for name in SCORES if _text(node, name)), None)
    return {} if name is None else {"score": _numbers(node, (name,), where)[0]}


def _size_of(root: ElementTree.Element) -> tuple[int, int] | None:
    """Returns the stated size, 0 for an unknown side; None if it states no side. Some tools write 0 themselves."""
    width, height = (_side_of(root, side) for side in ("width", "height"))
    return (width, height) if width or height else None


def _side_of(root: ElementTree.Element, name: str) -> int:
    text = (root.findtext(f"size/{name}") or "").strip()
    side = number_of(text) if text else 0.0
    if side is None or not side.is_integer() or side < 0:
        raise ValueError(f"{name} {text[:40]!r}; expected a whole number of pixels, or nothing")
    return int(side)
