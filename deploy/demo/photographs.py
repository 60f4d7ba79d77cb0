"""Photographs that scikit-image carries in its wheel, with boxes drawn by hand, as a COCO file to label. No masks.

All may be copied freely: the cat (Stéfan van der Walt) and the coffee (Rachel Michetti) are CC0, the astronaut is
NASA's and the rocket SpaceX's, both public domain, and the coins are the Brooklyn Museum's, without known restrictions.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deploy.demo.synthetic import CocoSplit
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.errors import ConfigError
from mal_train.core.masks.geometry import Box

CATEGORIES = ("cat", "cup", "saucer", "spoon", "person", "helmet", "rocket", "coin")

BOXES: dict[str, tuple[tuple[str, Box], ...]] = {
    "chelsea": (("cat", (0, 0, 390, 300)),),
    "coffee": (
        ("cup", (172, 16, 238, 298)),
        ("saucer", (75, 70, 406, 320)),
        ("spoon", (318, 66, 108, 262)),
    ),
    "astronaut": (("person", (22, 12, 356, 500)), ("helmet", (278, 340, 234, 172)), ("rocket", (352, 0, 110, 284))),
    "rocket": (("rocket", (303, 122, 36, 290)),),
    "coins": (
        ("coin", (305, 16, 60, 56)),
        ("coin", (132, 29, 47, 45)),
        ("coin", (192, 30, 48, 43)),
        ("coin", (245, 96, 51, 48)),
        ("coin", (315, 156, 65, 62)),
        ("coin", (189, 170, 48, 47)),
        ("coin", (18, 233, 57, 55)),
        ("coin", (144, 236, 57, 52)),
    ),
}
"""By the name of the function in `skimage.data`."""


def write_photographs(folder: Path) -> CocoSplit:
    """Writes the images as PNG and `photographs.json`, a COCO file of their boxes.

    Raises:
        ConfigError: scikit-image is not installed.
    """
    try:
        from skimage import data  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError("the photographs come with scikit-image: pip install 'mask-auto-labeler[demo]'") from error
    images_dir = folder / "photographs"
    images_dir.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, boxes in BOXES.items():
        pixels = np.asarray(getattr(data, name)())
        height, width = pixels.shape[:2]
        Image.fromarray(pixels).convert("RGB").save(images_dir / f"{name}.png")
        images.append({"id": len(images) + 1, "file_name": f"{name}.png", "width": width, "height": height})
        annotations += [
            {
                "id": len(annotations) + number,
                "image_id": len(images),
                "category_id": CATEGORIES.index(category) + 1,
                "bbox": list(box),
                "iscrowd": 0,
            }
            for number, (category, box) in enumerate(boxes, start=1)
        ]
    path = folder / "photographs.json"
    categories = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, start=1)]
    write_json_atomic(path, {"images": images, "annotations": annotations, "categories": categories})
    return CocoSplit(path, images_dir)
