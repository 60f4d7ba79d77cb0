"""Annotation files below the server's data folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from mal_server.errors import InvalidRequest, ResumeTokenStale
from mal_server.evaluation.dataset_reader import Dataset, memory_of, read_dataset
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


def read_truth(folder: Path, truth: dict[str, Any]) -> Dataset:
    (folder / "truth.json").write_text(json.dumps(truth))
    return read_dataset(AllowedDirs({"sets": folder}, "data_folders"), "sets/truth.json", "sets")


def test_parts_of_an_image_have_names_that_no_file_has(tmp_path: Path) -> None:
    names = ("a.png", "a.png.part1", "a.png1", "a.png/1")
    rows = [{"id": n, "file_name": name, "width": 9, "height": 9} for n, name in enumerate(names)]
    boxes = [{"id": n, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5]} for n in range(5)]
    dataset = read_truth(tmp_path, {"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}]})
    images = list(dataset.images(lambda *_: cast(Any, None), 2, {}))
    items = [image.item_id for image in images]
    assert len(items) == len(set(items)) == 6
    assert [image.read().continues for image in images] == [False, True, True, False, False, False]
    dataset.check_records(dict.fromkeys(items, b""))
    with pytest.raises(ResumeTokenStale):
        dataset.check_records({"b.png": b""})


def test_categories_that_the_file_does_not_have_are_not_confused_with_numbers_of_others(tmp_path: Path) -> None:
    judged = {"neg_category_ids": [], "not_exhaustive_category_ids": [1, 7]}
    row = {"id": 1, "file_name": "a.png", "width": 9, "height": 9, **judged}
    categories = [{"id": "cup", "name": "cup"}, {"id": 7, "name": "hat"}]
    boxes = [{"id": n, "image_id": 1, "category_id": n, "bbox": [1, 1, 5, 5]} for n in ("cup", 7)]
    dataset = read_truth(tmp_path, {"images": [row], "annotations": boxes, "categories": categories})
    assert dataset.category_ids["cup"] == 1
    (image,) = (image.read() for image in dataset.images(lambda *_: cast(Any, None), 10, {}))
    assert image.not_exhaustive == {dataset.category_ids[7]}


def test_points_of_another_form_are_no_problem_of_an_evaluation(tmp_path: Path) -> None:
    row = {"id": 1, "file_name": "a.png", "width": 9, "height": 9}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "points": [[1, 1], [2, 2]]}
    dataset = read_truth(tmp_path, {"images": [row], "annotations": [box], "categories": [{"id": 1, "name": "cup"}]})
    (image,) = (image.read() for image in dataset.images(lambda *_: cast(Any, None), 10, {}))
    assert [one.problem for one in image.annotations] == [None]


def test_rows_that_belong_to_no_image_are_counted_and_named(tmp_path: Path) -> None:
    image = {"id": 1, "file_name": "a.png", "width": 9, "height": 9}
    good = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}
    others = [5, None, "box", {}, {**good, "id": None}, {**good, "id": 7, "image_id": 2}, {"id": 8}]
    truth = {"annotations": [good, *others], "images": [image], "categories": [{"id": 1, "name": "cup"}]}
    dataset = read_truth(tmp_path, truth)
    assert dataset.left_out.counts == {"NOT_AN_OBJECT": 3, "BAD_ID": 2, "IMAGE_UNKNOWN": 2}
    messages = dataset.left_out.first_messages()
    assert messages["NOT_AN_OBJECT"].startswith("annotations[1]: ")
    assert messages["BAD_ID"].startswith("annotations[4]: ")
    assert messages["IMAGE_UNKNOWN"].startswith("annotation 7: ")
    (found,) = (one.read() for one in dataset.images(lambda *_: cast(Any, None), 10, {}))
    assert [row.id for row in found.annotations] == [1], "rows without an id do not change those of others"
