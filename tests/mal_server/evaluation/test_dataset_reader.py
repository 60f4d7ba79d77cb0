"""Annotation files below the server's data folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from mal_server.errors import InvalidRequest
from mal_server.evaluation.dataset_reader import memory_of, read_dataset
from mal_server.inference.allowed_dirs import AllowedDirs


@pytest.mark.parametrize("read", [memory_of, lambda folders, path: read_dataset(folders, path, "sets")])
def test_parquet_is_refused_before_it_is_opened(read: Callable[[AllowedDirs, str], object], tmp_path: Path) -> None:
    (tmp_path / "truth.parquet").write_bytes(b"PAR1")
    with pytest.raises(InvalidRequest) as caught:
        read(AllowedDirs({"sets": tmp_path}, "data_folders"), "sets/truth.parquet")
    assert [field for field, _ in caught.value.violations] == ["options.dataset.annotations"]


def test_images_are_numbered_in_the_order_of_their_ids(tmp_path: Path) -> None:
    rows = [{"id": n, "file_name": f"{n}.png", "width": 9, "height": 9} for n in (10, 9)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 5, 5]} for n in (9, 10)]
    truth = {"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    dataset = read_dataset(AllowedDirs({"sets": tmp_path}, "data_folders"), "sets/truth.json", "sets")
    images = [image.read() for image in dataset.images(lambda *_: cast(Any, None), 10, {})]
    numbers = {row.id: row.image_id for image in images for row in image.annotations}
    assert numbers == {9: 0, 10: 1}, "equal scores count in the order of image ids"
