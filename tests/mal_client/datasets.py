"""Small COCO datasets on disk for the client's tests."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30


@dataclass
class Dataset:
    """A COCO file and its images; change `coco` and call `save`."""

    folder: Path
    coco: dict[str, Any]

    @property
    def json_path(self) -> Path:
        """Path of the annotations."""
        return self.folder / "in.json"

    @property
    def images_dir(self) -> Path:
        """Folder of the image files."""
        return self.folder / "images"

    @property
    def output(self) -> Path:
        """Path of the labeled file."""
        return self.folder / "out.json"

    def save(self) -> None:
        """Writes `coco` to the annotation file."""
        self.json_path.write_text(json.dumps(self.coco))

    def labeled(self) -> dict[Any, dict[str, Any]]:
        """Returns the rows of the output by id."""
        return {row["id"]: row for row in json.loads(self.output.read_text())["annotations"]}


def make_dataset(folder: Path, images: int = 3, boxes: int = 2) -> Dataset:
    """Creates `images` PNG files with `boxes` boxes each; annotation ids 100, 101, …, without masks."""
    rng = np.random.default_rng(7)
    (folder / "images").mkdir()
    coco: dict[str, Any] = {
        "info": {"note": "kept"},
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "cup"}],
    }
    for index in range(images):
        name = f"image_{index}.png"
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        coco["images"].append({"id": index + 1, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for box in range(boxes):
            annotation_id = 100 + len(coco["annotations"])
            coco["annotations"].append(
                {
                    "id": annotation_id,
                    "image_id": index + 1,
                    "category_id": 1,
                    "bbox": [1 + box, 2, 10, 8 + box],
                    "iscrowd": 0,
                    "mine": f"note {annotation_id}",
                }
            )
    dataset = Dataset(folder, coco)
    dataset.save()
    return dataset


def with_masks(dataset: Dataset) -> Dataset:
    """Gives every annotation a polygon that fills the left half of its box."""
    for row in dataset.coco["annotations"]:
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w / 2, y, x + w / 2, y + h, x, y + h]]
    dataset.save()
    return dataset
