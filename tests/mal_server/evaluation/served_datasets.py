"""A data set below a data folder of the server, and calls that evaluate it."""

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from mal.v1 import evaluation_pb2
from PIL import Image

from tests.mal_server.calls import collect, until_sent
from tests.mal_server.evaluation.test_run import NAMES, SCENES

Request = evaluation_pb2.EvaluateRequest


async def each(messages: Sequence[Request]) -> AsyncIterator[Request]:
    for message in messages:
        yield message


async def run_evaluation(running: Any, messages: Sequence[Request]) -> tuple[list[Any], Any]:
    """Returns (progress messages, result) of an evaluation."""
    responses = await until_sent(lambda: collect(running.evaluation.Evaluate(each(messages))))
    return [response.progress for response in responses[:-1]], responses[-1].result


def write_dataset(root: Path) -> Path:
    """Writes the scenes of `test_run` into a new folder, as `truth.json` and `images`; returns the folder."""
    (root / "images").mkdir(parents=True)
    rows = []
    for index, (image, objects) in enumerate(SCENES):
        Image.fromarray(image).save(root / "images" / f"{index}.png")
        for instance_id, box, category_id, mask in objects:
            row = {"id": instance_id, "image_id": index, "category_id": category_id, "bbox": box}
            rows.append({**row, "segmentation": mask.to_coco(), "iscrowd": 0})
    images = [{"id": n, "file_name": f"{n}.png", "width": 120, "height": 90} for n in range(len(SCENES))]
    categories = [{"id": key, "name": name} for key, name in NAMES.items()]
    (root / "truth.json").write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    return root


def on_server(annotations: str = "sets/truth.json", images: str = "sets/images", **options: Any) -> Request:
    dataset = evaluation_pb2.DatasetSource(annotations=annotations, images=images)
    return Request(options=evaluation_pb2.EvaluateOptions(dataset=dataset, worst_count=4, **options))


def data_folders(folder: Path) -> dict[str, Any]:
    return {"data_folders": [{"name": "sets", "path": str(folder)}]}
