"""Masks as Ultralytics' YOLO segmentation labels: one text file a picture, one polygon an object, and a data.yaml."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mal_client.formats.masks import LabelFiles, MaskFile, write_bytes
from mal_train.core.masks.polygons import single_polygon


def write_yolo(masks: MaskFile, images_dir: Path, folder: Path) -> None:
    """Writes `folder/labels/NAME.txt` for each picture, and `folder/data.yaml`.

    A row is `class x0 y0 x1 y1 …`, shares of width and height. YOLO knows one polygon an object: parts and holes are
    joined to it by bridges of no width. Filled by parity that is the mask; Ultralytics draws lines one pixel wide.
    For training, `labels` must lie beside a folder `images` that holds the pictures.

    Raises:
        OutputError: the disk.
    """
    files = LabelFiles(folder / "labels", ".txt", masks.export)
    for image, rows in masks.images():
        path = files.path(image, rows)
        if path is None:
            continue
        size = np.array([image.width, image.height], dtype=np.float64)
        lines = [
            " ".join([str(row.category_at), *(f"{value:.8g}" for value in (single_polygon(row.rings) / size).ravel())])
            for row in rows
        ]
        write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
    names = "".join(f"  {at}: {json.dumps(name)}\n" for at, name in enumerate(masks.names))
    pictures = json.dumps(str(images_dir.resolve()))
    write_bytes(folder / "data.yaml", f"train: {pictures}\nval: {pictures}\nnames:\n{names}".encode())
