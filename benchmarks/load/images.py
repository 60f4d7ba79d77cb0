"""Images that load clients send: JPEGs of synthetic scenes with boxes, and the expected mask of each box.

The images are drawn once, saved to a folder and loaded by every client process. Imports no torch.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from mal.v1 import labeling_pb2, types_pb2
from PIL import Image

from deploy.demo.synthetic import SceneSettings, draw_scene
from mal_train.core.masks.geometry import Box

JPEG_QUALITY = 90

MaskFunction = Callable[[bytes, Sequence[Box]], Sequence[bytes]]
"""Function from an encoded image and its boxes to the COCO counts of the expected masks."""


@dataclass(frozen=True)
class LoadImage:
    """Encoded image with its size, its boxes, and the COCO counts of the expected masks, if they are known."""

    content: bytes
    width: int
    height: int
    boxes: tuple[Box, ...]
    counts: tuple[bytes, ...] | None

    def request(self, box_indices: Sequence[int], ids: Sequence[int], options: types_pb2.LabelOptions) -> bytes:
        """Returns a serialized LabelImageRequest for some of the boxes."""
        instances = []
        for index, instance_id in zip(box_indices, ids, strict=True):
            x, y, width, height = self.boxes[index]
            box = types_pb2.Box(x=x, y=y, width=width, height=height)
            instances.append(types_pb2.Instance(instance_id=instance_id, box=box))
        source = types_pb2.ImageSource(content=self.content, expected_width=self.width, expected_height=self.height)
        return labeling_pb2.LabelImageRequest(image=source, instances=instances, options=options).SerializeToString()

    def is_right(self, index: int, result: types_pb2.InstanceResult) -> bool:
        """Returns True for a correct result of box `index`: the exact mask if known, else a mask of the image size."""
        if result.status.code or len(result.masks) != 1:
            return False
        rle = result.masks[0].coco_rle
        if (rle.width, rle.height) != (self.width, self.height) or not 0.0 <= result.score <= 1.0:
            return False
        return self.counts is None or rle.counts == self.counts[index]


def draw_images(count: int, boxes: int, seed: int, size: tuple[int, int] = (640, 480)) -> list[LoadImage]:
    """Draws scenes of (width, height) px as JPEGs with `boxes` boxes each: boxes of objects, then random boxes."""
    width, height = size
    settings = SceneSettings(width=width, height=height, min_objects=3, max_objects=8)
    images = []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        scene = draw_scene(rng, settings)
        buffer = io.BytesIO()
        Image.fromarray(scene.image).save(buffer, "JPEG", quality=JPEG_QUALITY)
        scene_boxes: list[Box] = [each.box_xywh() for each in scene.objects][:boxes]
        while len(scene_boxes) < boxes:
            w, h = (float(v) for v in rng.uniform(24, (width / 2, height / 2)))
            scene_boxes.append((float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h)), w, h))
        images.append(LoadImage(buffer.getvalue(), width, height, tuple(scene_boxes), None))
    return images


def with_expected_masks(images: Sequence[LoadImage], masks_of: MaskFunction) -> list[LoadImage]:
    """Returns the images with their expected masks.

    Raises:
        ValueError: two boxes have equal masks, so that swapped results would not be detected.
    """
    images = [replace(image, counts=tuple(masks_of(image.content, image.boxes))) for image in images]
    masks = [counts for image in images for counts in image.counts or ()]
    if len(set(masks)) != len(masks):
        raise ValueError(f"{len(masks) - len(set(masks))} of {len(masks)} boxes share their mask with another")
    return images


def save_images(images: Sequence[LoadImage], folder: Path) -> None:
    """Saves the images for the client processes."""
    rows = []
    for index, image in enumerate(images):
        (folder / f"{index}.jpg").write_bytes(image.content)
        counts = None if image.counts is None else [value.decode("ascii") for value in image.counts]
        rows.append({"width": image.width, "height": image.height, "boxes": image.boxes, "counts": counts})
    (folder / "images.json").write_text(json.dumps(rows))


def load_images(folder: Path) -> list[LoadImage]:
    """Loads images saved by `save_images`."""
    images = []
    for index, row in enumerate(json.loads((folder / "images.json").read_text())):
        counts = None if row["counts"] is None else tuple(value.encode("ascii") for value in row["counts"])
        boxes = tuple((x, y, w, h) for x, y, w, h in row["boxes"])
        content = (folder / f"{index}.jpg").read_bytes()
        images.append(LoadImage(content, row["width"], row["height"], boxes, counts))
    return images
