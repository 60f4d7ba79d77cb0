"""Writes the worst masks of a labeled file for CVAT: image list, labels, and annotations in "CVAT for images 1.1"."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from mal_client.images.image_files import ImageFiles
from mal_client.integrations.cvat.mask_encoding import mask_points
from mal_client.review.queue import QueueItem, by_image, check_xml_text, frame_size
from mal_train.core.atomic_io import write_text
from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import area
from mal_train.core.storage.addresses import redact


def review_xml(items: Sequence[QueueItem], names: Mapping[object, str], files: ImageFiles) -> str:
    """Builds the XML with the boxes and masks of each image, the image with the worst mask first.

    Args:
        items: the review queue.
        names: category names by ID.
        files: image files, for sizes that the labeled file does not state.

    Raises:
        BadImage: the size of an image is not stated and its file cannot be read.
    """
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    for image_id, (file_name, rows) in enumerate(by_image(items).items()):
        width, height = frame_size(rows[0], files)
        size = {"width": str(width), "height": str(height)}
        image = ElementTree.SubElement(root, "image", {"id": str(image_id), "name": file_name, **size})
        for item in rows:
            _add_item(image, item, names.get(item.row.get("category_id"), ""), (width, height))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def write_review_annotations(
    items: Sequence[QueueItem], names: Mapping[object, str], files: ImageFiles, folder: Path
) -> None:
    """Writes `annotations.xml`, `labels.json` and `images.txt` (one path per line) into a folder.

    Args:
        items: the review queue.
        names: category names by ID; they become the labels of the CVAT task.
        files: image files.
        folder: the folder, created if missing.

    Raises:
        BadImage: the size of an image is not stated and its file cannot be read.
        BadDataset: a name has a character that XML cannot hold, or a file name has a line break, with which it could
            add any other file to the list.
    """
    check_xml_text([*names.values(), *by_image(items)])
    broken = next((name for name in by_image(items) if len(name.splitlines()) > 1), None)
    if broken is not None:
        raise BadDataset(f"{broken!r}: a file name with a line break cannot be listed for CVAT; rename the image")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "annotations.xml", review_xml(items, names, files))
    labels = [{"name": name, "type": "any", "attributes": []} for name in sorted(set(names.values()))]
    write_text(folder / "labels.json", json.dumps(labels, indent=1) + "\n")
    write_text(folder / "images.txt", "".join(f"{redact(files.locate(file_name))}\n" for file_name in by_image(items)))


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
