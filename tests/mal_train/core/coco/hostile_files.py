"""Random annotation files with hostile rows: masks, boxes, ids and numbers that no exporter writes, or broken text."""

import gzip
import json
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mal_train.core.masks import rle
from tests.mal_train.core.masks.hostile_runs import compressed, wrapping_runs

HEIGHT, WIDTH = 40, 60

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e300, 1.7e308, -1.7e308, 10**15, 10**40, 10**400, -(10**400), 2**31, 2**32, 2**63,
    2**64, -(2**63), float("nan"), float("inf"), -float("inf"), 4e8, 1e6, 999_999.5, True, False, None,
)  # fmt: skip
STRINGS = (
    "",
    "1",
    "a",
    "\0",
    "\ud800",
    "\udfff\ud800",
    "é" * 30,
    "../" * 9,
    "/etc/passwd",
    "x" * 5000,
    "\x1b[2J",
    "1e5",
)


def deep(levels: int, bracket: str = "[]") -> Any:
    """Returns lists or objects in each other."""
    value: Any = 1
    for _ in range(levels):
        value = [value] if bracket == "[]" else {"k": value}
    return value


def junk(chance: random.Random) -> Any:
    """Returns a JSON value of any type."""
    match chance.randrange(7):
        case 0 | 1 | 2:
            return chance.choice(NUMBERS)
        case 3:
            return chance.choice(STRINGS)
        case 4:
            return [chance.choice(NUMBERS) for _ in range(chance.choice((0, 1, 2, 4, 5, 300)))]
        case 5:
            return {chance.choice(STRINGS): chance.choice(NUMBERS), "size": chance.choice(NUMBERS)}
        case _:
            return deep(chance.choice((1, 3, 40)), chance.choice(("[]", "{}")))


def hostile_runs(chance: random.Random, pixels: int) -> list[Any]:
    """Returns runs, most of which do not fill the frame."""
    first, excess = chance.randrange(pixels), chance.choice((0, 0, 2**32, 2**64, -1, 1))
    choices: list[list[Any]] = [
        wrapping_runs(np.random.default_rng(chance.randrange(2**32)), pixels),
        [pixels] + [0] * chance.choice((1, 2, 5000)),
        [0] * chance.choice((1, 2, 7)) + [pixels],
        [1] * pixels,
        [chance.choice(NUMBERS) for _ in range(chance.randrange(6))],
        [first, pixels - first + excess],
        [2**32 - 1, 2**32 - 1, pixels + 2],
    ]
    return chance.choice(choices)


def hostile_counts(chance: random.Random, pixels: int) -> Any:
    """Returns counts of run lengths: list, string, or neither."""
    runs = hostile_runs(chance, pixels)
    match chance.randrange(5):
        case 0:
            return runs
        case 1 | 2 if all(type(run) is int for run in runs):
            return compressed(runs).decode("latin-1")
        case 3:
            return "".join(chr(chance.choice((chance.randrange(48, 112), chance.randrange(1, 300)))) for _ in range(30))
        case _:
            return chance.choice(("o" * 9, "o" * 50_000, "0" * 50_000, "", junk(chance)))


def hostile_polygon(chance: random.Random) -> Any:
    """Returns a polygon: far away, of a point, crossing itself, of odd length or of junk."""
    size = chance.choice((3, 3, 4, 30, 200))
    match chance.randrange(6):
        case 0:
            return [chance.choice((1, -1)) * chance.uniform(9e5, 1.1e6) for _ in range(2 * size)]
        case 1:
            return [5.0] * (2 * size)
        case 2:
            return [chance.uniform(-100, 200) for _ in range(2 * size + chance.randrange(2))]
        case 3:
            return [chance.choice(NUMBERS) for _ in range(2 * size)]
        case 4:
            return [chance.choice((0.0, 999_999.0)) for _ in range(2 * size)]
        case _:
            return junk(chance)


def segmentation(chance: random.Random) -> Any:
    """Returns a value of `segmentation`; about one in four is readable."""
    match chance.randrange(8):
        case 0 | 1:
            return {"size": [HEIGHT, WIDTH], "counts": hostile_counts(chance, HEIGHT * WIDTH)}
        case 2:
            sides = [chance.choice((0, 1, HEIGHT, 20_000, 2**31, *NUMBERS)) for _ in range(chance.choice((2, 2, 1)))]
            return {"size": sides, "counts": hostile_counts(chance, 100)}
        case 3 | 4:
            return [hostile_polygon(chance) for _ in range(chance.choice((1, 1, 2, 20)))]
        case 5:
            return junk(chance)
        case _:
            mask = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
            mask[chance.randrange(30) :, chance.randrange(40) :] = True
            return rle.encode_mask(mask).to_coco()


def document(chance: random.Random) -> dict[str, Any]:
    """Returns a COCO object in which some fields of some rows are hostile."""
    images: list[Any] = [
        {"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(chance.randrange(1, 4))
    ]
    categories: list[Any] = [{"id": n, "name": f"c{n}"} for n in range(chance.randrange(1, 4))]
    annotations: list[Any] = [
        {
            "id": n,
            "image_id": chance.randrange(3),
            "category_id": chance.randrange(3),
            "bbox": [chance.uniform(0, 30), chance.uniform(0, 20), chance.uniform(1, 30), chance.uniform(1, 20)],
            "segmentation": segmentation(chance),
            "iscrowd": int(chance.random() < 0.3),
            "score": chance.random(),
            "area": 12.0,
        }
        for n in range(chance.randrange(6))
    ]
    if chance.random() < 0.3:
        federate(chance, images, categories)
    for row in annotations:
        if chance.random() < 0.1:
            row["attributes"] = {"rotation": chance.choice((0, 30.0, -90, junk(chance)))}
        if chance.random() < 0.1:
            row["points"] = [[chance.choice(NUMBERS), chance.uniform(0, 60), chance.choice((0, 1, 1, junk(chance)))]]
    for rows in (images, categories, annotations):
        for index, row in enumerate(rows):
            if chance.random() < 0.3:
                key = chance.choice([*row, "extra", "bbox"])
                row[key] = [junk(chance) for _ in range(4)] if key == "bbox" else junk(chance)
            if chance.random() < 0.02:
                rows[index] = junk(chance)
    raw: dict[str, Any] = {"images": images, "annotations": annotations, "categories": categories}
    if chance.random() < 0.1:
        raw[chance.choice([*raw, "info"])] = junk(chance)
    if chance.random() < 0.03:
        raw[chance.choice([*raw, "info"])] = deep_text(
            chance.choice((90, 500, 900, 980, 990, 5000)), chance.choice(("[]", "{}"))
        )
    keys = list(raw)
    chance.shuffle(keys)
    return {key: raw[key] for key in keys}


def federate(chance: random.Random, images: list[Any], categories: list[Any]) -> None:
    """Makes rows those of LVIS, with hostile lists of categories and addresses."""
    urls = ("http://host/val2017/1.png", "http://[", "file:///etc/passwd", "http://host/%00.png", "http://host/..")
    for row in images:
        if chance.random() < 0.7:
            row["coco_url"] = chance.choice((*urls, junk(chance)))
            del row["file_name"]
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            row[key] = [chance.randrange(3)] if chance.random() < 0.6 else junk(chance)
    for row in categories:
        row["frequency"] = chance.choice(("r", "c", "f", junk(chance)))


def text_of(value: Any) -> str:
    """Returns a value as JSON, with the nested values that `deep_text` stands for."""
    return _DEEP.sub(lambda found: _nested(int(found[1]), found[2]), json.dumps(value))


def deep_text(levels: int, bracket: str) -> str:
    """Returns a string that `text_of` replaces by lists or objects in each other, deeper than `json.dumps` writes."""
    return f"nested {levels} {bracket}"


def _nested(levels: int, bracket: str) -> str:
    opening = "[" if bracket == "[]" else '{"k": '
    return opening * levels + "1" + bracket[1] * levels


_DEEP = re.compile(r'"nested (\d+) (\[\]|\{\})"')


def hostile_file(chance: random.Random) -> bytes:
    """Returns the bytes of an annotation file, one in ten of them with broken text."""
    text = text_of(document(chance))
    encoding = chance.choice(("utf-8",) * 8 + ("utf-16", "utf-32"))
    content = text.encode(encoding, "surrogatepass")
    if chance.random() < 0.1:
        at = chance.randrange(len(content))
        match chance.randrange(5):
            case 0:
                content = content[:at]
            case 1:
                content = content[:at] + chance.randbytes(chance.randint(1, 8)) + content[at:]
            case 2:
                content += content[:at]
            case 3:
                content = content.replace(b'"annotations"', b'"images"', 1)
            case _:
                content = content[:at] + b"9" * chance.choice((50, 5000)) + content[at:]
    if chance.random() < 0.1:
        content = gzip.compress(content, 1)
        content = content[: chance.choice((len(content), len(content), len(content) - 5, 3))]
    return content


def detections(chance: random.Random) -> bytes:
    """Returns the bytes of a results list."""
    rows: Sequence[Any] = document(chance)["annotations"]
    return text_of(rows).encode("utf-8", "surrogatepass")
