"""A data set below a folder of the server, for tests of evaluations that name it, and what such an evaluation says."""

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from mal.v1 import evaluation_pb2
from PIL import Image

from tests.mal_server.evaluation.test_run import NAMES, SCENES

Request = evaluation_pb2.EvaluateRequest


async def each(messages: Sequence[Request]) -> AsyncIterator[Request]:
    for message in messages:
        yield message


async def run(running: Any, messages: Sequence[Request]) -> tuple[list[Any], Any]:
    """(progress messages, result)"""
    answers = [answer async for answer in running.evaluation.Evaluate(each(messages))]
    return [answer.progress for answer in answers[:-1]], answers[-1].result


def written(root: Path) -> Path:
    """The scenes of test_evaluate as a COCO file `truth.json` and `images` in a new folder, which is returned."""
    (root / "images").mkdir(parents=True)
    rows = []
    for place, (image, objects) in enumerate(SCENES):
        Image.fromarray(image).save(root / "images" / f"{place}.png")
        for instance_id, box, category_id, mask in objects:
            row = {"id": instance_id, "image_id": place, "category_id": category_id, "bbox": box}
            rows.append({**row, "segmentation": mask.to_coco(), "iscrowd": 0})
    images = [{"id": n, "file_name": f"{n}.png", "width": 120, "height": 90} for n in range(len(SCENES))]
    categories = [{"id": key, "name": name} for key, name in NAMES.items()]
    (root / "truth.json").write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    return root


def on_server(annotations: str = "sets/truth.json", images: str = "sets/images", **options: Any) -> Request:
    dataset = evaluation_pb2.DatasetSource(annotations=annotations, images=images)
    return Request(options=evaluation_pb2.EvaluateOptions(dataset=dataset, worst_count=4, **options))


def data(folder: Path) -> dict[str, Any]:
    return {"data_folders": [{"name": "sets", "path": str(folder)}]}
