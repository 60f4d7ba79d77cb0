"""COCO's twelve figures, as pycocotools computes them."""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal

from mal_train.errors import BadDataset
from mal_train.labeling import rle
from mal_train.labeling.coco import id_order
from mal_train.labeling.miou import Figures
from mal_train.labeling.rle import Rle

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl")
"""COCO's twelve figures in pycocotools' order, under the names of the published code (§6.2)."""


def coco_ap(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], scores: Literal["one", "score"] = "score"
) -> Figures:
    """COCO's twelve mask figures by pycocotools, by the names of AP_NAMES; nothing is printed.

    Safe in several threads at once. Ids may be of any JSON type and are numbered anew in id order, which also keeps
    pycocotools from taking an annotation with id 0 for unmatched. Size classes follow the `area` of the ground truth
    as it stands, else its mask.

    Args:
        truth: a COCO object; images need width and height only where masks are polygons; iscrowd is honoured.
        results: COCO results: image_id, category_id, segmentation (run lengths or polygons) and score.
        scores: "one" sets every score to 1, so that the order of images and rows decides ties.

    Raises:
        BadDataset: a mask that is malformed, or a result for an image that the ground truth lacks.
    """
    images = {image["id"]: image for image in truth["images"]}
    image_numbers = {value: n for n, value in enumerate(sorted(images, key=id_order), start=1)}
    categories = sorted({row["category_id"] for row in truth["annotations"]}, key=id_order)
    category_numbers = {value: n for n, value in enumerate(categories, start=1)}

    def renumbered(row: Mapping[str, Any], number: int, what: str) -> dict[str, Any]:
        image_id = row["image_id"]
        if image_id not in images:
            raise BadDataset(f"{what} {number}: image_id {image_id!r} is not among the images of the ground truth")
        code = _code(row.get("segmentation"), images[image_id], f"{what} {number}")
        return {
            "id": number,
            "image_id": image_numbers[image_id],
            "category_id": category_numbers[row["category_id"]],
            "segmentation": code.to_coco(),
            "area": float(row["area"]) if what == "annotation" and "area" in row else float(rle.area(code)),
            "iscrowd": int(bool(row.get("iscrowd", 0))),
        }

    annotations = [renumbered(row, n, "annotation") for n, row in enumerate(truth["annotations"], start=1)]
    # A class without ground truth has no AP, so its detections cannot matter.
    wanted = [row for row in results if row["category_id"] in category_numbers]
    detections = [
        {**renumbered(row, n, "result"), "iscrowd": 0, "score": 1.0 if scores == "one" else float(row["score"])}
        for n, row in enumerate(wanted, start=1)
    ]
    if not annotations:
        return dict.fromkeys(AP_NAMES)
    frame = {
        # pycocotools reads the size although run lengths carry their own.
        "images": [{"id": n, "height": 0, "width": 0} for n in image_numbers.values()],
        "categories": [{"id": n} for n in category_numbers.values()],
    }
    evaluation = _silent("pycocotools.cocoeval").COCOeval(
        _indexed({**frame, "annotations": annotations}), _indexed({**frame, "annotations": detections}), "segm"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {
        name: None if value < 0 else value for name, value in zip(AP_NAMES, map(float, evaluation.stats), strict=True)
    }


def _indexed(dataset: dict[str, Any]) -> Any:
    coco = _silent("pycocotools.coco").COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _code(segmentation: Any, image: Mapping[str, Any], name: str) -> Rle:
    if isinstance(segmentation, dict):
        return Rle.from_coco(segmentation, name)
    if "height" not in image or "width" not in image:
        raise BadDataset(f"{name}: polygons need the width and height of image {image['id']!r}")
    return rle.from_segmentation(segmentation, image["height"], image["width"], name)


@cache
def _silent(name: str) -> ModuleType:
    """A private copy of a module whose `print` does nothing.

    Redirecting sys.stdout instead would swallow other threads' output, and two threads at once could lose it for good.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{name} is not installed; pip install pycocotools")
    module = importlib.util.module_from_spec(spec)
    module.print = lambda *_args, **_options: None  # type: ignore[attr-defined]
    spec.loader.exec_module(module)
    return module
