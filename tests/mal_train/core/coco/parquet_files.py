"""Parquet files for tests."""

import json
import random
from pathlib import Path
from typing import Any

from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.stream import copy_coco
from tests.mal_train.core.coco.coco_rows import dataset, row


def packed(folder: Path, raw: Any, **options: Any) -> Path:
    """Writes a COCO file in both forms; returns the path of the parquet file."""
    source, output = folder / "in.json", folder / "in.parquet"
    source.write_text(json.dumps(raw))
    copy_coco(source, output, **options)
    return output


def unpacked(path: Path) -> Any:
    """Converts a parquet file to JSON, and returns the text of its value, in which 1, 1.0 and true differ."""
    output = path.with_name("back.json")
    copy_coco(path, output)
    return json.dumps(json.loads(output.read_text()))


def split_file(folder: Path) -> ParquetDataset:
    """Writes twenty images with ten boxes each, one image a row group."""
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(20)]
    rows = [row(n, image_id=n // 10, note=random.Random(n).randbytes(200).hex()) for n in range(200)]
    return ParquetDataset(packed(folder, dataset(*rows, images=images), row_group_boxes=10))
