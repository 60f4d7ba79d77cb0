"""From JPEG to COCO code, ten boxes a picture: our path against the plain one that the published code goes.

The plain path decodes the picture for every box, runs one crop at a time in float32, and makes each mask on the full
frame. Its network is ours, which is no slower than the published one. ViT-tiny, crop 512, CPU time on one thread, so
that ours gains nothing from its threads.
"""

import io
from collections.abc import Callable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from benchmarks.subjects import SIZES, Subject, random_labeler, subjects
from benchmarks.timing import Table, in_turn
from mal_train.core.masks import geometry, rle
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.images import decode_image
from mal_train.core.settings import Branch, Compat, network_size_class
from mal_train.kernel.labeler.labeler import Label, Labeler
from mal_train.kernel.networks.network import MalNetwork, normalize

ARCH, SIDE, BOXES = "vit-deit-tiny/16", 512, 10
LEAST = {"640x480": 1.6, "12 Mpix": 3.0}


def ours(labeler: Labeler, one: Subject) -> list[Label]:
    """As the server and `mal-train inference` do."""
    labels = labeler.label(decode_image(one.content), one.boxes, batch_size=BOXES)
    found = [label for label in labels if isinstance(label, Label)]
    if len(found) != BOXES:
        raise RuntimeError(f"{BOXES - len(found)} of {BOXES} boxes were refused")
    return found


def plain(network: MalNetwork, one: Subject, threshold: float) -> list[NDArray[np.bool_]]:
    """Masks (H, W), for each box anew."""
    return [plain_mask(network, one.content, box, threshold) for box in one.boxes]


def plain_mask(network: MalNetwork, content: bytes, box: Box, threshold: float) -> NDArray[np.bool_]:
    """One box; its code is made and thrown away, as nothing here reads it."""
    image = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    height, width = image.shape[:2]
    window = geometry.test_window(box, 0.6)
    crop = geometry.resize_crop(geometry.cut(image, window), SIDE)
    inside = np.zeros((height, width), np.uint8)
    region = geometry.box_pixels(box, (height, width))
    inside[region.row0 : region.row1, region.col0 : region.col1] = 1
    branch = torch.from_numpy(network_size_class([geometry.box_area(box)], Compat.NONE))
    with torch.inference_mode():
        logits = network.logits(normalize(torch.from_numpy(crop[None].copy())), branch, Branch.STUDENT)
        prob = torch.nn.functional.interpolate(logits, size=(SIDE, SIDE), mode="bilinear")[0, 0].sigmoid().numpy()
    pasted = cv2.resize(prob, (window.width, window.height), interpolation=cv2.INTER_LINEAR)
    whole = np.zeros((height, width), np.float32)
    x0, y0, x1, y1 = max(window.x0, 0), max(window.y0, 0), min(window.x1, width), min(window.y1, height)
    whole[y0:y1, x0:x1] = pasted[y0 - window.y0 : y1 - window.y0, x0 - window.x0 : x1 - window.x0]
    mask: NDArray[np.bool_] = (whole * inside) > threshold
    coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return mask


def pixels_apart(labels: list[Label], masks: list[NDArray[np.bool_]]) -> float:
    """Largest share of a mask's pixels in which the two paths differ."""
    pairs = [(rle.decode_mask(label.rle), mask) for label, mask in zip(labels, masks, strict=True)]
    return max(int(np.count_nonzero(a != b)) / max(int(np.count_nonzero(b)), 1) for a, b in pairs)


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    table = Table("whole_path", f"The whole path of {BOXES} boxes against the plain one, {ARCH}, crop {SIDE}, CPU time")
    fast, exact = random_labeler(ARCH, SIDE), random_labeler(ARCH, SIDE, "float32")
    dtype = str(fast.dtype).removeprefix("torch.")
    threshold = exact.config.mask_thres[0]
    for name, size_wh in SIZES.items():
        (one,) = subjects(1, BOXES, size_wh)
        masks: list[NDArray[np.bool_]] = []
        labels: list[Label] = []

        def run_plain(one: Subject = one, masks: list[NDArray[np.bool_]] = masks) -> None:
            masks[:] = plain(exact.network, one, threshold)

        def run_exact(one: Subject = one, labels: list[Label] = labels) -> None:
            labels[:] = ours(exact, one)

        def run_fast(one: Subject = one) -> None:
            ours(fast, one)

        forms: dict[str, Callable[[], object]] = {"plain": run_plain, "ours": run_fast, "float32": run_exact}
        seconds = in_turn(forms, rounds=1)
        apart = pixels_apart(labels, masks)
        table.add(f"{name}: plain, a box", 1000 * seconds["plain"] / BOXES, "ms")
        table.add(f"{name}: ours in {dtype}, a box", 1000 * seconds["ours"] / BOXES, "ms")
        table.add(f"{name}: ours in {dtype}, times faster", seconds["plain"] / seconds["ours"], "x", least=LEAST[name])
        table.add(f"{name}: ours in float32, times faster", seconds["plain"] / seconds["float32"], "x")
        table.add(f"{name}: pixels of a mask that differ in float32", apart, "", most=1e-3)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
