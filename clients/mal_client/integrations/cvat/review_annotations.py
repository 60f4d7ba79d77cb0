"""Writes the worst masks of a labeled file for CVAT: image list, labels, and annotations in "CVAT for images 1.1"."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from mal_client.images.image_files import ImageFiles
from mal_client.integrations.cvat.mask_encoding import mask_points
from mal_client.review.queue import QueueItem, by_image, frame_size, xml_text
from mal_train.core.atomic_io import atomic_write, write_text
from mal_train.core.masks.rle import area
from mal_train.core.storage.addresses import redact


def review_xml(
    items: Mapping[str, Sequence[QueueItem]], names: Mapping[object, str], files: ImageFiles
) -> ElementTree.Element:
    """Builds the XML with the boxes and masks of each image.

    Args:
        items: the review queue by image name, the image with the worst mask first.
        names: category names by ID.
        files: image files, for sizes that the labeled file does not state.

    Raises:
        BadImage: the size of an image is not stated and its file cannot be read.
    """
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    # CVAT takes the labels of the task; other readers of the format need them here.
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    for name in sorted(set(names.values())):
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = name
        ElementTree.SubElement(label, "attributes")
    for image_id, (file_name, rows) in enumerate(items.items()):
        width, height = frame_size(rows[0], files)
        size = {"width": str(width), "height": str(height)}
        image = ElementTree.SubElement(root, "image", {"id": str(image_id), "name": file_name, **size})
        for item in rows:
            _add_item(image, item, names.get(item.row.get("category_id"), ""), (width, height))
    ElementTree.indent(root)
    return root


def write_review_annotations(
    items: Sequence[QueueItem], names: Mapping[object, str], files: ImageFiles, folder: Path
) -> list[str]:
    """Writes `annotations.xml`, `labels.json` and `images.txt` (one path per line) into a folder.

    Category names become the labels of the CVAT task, with escapes for characters that XML cannot hold. A path that
    begins with "-" is listed behind "./", so that no command takes it for an option.

    Args:
        items: the review queue.
        names: category names by ID.
        files: image files.
        folder: the folder, created if missing.

    Returns:
        A message for each image that is left out, because its name cannot be written.

    Raises:
        BadImage: the size of an image is not stated and its file cannot be read.
    """
    groups = by_image(items)
    problems = {name: problem for name in groups if (problem := _problem(name)) is not None}
    groups = {name: rows for name, rows in groups.items() if name not in problems}
    names = {category_id: xml_text(name) for category_id, name in names.items()}
    folder.mkdir(parents=True, exist_ok=True)
    text = ElementTree.tostring(review_xml(groups, names, files), encoding="unicode")
    write_text(folder / "annotations.xml", f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')
    labels = [{"name": name, "type": "any", "attributes": []} for name in sorted(set(names.values()))]
    write_text(folder / "labels.json", json.dumps(labels, indent=1) + "\n")
    with atomic_write(folder / "images.txt") as file:
        # Bytes of a folder that are not UTF-8 stay as they are on the disk.
        file.writelines(os.fsencode(_listed(redact(files.locate(name)))) + b"\n" for name in groups)
    return list(problems.values())


def _problem(name: str) -> str | None:
    """Returns why CVAT cannot get an image of this name; None if it can."""
    if xml_text(name) != name:
        return f"{name!r}: a name that is not UTF-8, or with a character that XML cannot hold; rename the image"
    if len(f"{name}.".splitlines()) > 1:  # it could add any other file to the list
        return f"{name!r}: a name with a line break cannot be listed; rename the image"
    return None


def _listed(path: str) -> str:
    return f"./{path}" if path.startswith("-") else path


def _add_item(image: ElementTree.Element, item: QueueItem, label: str, size_wh: tuple[int, int]) -> None:
    x, y, w, h = item.box
    common = {"label": label, "occluded": "0", "z_order": "0", "group_id": str(item.rank)}
    corners = {"xtl": x, "ytl": y, "xbr": x + w, "ybr": y + h}
    edges = {name: f"{value:.2f}" for name, value in corners.items()}
    ElementTree.SubElement(image, "box", {**common, "source": "manual", **edges})
    if item.rle is None or (item.rle.width, item.rle.height) != size_wh or not area(item.rle):
        return
    *runs, left, top, right, bottom = mask_points(item.rle)
    box = {"left": left, "top": top, "width": right - left + 1, "height": bottom - top + 1}
    mask = {**common, "source": "auto", "rle": ", ".join(map(str, runs)), **{k: str(v) for k, v in box.items()}}
    ElementTree.SubElement(image, "mask", mask)
