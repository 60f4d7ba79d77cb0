"""Writes a small synthetic COCO data set to train on: images with bright ellipses on a dark background."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mal_train.core.masks.rle import encode_mask

Change = Callable[[dict[str, Any]], None]


def write_scenes(
    folder: Path, *, images: int = 4, masks: bool = True, seed: int = 0, change: Change | None = None
) -> tuple[Path, Path]:
    """Writes images of 96x80 px with two ellipses each; returns (annotation file, image folder).

    Args:
        folder: output folder, created if missing.
        images: number of images.
        masks: write the mask of each annotation.
        seed: seed of positions and colors.
        change: edits the COCO object before it is written.
    """
    rng = np.random.default_rng(seed)
    image_dir = folder / "images"
    image_dir.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[0:80, 0:96]
    coco: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "ellipse"}]}
    for number in range(images):
        pixels = rng.integers(0, 60, (80, 96, 3)).astype(np.uint8)
        for side in range(2):
            center = np.array([22 + 50 * side, 40]) + rng.integers(-2, 3, 2)
            radii = rng.integers(12, 20, 2)
            inside = ((columns - center[0]) / radii[0]) ** 2 + ((rows - center[1]) / radii[1]) ** 2 <= 1
            pixels[inside] = rng.integers(150, 256, 3)
            code = encode_mask(inside)
            x0, y0 = (int(center[k] - radii[k]) for k in range(2))
            coco["annotations"].append(
                {
                    "id": 10 * number + side,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [x0, y0, 2 * int(radii[0]) + 1, 2 * int(radii[1]) + 1],
                    "iscrowd": 0,
                    **({"segmentation": code.to_coco()} if masks else {}),
                }
            )
        Image.fromarray(pixels).save(image_dir / f"{number}.png")
        coco["images"].append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 80})
    if change is not None:
        change(coco)
    path = folder / "annotations.json"
    path.write_text(json.dumps(coco))
    return path, image_dir


def widen(path: Path) -> None:
    """Replaces a PNG by a gray one of 16 bits."""
    with Image.open(path) as image:
        values = np.asarray(image.convert("L")).astype(np.uint16) * 100
    Image.fromarray(values).save(path)
