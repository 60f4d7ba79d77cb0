"""Conversions of boxes of other formats, as the tests of each format run them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from mal_client.cli.main import main
from PIL import Image
from pycocotools.coco import COCO

WIDTH, HEIGHT = 80, 50


def make_images(folder: Path, *names: str) -> None:
    """Writes a black image of each name, WIDTH by HEIGHT, below `folder/images`; makes `folder/labels`."""
    (folder / "labels").mkdir(exist_ok=True)
    for name in names:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(path)


def convert(folder: Path, source_format: str, *more: str, labels: str = "labels") -> int:
    given = ["--labels", str(folder / labels), "--images", str(folder / "images"), "--output", str(folder / "out.json")]
    return main(["convert", "--from", source_format, *given, *more])


def boxes(folder: Path) -> dict[str, list[tuple[str, list[float]]]]:
    """Returns (category, box) pairs by image, as pycocotools reads the file."""
    coco = COCO(str(folder / "out.json"))
    by_image: dict[str, list[tuple[str, list[float]]]] = {image["file_name"]: [] for image in coco.imgs.values()}
    for row in coco.anns.values():
        name = coco.cats[row["category_id"]]["name"]
        by_image[coco.imgs[row["image_id"]]["file_name"]].append((name, row["bbox"]))
    return by_image


def errors(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.errors.jsonl").read_text().splitlines()]


def annotations(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())["annotations"]
    return rows


def reasons(folder: Path) -> list[tuple[str, str]]:
    return [(row["where"], row["reason"]) for row in errors(folder)]
