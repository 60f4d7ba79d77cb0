"""Ids that row groups of a parquet file share: refused before work, with both places, and cheap to rule out."""

from pathlib import Path
from typing import Any

import pytest

from mal_train.core.coco import parquet_ids
from mal_train.core.coco.parquet_ids import refuse_repeated_ids
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_schema import Head
from mal_train.core.coco.parquet_share import ParquetShare
from mal_train.core.coco.parquet_writer import write_part
from mal_train.core.coco.stream import copy_coco, scan_coco, write_coco
from mal_train.core.errors import BadDataset
from tests.mal_train.core.coco.coco_rows import row


def coco(ids: list[Any], image_ids: list[Any] | None = None) -> dict[str, Any]:
    """Returns a file with two boxes an image; `ids` are those of the boxes, in the order of the images."""
    images = image_ids or list(range(1, len(ids) // 2 + 1))
    rows = [row(value, image_id=images[n // 2]) for n, value in enumerate(ids)]
    return {
        "images": [{"id": value, "file_name": f"{n}.png"} for n, value in enumerate(images)],
        "annotations": rows,
        "categories": [],
    }


def dataset_of(folder: Path, raw: dict[str, Any]) -> ParquetDataset:
    """Writes a file with a row group for each image."""
    write_coco(folder / "in.json", raw)
    copy_coco(folder / "in.json", folder / "in.parquet", row_group_boxes=2)
    return ParquetDataset(folder / "in.parquet")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that receives the list of rows of each row group whose ids are read."""
    seen: list[str] = []
    keys = parquet_ids._keys

    def recorded(dataset: ParquetDataset, member: str, ranges: Any) -> Any:
        seen.extend([member] * len(ranges))
        return keys(dataset, member, ranges)

    monkeypatch.setattr(parquet_ids, "_keys", recorded)
    return seen


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3, 1],
        [5, 9, 7, 8, 9, 6],
        [1, "a", 2, "a"],
        ["x", 1, 2, 3, "x", 9],
        [1, 2, 3, 1.0],
        [10**30, 1, 2, 10**30],
        [0.5, 1, 2, 0.5],
        [2**63 - 1, -(2**63), 4, -(2**63)],
    ],
)
def test_an_id_that_two_row_groups_use_is_refused_with_both_places(tmp_path: Path, ids: list[Any]) -> None:
    dataset = dataset_of(tmp_path, coco(ids))
    with pytest.raises(BadDataset) as caught:
        refuse_repeated_ids(dataset)
    repeated = next(value for n, value in enumerate(ids) if value in ids[:n])
    for position in [n for n, value in enumerate(ids) if value == repeated]:
        assert f"in.parquet annotations[{position}]" in str(caught.value)
    with pytest.raises(BadDataset):
        ParquetShare(tmp_path / "in.parquet", 0, 2).scan(lambda *_: None)


@pytest.mark.parametrize("ids", [[1, 2, 3, 4], [4, 1, 2, 3], [1, "1", 2, "2"], [1, None, 2, None], [9, 1, True, 5]])
def test_different_ids_pass_in_any_order_and_of_any_type(tmp_path: Path, ids: list[Any]) -> None:
    refuse_repeated_ids(dataset_of(tmp_path, coco(ids)))


def test_two_images_of_one_id_are_refused(tmp_path: Path) -> None:
    raw = coco([1, 2, 3, 4, 5, 6], [7, 8, 7])
    with pytest.raises(BadDataset, match=r"image id 7 .*images\[0\].*images\[2\]"):
        refuse_repeated_ids(dataset_of(tmp_path, raw))


def test_ranges_that_are_apart_need_no_read_and_only_overlapping_ones_are_read(
    tmp_path: Path, reads: list[str]
) -> None:
    refuse_repeated_ids(dataset_of(tmp_path, coco([1, 2, 3, 4, 5, 6])))
    assert reads == []
    refuse_repeated_ids(dataset_of(tmp_path, coco([1, 5, 2, 6, 7, 8])))
    assert reads == ["annotations"] * 2


def test_several_passes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_ids, "IDS_PER_PASS", 2)
    refuse_repeated_ids(dataset_of(tmp_path, coco([9, -4, 2, 8, 3, 7])))
    with pytest.raises(BadDataset, match="annotation id -4 "):
        refuse_repeated_ids(dataset_of(tmp_path, coco([9, -4, 2, 8, -4, 7])))


def test_parts_of_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").mkdir()
    rows = list(dataset_of_rows(tmp_path))
    head = Head({"images": None, "annotations": None, "categories": []}, 2, 4)
    for n, one in enumerate(rows):
        write_part(tmp_path / "in.parquet" / f"part-{n}.parquet", [one], head)
    with pytest.raises(BadDataset, match=r"part-0\.parquet annotations\[0\], part-1\.parquet annotations\[3\]"):
        refuse_repeated_ids(ParquetDataset(tmp_path / "in.parquet"))


def dataset_of_rows(folder: Path) -> Any:
    (folder / "one").mkdir()
    return dataset_of(folder / "one", coco([1, 2, 3, 1])).rows()


def test_json_names_both_places_in_memory_and_row_by_row(tmp_path: Path) -> None:
    write_coco(tmp_path / "in.json", coco([1, 2, 3, 1]))
    with pytest.raises(BadDataset, match=r"annotation id 1 \(annotations\[0\], annotations\[3\]\)"):
        scan_coco(tmp_path / "in.json", lambda *_: None)
