"""Shares of a COCO file in parquet: each row is in one share, and the written parts are one file again."""

import json
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.coco import parquet_reader
from mal_train.core.coco.annotations import Annotation, Reason, read_coco
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_records import ImageRow
from mal_train.core.coco.parquet_schema import Head
from mal_train.core.coco.parquet_share import ParquetShare
from mal_train.core.coco.parquet_writer import write_part
from mal_train.core.coco.stream import CocoHead, scan_coco, write_coco, write_transformed
from mal_train.core.errors import BadDataset, ConfigError, StorageError
from tests.mal_train.core.coco.coco_rows import dataset, row
from tests.object_store import S3

IMAGES = 30


def raw() -> dict[str, Any]:
    """Thirty images in no order, three boxes each; one row without a known image, one invalid row."""
    images = [{"id": (7 * n) % IMAGES, "file_name": f"{n}.png"} for n in range(IMAGES)]
    rows = [row(n, image_id=(11 * n) % IMAGES, note=f"n{n}" * 20) for n in range(3 * IMAGES)]
    rows[5] = row(5, image_id=99)
    rows[6]["bbox"] = None
    return dataset(*rows, images=images, mask_auto_labeler={"old": 1}, info={"by": "test"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_coco(tmp_path / "in.parquet", raw())
    # Six boxes a row group.
    packed = ParquetDataset(tmp_path / "in.parquet")
    rows = list(packed.rows())
    write_part(tmp_path / "in.parquet", rows, packed.head, row_group_boxes=6)
    return tmp_path / "in.parquet"


def scanned(share: ParquetShare) -> tuple[CocoHead, list[Annotation]]:
    rows: list[Annotation] = []
    numbers: list[int] = []

    def add(number: int, annotation: Annotation) -> None:
        numbers.append(number)
        rows.append(annotation)

    head = share.scan(add)
    assert numbers == list(range(head.count))
    return head, rows


@pytest.mark.parametrize("count", [1, 3, 15])
def test_every_row_is_in_one_share_and_read_as_in_the_whole_file(path: Path, count: int) -> None:
    expected: dict[Any, Annotation] = {}
    whole = scan_coco(path, lambda _, annotation: expected.update({annotation.id: annotation}))
    found: dict[Any, Annotation] = {}
    images: dict[Any, Any] = {}
    for index in range(count):
        head, rows = scanned(ParquetShare(path, index, count))
        assert not found.keys() & {annotation.id for annotation in rows}
        assert not images.keys() & head.images.keys()
        assert (head.category_names, head.sha256) == (whole.category_names, whole.sha256)
        found |= {annotation.id: annotation for annotation in rows}
        images |= head.images
    assert found == expected
    assert images == whole.images
    assert {found[5].reason, found[6].reason} == {Reason.IMAGE_UNKNOWN, Reason.BAD_BOX}


def test_written_shares_are_the_file_that_a_single_run_writes(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out.parquet"
    folder.mkdir()

    def transform(_number: int, value: Any, annotation: Annotation) -> Any:
        return {**value, "score": 0.5, "seen": annotation.problem}

    for index in range(4):
        share = ParquetShare(path, index, 4)
        head, _ = scanned(share)
        share.write_transformed(head, folder / f"part-{index}.parquet", transform, {"by": "test"})
    head = scan_coco(path, lambda *_: None)
    write_transformed(head, tmp_path / "single.json", transform, {"by": "test"})
    expected = json.loads((tmp_path / "single.json").read_text())
    assert json.dumps(read_coco(folder).raw) == json.dumps(expected)
    groups = len(ParquetDataset(path).row_groups)
    assert len(ParquetDataset(folder).row_groups) == groups


def test_more_shares_than_row_groups_are_refused(path: Path) -> None:
    groups = len(ParquetDataset(path).row_groups)
    ParquetShare(path, 0, groups)
    with pytest.raises(ConfigError):
        ParquetShare(path, 0, groups + 1)


def test_a_missing_part_whose_images_have_no_boxes_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in.parquet"
    folder.mkdir()
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(4)]
    write_coco(tmp_path / "whole.parquet", dataset(row(1, image_id=0), row(2, image_id=1), images=images))
    packed = ParquetDataset(tmp_path / "whole.parquet")
    rows = list(packed.rows())
    write_part(folder / "part-000000000.parquet", rows[:2], packed.head, row_group_boxes=1)
    with pytest.raises(BadDataset):
        ParquetShare(folder, 0, 2)
    write_part(folder / "part-000000001.parquet", rows[2:], packed.head)
    assert scanned(ParquetShare(folder, 0, 2))[0].count + scanned(ParquetShare(folder, 1, 2))[0].count == 2


def test_a_missing_part_of_a_shard_is_refused_though_a_row_without_image_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in.parquet"
    folder.mkdir()
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(3)]
    write_coco(tmp_path / "whole.parquet", dataset(row(1, image_id=0), row(2, image_id=9), images=images))
    packed = ParquetDataset(tmp_path / "whole.parquet")
    rows = [one for one in packed.rows() if one.annotations or one.index == 1]
    write_part(folder / "part-00000-of-00002.parquet", rows, packed.head, row_group_boxes=1)
    with pytest.raises(BadDataset, match=r"part-00001-of-00002\.parquet"):
        ParquetShare(folder, 0, 2)


def test_a_share_of_a_file_without_rows_is_empty(tmp_path: Path) -> None:
    write_coco(tmp_path / "in.parquet", dataset(images=[]))
    head, rows = scanned(ParquetShare(tmp_path / "in.parquet"))
    assert (head.count, rows) == (0, [])


def test_a_file_without_categories_is_read_as_in_json(tmp_path: Path) -> None:
    raw = dataset(row(1), images=[{"id": 1, "file_name": "a.png"}])
    del raw["categories"]
    write_coco(tmp_path / "in.parquet", raw)
    head, rows = scanned(ParquetShare(tmp_path / "in.parquet"))
    assert (head.category_names, [annotation.problem for annotation in rows]) == ({}, [None])


def test_a_file_whose_categories_are_no_list_is_refused_as_in_json(tmp_path: Path) -> None:
    raw = dataset(row(1), images=[{"id": 1, "file_name": "a.png"}])
    for name in ("in.json", "in.parquet"):
        write_coco(tmp_path / name, raw | {"categories": 5})
        with pytest.raises(BadDataset):
            scan_coco(tmp_path / name, lambda *_: None)
    with pytest.raises(BadDataset):
        ParquetShare(tmp_path / "in.parquet").scan(lambda *_: None)


def image(number: int) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.png"}


WRONG_ROWS = {
    "annotation twice": [
        ImageRow(0, image(0), [(0, row(0, image_id=0)), (0, row(1, image_id=0))]),
        ImageRow(1, image(1), []),
    ],
    "annotation outside": [
        ImageRow(0, image(0), [(0, row(0, image_id=0)), (2, row(1, image_id=0))]),
        ImageRow(1, image(1), []),
    ],
    "image twice": [ImageRow(1, image(0), [(0, row(0, image_id=0))]), ImageRow(1, image(1), [(1, row(1, image_id=1))])],
    "image below": [
        ImageRow(0, image(0), [(0, row(0, image_id=0))]),
        ImageRow(-1, image(1), [(1, row(1, image_id=1))]),
    ],
    "image missing": [ImageRow(0, image(0), [(0, row(0, image_id=0)), (1, row(1, image_id=0))])],
}


@pytest.mark.parametrize("rows", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_rows_that_make_no_complete_file_are_refused_before_work(tmp_path: Path, rows: list[ImageRow]) -> None:
    members = {"images": None, "annotations": None, "categories": [{"id": 1, "name": "a"}]}
    write_part(tmp_path / "in.parquet", rows, Head(members, 2, 2))
    with pytest.raises(BadDataset):
        ParquetShare(tmp_path / "in.parquet").scan(lambda *_: None)


def test_an_image_without_a_position_is_refused_and_not_dropped(tmp_path: Path) -> None:
    members: dict[str, Any] = {"images": None, "annotations": None, "categories": []}
    rows = [ImageRow(0, image(0), [(0, row(0, image_id=0))]), ImageRow(None, image(1), [])]
    write_part(tmp_path / "in.parquet", rows, Head(members, 1, 1))
    with pytest.raises(BadDataset):
        read_coco(tmp_path / "in.parquet")


def test_an_annotation_in_the_row_of_another_image_is_refused(tmp_path: Path) -> None:
    rows = [
        ImageRow(0, {"id": 1, "file_name": "a"}, [(0, row(1, image_id=2))]),
        ImageRow(1, {"id": 2, "file_name": "b"}, []),
    ]
    members: dict[str, Any] = {"images": None, "annotations": None, "categories": []}
    write_part(tmp_path / "in.parquet", rows, Head(members, 2, 1))
    with pytest.raises(BadDataset, match=r"annotations\[0\]"):
        scanned(ParquetShare(tmp_path / "in.parquet"))


@pytest.mark.parametrize("rows", [[row(1), row(1)], [row(1, image_id=9), row(1)]])
def test_repeated_ids_are_refused(tmp_path: Path, rows: list[Any]) -> None:
    write_coco(tmp_path / "in.parquet", dataset(*rows))
    with pytest.raises(BadDataset, match="annotation id 1 "):
        scanned(ParquetShare(tmp_path / "in.parquet"))


def test_a_share_is_read_from_a_store_by_its_row_groups(path: Path, s3: S3) -> None:
    content = path.read_bytes()
    s3.put("in.parquet", content)
    whole = scanned(ParquetShare(path, 1, 4))
    s3.requests.clear()
    share = ParquetShare(s3.address("in.parquet"), 1, 4)
    found = scanned(share)
    assert (found[1], found[0].sha256) == (whole[1], whole[0].sha256)
    # One to tell it from a prefix, two for each of two openings, and one for each of its four row groups.
    # The ids of all row groups overlap, of images and of boxes: two to open the file for the footer, and for each of
    # these columns, and one for each row group.
    assert len(s3.requests) == 9 + 2 + 2 * (2 + len(ParquetDataset(path).row_groups))


def test_a_prefix_of_parts_is_read_from_a_store(path: Path, s3: S3, tmp_path: Path) -> None:
    packed = ParquetDataset(path)
    for index in range(2):
        address = s3.address(f"out.parquet/part-{index}.parquet")
        write_part(address, packed.rows(packed.row_groups[index::2]), packed.head)
    s3.put("out.parquet/part-0.errors.jsonl", b"")
    assert parquet_reader.read_parquet(s3.address("out.parquet")) == read_coco(path).raw
    assert parquet_reader.read_parquet(s3.address("out.parquet/")) == read_coco(path).raw


def test_a_missing_object_is_one_error(s3: S3) -> None:
    with pytest.raises(StorageError) as caught:
        ParquetDataset(s3.address("none.parquet"))
    assert caught.value.reason == "NOT_FOUND"


def test_an_object_that_changes_while_it_is_read_is_refused(path: Path, s3: S3) -> None:
    s3.put("in.parquet", path.read_bytes())
    packed = ParquetDataset(s3.address("in.parquet"))
    rows = packed.rows()
    next(rows)
    write_coco(path, dataset(row(1)))
    s3.put("in.parquet", path.read_bytes())
    with pytest.raises((BadDataset, StorageError)):
        list(rows)
