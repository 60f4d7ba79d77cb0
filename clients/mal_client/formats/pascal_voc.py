"""Boxes from Pascal VOC's XML files, one a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mal_client.formats.boxes import BAD_ROW, BoxRecord, RowError, annotation_files, numbers

CORNERS = ("xmin", "ymin", "xmax", "ymax")
KEPT = ("pose", "truncated", "difficult", "occluded")


def read_voc(labels_dir: Path, pictures: Sequence[str], *, zero_based: bool = False) -> Iterator[BoxRecord | RowError]:
    """Boxes of all XML files below a folder, file by file.

    Args:
        labels_dir: the XML files.
        pictures: file names of the pictures; a file's `filename` is looked up among them, else its own name.
        zero_based: corners are coordinates from 0 (CVAT, Roboflow and others write so). By default they are the
            numbers of pixels, counted from 1 and both inside the box, as the VOC development kit has it.
    """
    by_name: dict[str, list[str]] = {}
    for name in pictures:
        for key in {name, Path(name).name, Path(name).stem}:
            by_name.setdefault(key, []).append(name)
    for path in annotation_files(labels_dir, ".xml"):
        relative = str(path.relative_to(labels_dir))
        try:
            root = ElementTree.fromstring(path.read_bytes())
        except (OSError, ElementTree.ParseError) as error:
            yield RowError(relative, "BAD_FILE", f"{relative}: no XML that can be read ({error})")
            continue
        stated = (root.findtext("filename") or "").strip()
        found = by_name.get(stated) or by_name.get(path.stem) or []
        if len(found) != 1:
            text = (
                f"several pictures have its name: {', '.join(found)}" if found else f"no picture {stated or path.stem}"
            )
            yield RowError(relative, "BAD_IMAGE", f"{relative}: {text}")
            continue
        for at, node in enumerate(root.iter("object"), start=1):
            yield _read_object(node, f"{relative}:object {at}", found[0], _size_of(root), zero_based=zero_based)


def _read_object(
    node: ElementTree.Element, where: str, picture: str, stated_wh: tuple[int, int] | None, *, zero_based: bool
) -> BoxRecord | RowError:
    name = (node.findtext("name") or "").strip()
    if not name:
        return RowError(where, BAD_ROW, f"{where}: has no name")
    found = numbers((node.findtext(f"bndbox/{corner}") or "" for corner in CORNERS), CORNERS, where)
    if isinstance(found, RowError):
        return found
    x0, y0, x1, y1 = found
    if not zero_based:
        x0, y0 = x0 - 1, y0 - 1
    extra: dict[str, Any] = {key: node.findtext(key) for key in KEPT if node.findtext(key) is not None}
    return BoxRecord(where, picture, name, (x0, y0, x1, y1), stated_wh=stated_wh, extra=extra)


def _size_of(root: ElementTree.Element) -> tuple[int, int] | None:
    width, height = (root.findtext(f"size/{side}") or "" for side in ("width", "height"))
    # Some tools write 0 for "not known".
    return (
        (int(width), int(height)) if width.isdecimal() and height.isdecimal() and int(width) and int(height) else None
    )
