"""Runs sides of a comparison in processes of their own, in turn, on the same data."""

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.inputs import boxed_images
from benchmarks.load.run import ROOT, environment
from mal_train.core.coco.output import write_json_atomic

BOXES, TIMEOUT_S = 10, 600


@contextlib.contextmanager
def side(module: str, *options: str) -> Iterator[Callable[[], float]]:
    """Starts a side in a process of its own; yields a function that runs one pass and returns its seconds."""
    env = environment()
    del env["OMP_NUM_THREADS"]  # as in production
    command = [sys.executable, "-m", f"benchmarks.side_by_side.{module}", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def answer() -> str | float:
        line = answers.readline()
        if not line:
            raise RuntimeError(f"{module} ended with code {process.wait()}")
        value: str | float = json.loads(line)
        return value

    def run() -> float:
        print("run", file=requests, flush=True)
        return float(answer())

    try:
        answer()
        yield run
    finally:
        requests.close()
        process.wait(TIMEOUT_S)
        answers.close()


def write_data(folder: Path, images: int, size_wh: tuple[int, int]) -> None:
    """Writes images and a COCO file with ten boxes for each."""
    (folder / "images").mkdir()
    images_json, rows = list[object](), list[object]()
    for index, image in enumerate(boxed_images(images, BOXES, size_wh), start=1):
        (folder / "images" / f"{index}.jpg").write_bytes(image.content)
        width, height = image.size_wh
        images_json.append({"id": index, "file_name": f"{index}.jpg", "width": width, "height": height})
        for number, box in enumerate(image.boxes):
            row = {"id": BOXES * index + number, "image_id": index, "category_id": 1, "bbox": list(box), "iscrowd": 0}
            rows.append({**row, "area": box[2] * box[3]})
    categories = [{"id": 1, "name": "object"}]
    document = {"images": images_json, "annotations": rows, "categories": categories}
    write_json_atomic(folder / "annotations.json", document)


def medians(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Runs the sides in turn; returns the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            seconds[name].append(run())
    return {name: statistics.median(values) for name, values in seconds.items()}
