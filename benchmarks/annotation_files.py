"""Measures what a shard pays to read its part of an annotation file: a scan of the JSON file, or its row groups.

Each step runs in its own process: seconds, CPU seconds, and peak memory beyond imports. Ten boxes an image, without
masks, as before labeling. The last rows extrapolate the largest size to 10^9 boxes in proportion to the boxes, and the
footer in proportion to the row groups of 65 536 boxes. A share of 1000 has 10^6 boxes; its memory is most precise when
that is the largest size that is run.

    python -m benchmarks.annotation_files [--boxes N ...] [--folder DIR] [--json FILE]

`--boxes 10000000` takes some 12 minutes and 4 GB in the folder; with `--folder` files that exist are used again, so
that the sizes can be run one after the other. The default sizes go up to 10^6.
"""

import argparse
import filecmp
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.timing import Table, peak_mib
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_schema import load_pyarrow
from mal_train.core.coco.parquet_share import ParquetShare
from mal_train.core.coco.parquet_writer import ROW_GROUP_BOXES
from mal_train.core.coco.stream import copy_coco, scan_coco

SIZES: Final = (10_000, 100_000, 1_000_000)
BOXES_PER_IMAGE: Final = 10
CATEGORIES: Final = 80
SHARDS: Final = 16
LARGE: Final = 1_000_000_000
LARGE_SHARDS: Final = 1000
MAX_SHARE_OF_SCAN: Final = 0.5
"""Bound: a share of 16 takes less CPU time than half a scan of the whole file."""


class Cost(NamedTuple):
    """Cost of one step: wall and CPU seconds, and peak memory beyond imports in MiB."""

    seconds: float
    cpu_s: float
    mib: float


def generate(path: Path, boxes: int) -> None:
    """Writes a COCO file; the annotations of an image follow each other, but images come in any order."""
    chance = random.Random(boxes)
    images = boxes // BOXES_PER_IMAGE
    with path.open("w", encoding="ascii") as file:
        file.write('{"images": [')
        for n in range(images):
            row = {"id": n, "file_name": f"{n % 1000:03d}/{n:012d}.jpg", "width": 640, "height": 480}
            file.write((", " if n else "") + json.dumps(row))
        file.write('], "annotations": [')
        order = list(range(images))
        chance.shuffle(order)
        for at, image in enumerate(order):
            rows = [_annotation(chance, at * BOXES_PER_IMAGE + n, image) for n in range(BOXES_PER_IMAGE)]
            file.write((", " if at else "") + json.dumps(rows)[1:-1])
        categories = [{"id": n, "name": f"category {n}"} for n in range(1, CATEGORIES + 1)]
        file.write(f'], "categories": {json.dumps(categories)}}}\n')


def _annotation(chance: random.Random, number: int, image: int) -> dict[str, object]:
    w, h = round(chance.uniform(4, 200), 2), round(chance.uniform(4, 200), 2)
    return {
        "id": number,
        "image_id": image,
        "category_id": chance.randint(1, CATEGORIES),
        "bbox": [round(chance.uniform(0, 640 - w), 2), round(chance.uniform(0, 480 - h), 2), w, h],
        "area": round(w * h, 2),
        "iscrowd": 0,
    }


def footer_bytes(path: Path) -> int:
    """Returns the length of the footer of a parquet file, which is stated before the magic number at its end."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def row_group_boxes(boxes: int) -> int:
    """Returns the default size of a row group, or a smaller one that gives each shard four."""
    return max(1, min(ROW_GROUP_BOXES, boxes // (4 * SHARDS)))


def steps(folder: Path, boxes: int) -> dict[str, Callable[[], object]]:
    """Returns the measured steps by name."""
    source, packed, back = files(folder, boxes)
    return {
        "pack": lambda: copy_coco(source, packed, row_group_boxes=row_group_boxes(boxes)),
        "scan": lambda: scan_coco(source, lambda _index, _row: None),
        "open": lambda: ParquetDataset(packed),
        "rows": lambda: ParquetShare(packed).scan(lambda _index, _row: None),
        "share": lambda: ParquetShare(packed, 1, SHARDS).scan(lambda _index, _row: None),
        "unpack": lambda: copy_coco(packed, back),
    }


def files(folder: Path, boxes: int) -> tuple[Path, Path, Path]:
    """Returns the JSON file, the parquet file, and the JSON file that is made from it."""
    return folder / f"{boxes}.json", folder / f"{boxes}.parquet", folder / f"{boxes}.back.json"


def run_step(name: str, folder: Path, boxes: int) -> Cost:
    """Runs a step in a new process."""
    command = [sys.executable, "-m", "benchmarks.annotation_files", "--step", name, "--folder", str(folder)]
    finished = subprocess.run([*command, "--boxes", str(boxes)], check=True, stdout=subprocess.PIPE, text=True)
    return Cost(*map(float, finished.stdout.split()))


def measured(work: Callable[[], object]) -> Cost:
    """Runs a step in this process."""
    load_pyarrow()  # an import, which is no memory of the step
    base, began, began_cpu = peak_mib(), time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - began, time.process_time() - began_cpu, peak_mib() - base)


def add_size(table: Table, folder: Path, boxes: int) -> dict[str, Cost]:
    """Adds the rows of one size; returns the cost of each step."""
    source, packed, back = files(folder, boxes)
    if not source.exists():
        generate(source, boxes)
    costs = {name: run_step(name, folder, boxes) for name in steps(folder, boxes)}
    if not filecmp.cmp(back, source, shallow=False):
        raise ValueError(f"{back}: differs from {source}")
    name = f"10^{len(str(boxes)) - 1} boxes" if str(boxes).strip("0") == "1" else f"{boxes} boxes"
    table.add(f"{name}: JSON file", source.stat().st_size / 1e6, "MB")
    table.add(f"{name}: parquet file", packed.stat().st_size / 1e6, "MB")
    for step, title in {
        "pack": "JSON to parquet",
        "unpack": "parquet to JSON",
        "scan": "scan of JSON, by every shard",
        "rows": "all row groups",
        "share": f"share of {SHARDS}",
        "open": "of which footer",
    }.items():
        bound = MAX_SHARE_OF_SCAN * costs["scan"].cpu_s if step == "share" and boxes >= 100_000 else None
        table.add(f"{name}: {title}", costs[step].cpu_s, "CPU s", most=bound)
        table.add(f"{name}: {title}", costs[step].mib, "MiB")
    back.unlink()
    return costs


def add_large(table: Table, folder: Path, boxes: int, costs: dict[str, Cost]) -> None:
    """Adds the extrapolation of a size to `LARGE` boxes."""
    source, packed, _ = files(folder, boxes)
    factor = LARGE / boxes
    of_share = factor / LARGE_SHARDS
    of_footer = (LARGE / ROW_GROUP_BOXES) / len(ParquetDataset(packed).row_groups)
    footer_s = costs["open"].cpu_s * of_footer
    rows_s = (costs["rows"].cpu_s - costs["open"].cpu_s) * of_share
    table.add("10^9 boxes, extrapolated: JSON file", source.stat().st_size * factor / 1e9, "GB")
    table.add("10^9 boxes, extrapolated: parquet file", packed.stat().st_size * factor / 1e9, "GB")
    table.add("10^9 boxes, extrapolated: scan of JSON, each shard", costs["scan"].cpu_s * factor / 3600, "CPU h")
    table.add("10^9 boxes, extrapolated: scan of JSON, each shard", costs["scan"].mib * factor / 1024, "GiB")
    table.add(f"10^9 boxes, extrapolated: share of {LARGE_SHARDS}", footer_s + rows_s, "CPU s")
    table.add(f"10^9 boxes, extrapolated: share of {LARGE_SHARDS}", costs["rows"].mib * of_share, "MiB")
    table.add("10^9 boxes, extrapolated: of which footer", footer_s, "CPU s")
    table.add("10^9 boxes, extrapolated: of which footer", footer_bytes(packed) * of_footer / 1e6, "MB")
    table.add("10^9 boxes, extrapolated: JSON to parquet", costs["pack"].cpu_s * factor / 3600, "CPU h")


def main() -> int:
    """Prints the table, or runs one step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--boxes", type=int, nargs="+", default=list(SIZES), metavar="N", help="sizes of the files")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the files here (default: a temporary folder)")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    table = None if "--step" in sys.argv else Table("annotation_files", "Annotation files: JSON and parquet", parser)
    arguments = parser.parse_args() if table is None else table.arguments
    if table is None:
        print(*measured(steps(arguments.folder, arguments.boxes[0])[arguments.step]))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        costs = {boxes: add_size(table, folder, boxes) for boxes in sorted(arguments.boxes)}
        largest = max(costs)
        add_large(table, folder, largest, costs[largest])
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
