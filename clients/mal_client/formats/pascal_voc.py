"""Reads boxes from Pascal VOC XML files, one per image."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final
from xml.etree import ElementTree

from mal_client.formats.boxes import BAD_ROW, BoxRecord, Row, RowError, are_shares, parse_numbers
from mal_client.formats.image_sets import ImageSet
from mal_client.formats.label_files import ImageNames, Matches, annotation_files, read_label_file, without_suffix
from mal_client.formats.rotated import corners_of, extent
from mal_train.core.input_files import decode_text

CORNERS: Final = ("xmin", "ymin", "xmax", "ymax")
ROTATED: Final = ("cx", "cy", "w", "h", "angle")
KEPT: Final = ("pose", "truncated", "difficult", "occluded")
SCORES: Final = ("confidence", "score", "conf")

# Encodings of several bytes per character, which the XML parser does not know.
MULTI_BYTE: Final = frozenset(
    {"gbk", "gb2312", "gb18030", "big5", "big5hkscs", "cp950", "cp932", "cp949", "johab", "hz"}
    | {"shift_jis", "shift_jis_2004", "euc_jp", "euc_jis_2004", "euc_kr", "iso2022_jp", "iso2022_kr"}
)
_DECLARED: Final = re.compile(rb"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9._-]{1,40})[\"']")


def read_voc(
    labels_dir: Path,
    images: ImageNames,
    *,
    zero_based: bool = False,
    image_set: ImageSet | None = None,
    encoding: str | None = None,
) -> Iterator[Row]:
    """Yields the boxes of all XML files below a folder, file by file.

    Args:
        labels_dir: folder of the XML files.
        images: the images. An XML file belongs to the image at its own path or of its own name, or that its `filename`
            names; if these are two images, the file is an error.
        zero_based: corners are coordinates that start at 0, as CVAT, Roboflow and others write them. By default they
            are pixel indices that start at 1 and are inclusive, as in the VOC development kit.
        image_set: read only the files that it lists.
        encoding: encoding of files without a byte order mark, in place of the declared one.
    """
    matches = Matches()
    for path, name in annotation_files(labels_dir, ".xml"):
        if image_set is not None and not image_set.takes(without_suffix(name)):
            continue
        root = _parse(path, name, encoding)
        if isinstance(root, RowError):
            yield root
            continue
        image = _match(root, name, images, matches)
        if isinstance(image, RowError):
            yield image
            continue
        try:
            size = _size_of(root)
        except ValueError as error:
            yield RowError(name, "BAD_FILE", f"{name}: size: {error}")
            continue
        for number, node in enumerate(root.iter("object"), start=1):
            yield _read_object(node, f"{name}:object {number}", image, size, zero_based=zero_based)
    if image_set is not None:
        yield from image_set.missing("annotation file")


def _parse(path: Path, name: str, encoding: str | None) -> ElementTree.Element | RowError:
    try:
        root = ElementTree.fromstring(_decoded(read_label_file(path), encoding))
    # LookupError, ValueError: an encoding that the parser does not know, or that the file does not have.
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        text = f"not valid XML ({error}); if it is, its encoding is not the declared one: give --encoding"
        return RowError(name, "BAD_FILE", f"{name}: {text}")
    if root.tag != "annotation":
        return RowError(name, "BAD_FILE", f"{name}: root element <{root.tag[:100]}>; expected <annotation>")
    return root


def _decoded(data: bytes, encoding: str | None) -> str | bytes:
    """Returns the text of an XML file in an encoding that the parser does not know, else its bytes."""
    if encoding is not None:
        return decode_text(data, encoding)
    declared = _DECLARED.match(data)
    name = "utf-8" if declared is None else codecs.lookup(declared[1].decode("ascii")).name
    return decode_text(data, name) if name in MULTI_BYTE else data


def _match(root: ElementTree.Element, name: str, images: ImageNames, matches: Matches) -> str | RowError:
    """Returns the image of an XML file."""
    stem, folder = without_suffix(name), str(PurePosixPath(name).parent)
    stated = (root.findtext("filename") or "").strip()
    by_stem = images.find(PurePosixPath(stem).name, folder)
    by_stated = images.find(stated, folder) if stated else []
    if len(by_stem) == len(by_stated) == 1 and by_stem != by_stated:
        text = f"filename names {by_stated[0]!r}, its own name {by_stem[0]!r}; correct one of them"
        return RowError(name, "BAD_IMAGE", f"{name}: {text}")
    best = min((by_stated, by_stem), key=lambda found: abs(len(found) - 1) or not found)
    return matches.take(name, stated or stem, best)


def _read_object(
    node: ElementTree.Element, where: str, file_name: str, stated_wh: tuple[int, int] | None, *, zero_based: bool
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
        xyxy = _corners(boxes[0], where, zero_based=zero_based)
        if parts := node.findall("part"):
            extra["parts"] = [_part(part, where, zero_based=zero_based) for part in parts]
        polygon = _polygon(node, where, zero_based=zero_based)
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


def _corners(node: ElementTree.Element, where: str, *, zero_based: bool) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = _numbers(node, CORNERS, where)
    if are_shares((x0, y0, x1, y1)):
        raise ValueError(f"corners {x0:g}, {y0:g}, {x1:g}, {y1:g}; expected pixels, not shares")
    if zero_based:
        return x0, y0, x1, y1
    if min(x0, y0) < 1:
        raise ValueError(f"corner {x0:g}, {y0:g}; VOC counts pixels from 1; for coordinates from 0, give --zero-based")
    return x0 - 1, y0 - 1, x1, y1


def _part(node: ElementTree.Element, where: str, *, zero_based: bool) -> dict[str, Any]:
    """Returns a part of an object, such as a head, as a name and a box x, y, w, h."""
    boxes = node.findall("bndbox")
    if len(boxes) != 1:
        raise ValueError(f"part with {len(boxes)} bndbox; expected one")
    x0, y0, x1, y1 = _corners(boxes[0], where, zero_based=zero_based)
    return {"name": _text(node, "name"), "bbox": [x0, y0, x1 - x0, y1 - y0]}


def _polygon(node: ElementTree.Element, where: str, *, zero_based: bool) -> tuple[float, ...]:
    """Returns the outline of `polygon` with x1, y1, x2, y2, …, as Roboflow writes it."""
    polygon = node.find("polygon")
    if polygon is None or not len(polygon):
        return ()
    count = len(polygon) // 2
    if count < 3 or len(polygon) % 2:
        raise ValueError(f"polygon with {len(polygon)} coordinates; expected x1, y1, … of three points or more")
    names = tuple(f"{axis}{number}" for number in range(1, count + 1) for axis in "xy")
    # An index of a pixel from 1 is the center of the pixel.
    return tuple(value - (0 if zero_based else 0.5) for value in _numbers(polygon, names, where))


def _score(node: ElementTree.Element, where: str) -> dict[str, float]:
    name = next((name for name in SCORES if _text(node, name)), None)
    return {} if name is None else {"score": _numbers(node, (name,), where)[0]}


def _size_of(root: ElementTree.Element) -> tuple[int, int] | None:
    """Returns the stated size; None if there is none. Some tools write 0 for an unknown size."""
    texts = [(root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    if not all(texts):
        return None
    width, height = (float(text) for text in texts)
    if not (width.is_integer() and height.is_integer() and width >= 0 and height >= 0):
        raise ValueError(f"{texts[0][:40]} x {texts[1][:40]}; expected whole numbers of pixels")
    return (int(width), int(height)) if width and height else None
