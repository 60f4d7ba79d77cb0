"""Reads boxes from Pascal VOC XML files, one per image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mal_client.formats.boxes import (
    BAD_ROW,
    BoxRecord,
    RowError,
    annotation_files,
    match_error,
    parse_numbers,
    read_label_file,
)

CORNERS = ("xmin", "ymin", "xmax", "ymax")
KEPT = ("pose", "truncated", "difficult", "occluded")


def read_voc(
    labels_dir: Path, file_names: Sequence[str], *, zero_based: bool = False
) -> Iterator[BoxRecord | RowError]:
    """Yields the boxes of all XML files below a folder, file by file.

    Args:
        labels_dir: folder of the XML files.
        file_names: file names of the images; each XML file is matched by its `filename`, or else by its own name.
        zero_based: corners are coordinates that start at 0, as CVAT, Roboflow and others write them. By default they
            are pixel indices that start at 1 and are inclusive, as in the VOC development kit.
    """
    by_name: dict[str, list[str]] = {}
    for name in file_names:
        for key in {name, Path(name).name, Path(name).stem}:
            by_name.setdefault(key, []).append(name)
    for path in annotation_files(labels_dir, ".xml"):
        relative = str(path.relative_to(labels_dir))
        try:
            root = ElementTree.fromstring(read_label_file(path))
        # LookupError, ValueError: an encoding that the parser does not know.
        except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
            yield RowError(relative, "BAD_FILE", f"{relative}: not valid XML ({error})")
            continue
        stated = (root.findtext("filename") or "").strip()
        matches = by_name.get(stated) or by_name.get(path.stem) or []
        if len(matches) != 1:
            yield match_error(relative, stated or path.stem, matches)
            continue
        try:
            size = _size_of(root)
        except ValueError as error:  # thousands of digits
            yield RowError(relative, "BAD_FILE", f"{relative}: size: {error}")
            continue
        for number, node in enumerate(root.iter("object"), start=1):
            yield _read_object(node, f"{relative}:object {number}", matches[0], size, zero_based=zero_based)


def _read_object(
    node: ElementTree.Element, where: str, file_name: str, stated_wh: tuple[int, int] | None, *, zero_based: bool
) -> BoxRecord | RowError:
    name = (node.findtext("name") or "").strip()
    if not name:
        return RowError(where, BAD_ROW, f"{where}: name is missing")
    corners = parse_numbers((node.findtext(f"bndbox/{corner}") or "" for corner in CORNERS), CORNERS, where)
    if isinstance(corners, RowError):
        return corners
    x0, y0, x1, y1 = corners
    if not zero_based:
        x0, y0 = x0 - 1, y0 - 1
    extra: dict[str, Any] = {key: node.findtext(key) for key in KEPT if node.findtext(key) is not None}
    return BoxRecord(where, file_name, name, (x0, y0, x1, y1), stated_wh=stated_wh, extra=extra)


def _size_of(root: ElementTree.Element) -> tuple[int, int] | None:
    width, height = (root.findtext(f"size/{side}") or "" for side in ("width", "height"))
    # Some tools write 0 for an unknown size.
    return (
        (int(width), int(height)) if width.isdecimal() and height.isdecimal() and int(width) and int(height) else None
    )
