"""COCO's twelve figures of 36 000 instances: our matching against pycocotools, CPU time in one process.

Usage: python -m benchmarks.coco_ap [--json FILE]. Ellipses on pictures of 640 x 480 px: as many images, classes and
instances as COCO's val2017 has, with crowds, and detections that are shifted, missing, and of falling score.
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

from benchmarks.timing import Table, in_turn
from deploy.demo.baselines import ellipse
from mal_train.core.masks import rle
from mal_train.core.metrics.coco_ap import IouType, ap_input
from mal_train.core.metrics.miou import CocoMetrics

IMAGES, CLASSES, INSTANCES = 5_000, 80, 36_000
HW = (480, 640)

Inputs = tuple[dict[str, Any], list[dict[str, Any]]]


def data_set(seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(COCO object, COCO results)."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for number in range(1, INSTANCES + 1):
        # A few classes and images hold most of the objects, as on photographs.
        where = {
            "image_id": int(IMAGES * rng.random() ** 1.5) + 1,
            "category_id": int(CLASSES * rng.random() ** 3) + 1,
        }
        w, h = (float(side) for side in np.exp(rng.uniform(np.log(10), np.log(300), 2)))
        x, y = float(rng.uniform(0, HW[1] - w)), float(rng.uniform(0, HW[0] - h))
        mask = ellipse((x, y, w, h), HW)
        crowd = int(rng.random() < 0.01)
        form = {"segmentation": mask.to_coco(), "bbox": [x, y, w, h]}
        annotations.append({**where, **form, "id": number, "iscrowd": crowd, "area": float(rle.area(mask))})
        if rng.random() < 0.95:
            dx, dy = (float(d) for d in rng.normal(0, 0.08, 2) * (w, h))
            box = (min(max(x + dx, 0.0), HW[1] - w), min(max(y + dy, 0.0), HW[0] - h), w, h)
            found = {"segmentation": ellipse(box, HW).to_coco(), "bbox": list(box)}
            results.append({**where, **found, "score": float(np.round(rng.random(), 3))})
    images = [{"id": n, "height": HW[0], "width": HW[1]} for n in range(1, IMAGES + 1)]
    categories = [{"id": n} for n in range(1, CLASSES + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def by_pycocotools(truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def _forms(
    kind: IouType, read: Inputs, raw: Inputs, text: str, found: dict[str, CocoMetrics | list[float]]
) -> dict[str, Callable[[], None]]:
    """What is measured; each leaves its figures in `found`."""

    def ours() -> None:
        found["ours"] = ap_input(read[0], read[1], kind).metrics()

    def checked() -> None:
        found["checked"] = ap_input(raw[0], raw[1], kind).metrics()

    def theirs() -> None:
        truth, results = json.loads(text)
        found["pycocotools"] = by_pycocotools(truth, results, kind)

    return {"ours": ours, "checked": checked, "pycocotools": theirs}


def _numbers(figures: CocoMetrics | list[float]) -> list[float]:
    values = figures.values() if isinstance(figures, dict) else figures
    return [-1.0 if value is None else value for value in values]


def _with_mask(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "segmentation": rle.Rle.from_coco(row["segmentation"])}


def main() -> int:
    """Prints the table."""
    table = Table("coco_ap", f"COCO AP of {INSTANCES} instances, CPU seconds, ours against pycocotools")
    truth, both = data_set()
    kinds: tuple[IouType, ...] = ("segm", "bbox")
    for kind in kinds:
        if kind == "segm":
            # With a box beside the mask, pycocotools would take the box's area for the mask's.
            results = [{key: value for key, value in row.items() if key != "bbox"} for row in both]
        else:
            results = both
        copy = json.dumps([truth, results])
        # As evaluation hands them over: masks that were read, and checked, before.
        read_truth = {**truth, "annotations": [_with_mask(row) for row in truth["annotations"]]}
        read_results = [_with_mask(row) for row in results]
        found: dict[str, CocoMetrics | list[float]] = {}
        seconds = in_turn(_forms(kind, (read_truth, read_results), (truth, results), copy, found), rounds=1)
        began = time.process_time()
        json.loads(copy)
        reading = time.process_time() - began
        ours, theirs = _numbers(found["ours"]), _numbers(found["pycocotools"])
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        table.add(f"{kind}: pycocotools", seconds["pycocotools"] - reading, "s")
        table.add(f"{kind}: ours", seconds["ours"], "s")
        table.add(f"{kind}: times faster", (seconds["pycocotools"] - reading) / seconds["ours"], "x", least=1 / 1.1)
        table.add(
            f"{kind}: times faster, masks also checked", (seconds["pycocotools"] - reading) / seconds["checked"], "x"
        )
        table.add(f"{kind}: largest difference of a figure", apart, "", most=1e-12)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
