"""Compares the complete path from JPEG to RLE with the path of the published code, at ten boxes per image.

The published path decodes the image for every box, runs one crop at a time in float32, and builds each mask on the full
frame. It uses the network of this project, which is not slower than the published one. ViT-tiny, crop 512, CPU time on
one thread, so that multithreading gives no advantage.
"""

import io
from collections.abc import Callable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from benchmarks.inputs import SIZES, BoxedImage, boxed_images, random_labeler
from benchmarks.timing import Table, interleaved
from mal_train.core.images.decoder import decode_image
from mal_train.core.masks import geometry, rle
from mal_train.core.masks.geometry import Box
from mal_train.core.settings import Branch, Compat
from mal_train.core.size_class import network_size_class
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Label
from mal_train.kernel.networks.network import MalNetwork, normalize

ARCH, SIDE, BOXES = "vit-deit-tiny/16", 512, 10
LEAST = {"640x480": 1.6, "12 Mpix": 3.0}


def batched(labeler: Labeler, image: BoxedImage) -> list[Label]:
    """Labels as the server and `mal-train inference` do."""
    labels = labeler.label(decode_image(image.content), image.boxes, batch_size=BOXES)
    valid = [label for label in labels if isinstance(label, Label)]
    if len(valid) != BOXES:
        raise RuntimeError(f"{BOXES - len(valid)} of {BOXES} boxes were rejected")
    return valid


def published(network: MalNetwork, image: BoxedImage, threshold: float) -> list[NDArray[np.bool_]]:
    """Returns masks (H, W); decodes the image for each box."""
    return [published_mask(network, image.content, box, threshold) for box in image.boxes]


def published_mask(network: MalNetwork, content: bytes, box: Box, threshold: float) -> NDArray[np.bool_]:
    """Labels one box. The RLE is computed and discarded."""
    pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    height, width = pixels.shape[:2]
    window = geometry.inference_window(box, 0.6)
    crop = geometry.resize_crop(geometry.cut(pixels, window), SIDE)
    inside = np.zeros((height, width), np.uint8)
    region = geometry.box_pixels(box, (height, width))
    inside[region.row0 : region.row1, region.col0 : region.col1] = 1
    size_class = torch.from_numpy(network_size_class([geometry.box_area(box)], Compat.NONE))
    with torch.inference_mode():
        logits = network.logits(normalize(torch.from_numpy(crop[None].copy())), size_class, Branch.STUDENT)
        prob = torch.nn.functional.interpolate(logits, size=(SIDE, SIDE), mode="bilinear")[0, 0].sigmoid().numpy()
    pasted = cv2.resize(prob, (window.width, window.height), interpolation=cv2.INTER_LINEAR)
    full_prob = np.zeros((height, width), np.float32)
    x0, y0, x1, y1 = max(window.x0, 0), max(window.y0, 0), min(window.x1, width), min(window.y1, height)
    full_prob[y0:y1, x0:x1] = pasted[y0 - window.y0 : y1 - window.y0, x0 - window.x0 : x1 - window.x0]
    mask: NDArray[np.bool_] = (full_prob * inside) > threshold
    coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return mask


def max_difference(labels: list[Label], masks: list[NDArray[np.bool_]]) -> float:
    """Returns the largest fraction of the pixels of a mask in which both paths differ."""
    pairs = [(rle.decode_mask(label.rle), mask) for label, mask in zip(labels, masks, strict=True)]
    return max(int(np.count_nonzero(a != b)) / max(int(np.count_nonzero(b)), 1) for a, b in pairs)


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    table = Table(
        "end_to_end", f"JPEG to RLE, {BOXES} boxes, against the published path; {ARCH}, crop {SIDE}, CPU time"
    )
    fast, exact = random_labeler(ARCH, SIDE), random_labeler(ARCH, SIDE, "float32")
    dtype = str(fast.dtype).removeprefix("torch.")
    threshold = exact.config.mask_thres[0]
    for name, size_wh in SIZES.items():
        (image,) = boxed_images(1, BOXES, size_wh)
        masks: list[NDArray[np.bool_]] = []
        labels: list[Label] = []

        def run_published(image: BoxedImage = image, masks: list[NDArray[np.bool_]] = masks) -> None:
            masks[:] = published(exact.network, image, threshold)

        def run_exact(image: BoxedImage = image, labels: list[Label] = labels) -> None:
            labels[:] = batched(exact, image)

        def run_fast(image: BoxedImage = image) -> None:
            batched(fast, image)

        variants: dict[str, Callable[[], object]] = {"published": run_published, "ours": run_fast, "float32": run_exact}
        seconds = interleaved(variants, rounds=1)
        difference = max_difference(labels, masks)
        table.add(f"{name}: published, per box", 1000 * seconds["published"] / BOXES, "ms")
        table.add(f"{name}: ours in {dtype}, per box", 1000 * seconds["ours"] / BOXES, "ms")
        table.add(
            f"{name}: ours in {dtype}, times faster", seconds["published"] / seconds["ours"], "x", least=LEAST[name]
        )
        table.add(f"{name}: ours in float32, times faster", seconds["published"] / seconds["float32"], "x")
        table.add(f"{name}: pixels of a mask that differ in float32", difference, "", most=1e-3)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
