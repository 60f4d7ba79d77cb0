"""Compares the twelve COCO metrics of 36 000 instances with pycocotools: values, and CPU time in one process.

Usage: python -m benchmarks.coco_ap [--json FILE]. Ellipses on images of 640 x 480 px; the numbers of images, classes
and instances are those of COCO val2017. Includes crowds, and shifted and missing detections.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.timing import Table, interleaved
from deploy.demo.baselines import ellipse
from mal_train.core.masks import rle
from mal_train.core.metrics.coco_ap import ap_input
from mal_train.core.metrics.miou import CocoMetrics
from mal_train.core.metrics.overlaps import IouType

IMAGES, CLASSES, INSTANCES = 5_000, 80, 36_000
HW = (480, 640)

Inputs = tuple[dict[str, Any], list[dict[str, Any]]]


def data_set(seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns (COCO object, COCO results)."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for number in range(1, INSTANCES + 1):
        # A few classes and images have most of the objects, as in photographs.
        ids = {
            "image_id": int(IMAGES * rng.random() ** 1.5) + 1,
            "category_id": int(CLASSES * rng.random() ** 3) + 1,
        }
        w, h = (float(side) for side in np.exp(rng.uniform(np.log(10), np.log(300), 2)))
        x, y = float(rng.uniform(0, HW[1] - w)), float(rng.uniform(0, HW[0] - h))
        mask = ellipse((x, y, w, h), HW)
        crowd = int(rng.random() < 0.01)
        geometry = {"segmentation": mask.to_coco(), "bbox": [x, y, w, h]}
        annotations.append({**ids, **geometry, "id": number, "iscrowd": crowd, "area": float(rle.area(mask))})
        if rng.random() < 0.95:
            dx, dy = (float(d) for d in rng.normal(0, 0.08, 2) * (w, h))
            box = (min(max(x + dx, 0.0), HW[1] - w), min(max(y + dy, 0.0), HW[0] - h), w, h)
            shifted = {"segmentation": ellipse(box, HW).to_coco(), "bbox": list(box)}
            results.append({**ids, **shifted, "score": float(np.round(rng.random(), 3))})
    images = [{"id": n, "height": HW[0], "width": HW[1]} for n in range(1, IMAGES + 1)]
    categories = [{"id": n} for n in range(1, CLASSES + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def by_pycocotools(truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def _variants(
    iou_type: IouType, read: Inputs, raw: Inputs, text: str, metrics: dict[str, CocoMetrics | list[float]]
) -> dict[str, Callable[[], None]]:
    """Returns the measured variants; each stores its metrics in `metrics`."""

    def ours() -> None:
        metrics["ours"] = ap_input(read[0], read[1], iou_type).metrics()

    def checked() -> None:
        metrics["checked"] = ap_input(raw[0], raw[1], iou_type).metrics()

    def pycocotools() -> None:
        truth, results = json.loads(text)
        metrics["pycocotools"] = by_pycocotools(truth, results, iou_type)

    return {"ours": ours, "checked": checked, "pycocotools": pycocotools}


def _numbers(metrics: CocoMetrics | list[float]) -> list[float]:
    values = metrics.values() if isinstance(metrics, dict) else metrics
    return [-1.0 if value is None else value for value in values]


def _with_mask(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "segmentation": rle.Rle.from_coco(row["segmentation"])}


def main() -> int:
    """Prints the table."""
    table = Table("coco_ap", f"COCO AP of {INSTANCES} instances, CPU seconds, ours against pycocotools")
    truth, all_results = data_set()
    iou_types: tuple[IouType, ...] = ("segm", "bbox")
    for iou_type in iou_types:
        if iou_type == "segm":
            # If a row has a box and a mask, pycocotools uses the area of the box.
            results = [{key: value for key, value in row.items() if key != "bbox"} for row in all_results]
        else:
            results = all_results
        copy = json.dumps([truth, results])
        # Evaluation passes masks that were parsed and checked before.
        read_truth = {**truth, "annotations": [_with_mask(row) for row in truth["annotations"]]}
        read_results = [_with_mask(row) for row in results]
        metrics: dict[str, CocoMetrics | list[float]] = {}
        seconds = interleaved(
            _variants(iou_type, (read_truth, read_results), (truth, results), copy, metrics), rounds=1
        )
        began = time.process_time()
        json.loads(copy)
        reading = time.process_time() - began
        ours, theirs = _numbers(metrics["ours"]), _numbers(metrics["pycocotools"])
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        table.add(f"{iou_type}: pycocotools", seconds["pycocotools"] - reading, "s")
        table.add(f"{iou_type}: ours", seconds["ours"], "s")
        table.add(f"{iou_type}: times faster", (seconds["pycocotools"] - reading) / seconds["ours"], "x", least=1 / 1.1)
        table.add(
            f"{iou_type}: times faster, masks also checked",
            (seconds["pycocotools"] - reading) / seconds["checked"],
            "x",
        )
        table.add(f"{iou_type}: largest difference of a metric", difference, "", most=1e-12)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
