"""Parquet files of another schema, damaged, hostile or too large, and a full disk: one clear error each."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.coco import parquet_reader, parquet_schema, parquet_writer
from mal_train.core.coco.annotations import read_coco
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_schema import METADATA_KEY, Head, arrow_schema, load_pyarrow
from mal_train.core.errors import BadDataset, ConfigError, OutputError
from tests.mal_train.core.coco.coco_rows import dataset, row
from tests.mal_train.core.coco.parquet_files import packed, split_file, unpacked

pa, pq = load_pyarrow()


@pytest.fixture
def split(tmp_path: Path) -> ParquetDataset:
    return split_file(tmp_path)


def other_schema(name: str) -> Any:
    """Returns a table that is not in the form, by the name of the difference."""
    good = arrow_schema().with_metadata(
        {METADATA_KEY: Head({"images": None, "annotations": None}, 0, 0).to_metadata([], "")}
    )
    match name:
        case "metadata":
            schema = arrow_schema()
        case "version":
            schema = good.with_metadata({METADATA_KEY: b'{"version": 2}'})
        case "unreadable":
            schema = good.with_metadata({METADATA_KEY: b"[" * 100_000})
        case "fields":
            schema = good.with_metadata({METADATA_KEY: b'{"version": 1, "members": {}}'})
        case "missing column":
            schema = good.remove(good.get_field_index("annotations"))
        case "type":
            schema = good.set(good.get_field_index("width"), pa.field("width", pa.string()))
        case _:
            schema = good.append(pa.field("more", pa.int64()))
    return schema.empty_table()


@pytest.mark.parametrize(
    "name", ["metadata", "version", "unreadable", "fields", "missing column", "type", "unknown column"]
)
def test_a_parquet_file_of_another_schema_is_one_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(other_schema(name), path)
    with pytest.raises(BadDataset, match=r"other\.parquet") as caught:
        read_coco(path)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("content", [b"", b"PAR1", b'{"images": []}', b"x" * 100, b"PAR1" + b"\xff" * 4 + b"PAR1"])
def test_a_file_that_is_not_parquet_is_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.parquet"
    path.write_bytes(content)
    with pytest.raises(BadDataset, match=r"other\.parquet"):
        read_coco(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"none\.parquet"):
        read_coco(tmp_path / "none.parquet")


def test_a_damaged_file_is_one_error_or_unchanged(split: ParquetDataset) -> None:
    path = Path(split.path)
    content = path.read_bytes()
    expected = unpacked(path)
    chance = random.Random(5)
    damaged = path.with_name("damaged.parquet")
    outcomes = {"equal": 0, "refused": 0}
    for case in range(120):
        changed = bytearray(content)
        if case % 4 == 0:
            del changed[chance.randrange(len(changed)) :]
        else:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        damaged.write_bytes(changed)
        try:
            found = unpacked(damaged)
        except BadDataset:
            outcomes["refused"] += 1
        else:
            assert found == expected
            outcomes["equal"] += 1
    assert outcomes["refused"] > 60


def hostile_parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Yields rows whose columns do not agree with each other."""
    image = {"index": 0, "id": 1, "file_name": "a", "layout": '{"id":"i","file_name":"s"}', "annotations": []}
    box = {"index": 0, "id": 1, "bbox": [1.0, 2.0, 3.0, 4.0], "layout": '{"id":"i","bbox":"ffff","image_id":"="}'}
    yield image | {"annotations": None}
    yield image | {"layout": '{"id":"f"}'}
    yield image | {"layout": '{"width":"i"}'}
    yield image | {"layout": '{"other":"i"}'}
    yield image | {"layout": '{"other":""}'}
    yield image | {"layout": '{"id":"="}'}
    yield image | {"layout": "{", "extra": "{}"}
    yield image | {"layout": '["id"]'}
    yield image | {"layout": '{"id":1}'}
    yield image | {"extra": "[]"}
    yield image | {"extra": "{" * 50_000}
    yield image | {"extra": '{"a":' + "[" * 200 + "]" * 200 + "}"}
    yield image | {"annotations": [None]}
    yield image | {"annotations": [box | {"index": None}]}
    yield image | {"annotations": [box | {"bbox": [1.0, 2.0]}]}
    yield image | {"annotations": [box | {"bbox": [1.0, None, 2.0, 3.0]}]}
    yield image | {"annotations": [box | {"bbox": [float("inf")] * 4, "layout": '{"bbox":"iiii"}'}]}
    yield image | {"annotations": [box | {"layout": '{"bbox":"ffffff"}'}]}
    yield image | {"annotations": [box | {"segmentation": "{", "layout": '{"segmentation":"j"}'}]}
    yield image | {"annotations": [box | {"index": 5}]}


@pytest.mark.parametrize("number", range(20))
def test_columns_that_do_not_agree_are_one_error(tmp_path: Path, number: int) -> None:
    row_of_file = list(hostile_parts(arrow_schema()))[number]
    count = len(row_of_file["annotations"] or ())
    metadata = Head({"images": None, "annotations": None, "categories": []}, 1, count).to_metadata([count], "")
    table = pa.Table.from_pylist([row_of_file], arrow_schema().with_metadata({METADATA_KEY: metadata}))
    pq.write_table(table, tmp_path / "hostile.parquet")
    with pytest.raises(BadDataset, match=r"hostile\.parquet"):
        read_coco(tmp_path / "hostile.parquet")


def test_a_footer_that_does_not_fit_into_the_first_read_is_read(
    split: ParquetDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "_END_BYTES", 16)
    found = ParquetDataset(split.path)
    assert (found.sha256, list(found.rows())) == (split.sha256, list(split.rows()))


@pytest.mark.parametrize("limit", ["MAX_ROW_GROUP_BYTES", "MAX_ROW_GROUP_ROWS", "MAX_FOOTER_BYTES"])
def test_a_file_over_a_limit_is_refused_before_its_rows_are_read(
    split: ParquetDataset, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(parquet_reader, limit, 9)
    monkeypatch.setattr(parquet_reader, "_read_row_group", None)
    with pytest.raises(BadDataset, match=r"in\.parquet"):
        read_coco(Path(split.path))


def test_a_decompression_bomb_is_refused_by_its_stated_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_ROW_GROUP_BYTES", 16 << 20)
    schema = arrow_schema().with_metadata(
        {METADATA_KEY: Head({"images": None, "annotations": None}, 1, 0).to_metadata([0], "")}
    )
    bomb = [{"index": 0, "extra": '"' + "a" * (1 << 20) + '"', "annotations": []}] * 17
    pq.write_table(
        pa.Table.from_pylist(bomb, schema), tmp_path / "bomb.parquet", compression="zstd", use_dictionary=False
    )
    assert (tmp_path / "bomb.parquet").stat().st_size < 1 << 16
    with pytest.raises(BadDataset, match=r"bomb\.parquet: row group 0"):
        read_coco(tmp_path / "bomb.parquet")


def test_what_exceeds_a_limit_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "in.parquet"
    output.write_text("old")
    monkeypatch.setattr(parquet_schema, "MAX_HEAD_BYTES", 500)
    with pytest.raises(BadDataset, match="'notes'"):
        packed(tmp_path, dataset(row(), notes="x" * 600))
    monkeypatch.setattr(parquet_writer, "MAX_ROW_BYTES", 500)
    with pytest.raises(BadDataset, match=r"images\[0\]"):
        packed(tmp_path, dataset(row(note="x" * 600)))
    monkeypatch.setattr(parquet_writer, "MAX_ROW_ANNOTATIONS", 1)
    with pytest.raises(BadDataset, match=r"images\[0\]"):
        packed(tmp_path, dataset(row(), row(2)))
    monkeypatch.setattr(parquet_writer, "MAX_ROW_GROUPS", 1)
    with pytest.raises(ConfigError):
        packed(tmp_path, dataset(row(image_id=9), row(1)), row_group_boxes=1)
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "in.parquet"]


@pytest.mark.parametrize(
    "raw", [[], {}, dataset(images=None), dataset(images={}), {"images": [], "categories": []}, dataset(annotations=1)]
)
def test_a_file_that_is_not_coco_is_not_written(tmp_path: Path, raw: Any) -> None:
    with pytest.raises(BadDataset, match=r"in\.(json|parquet)"):
        packed(tmp_path, raw)
    assert not (tmp_path / "in.parquet").exists()


def test_a_full_disk_leaves_an_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path, dataset(row()))
    old = path.read_bytes()

    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet_writer, "_HashedFile", lambda _file: _with_discard(Full()))
    with pytest.raises(OutputError):
        packed(tmp_path, dataset(row(), row(2)))
    assert path.read_bytes() == old


def _with_discard(file: Any) -> Any:
    file.discard = lambda: setattr(file, "write", len)
    return file
