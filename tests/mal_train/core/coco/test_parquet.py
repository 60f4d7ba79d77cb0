"""The parquet form of a COCO file: nothing is lost, and only the wanted row groups are read."""

import io
import json
import os
import random
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_train.core import spill
from mal_train.core.coco import parquet_reader, parquet_writer
from mal_train.core.coco.annotations import Annotation, Reason, parse_coco, read_coco
from mal_train.core.coco.parquet_reader import ParquetDataset, RowGroupReader, rows_of
from mal_train.core.coco.parquet_records import ImageRow
from mal_train.core.coco.parquet_schema import Head, load_pyarrow, read_metadata
from mal_train.core.coco.parquet_writer import PartWriter, write_part
from mal_train.core.coco.stream import copy_coco, read_list, scan_coco, write_coco
from mal_train.core.errors import BadDataset, ConfigError
from tests.mal_train.core.coco.coco_rows import dataset, row
from tests.mal_train.core.coco.hostile_files import document
from tests.mal_train.core.coco.parquet_files import packed, split_file, unpacked
from tests.reference import shared

pa, pq = load_pyarrow()


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a few rows fill the memory, a bucket and a row without an image."""
    monkeypatch.setattr(spill, "MEMORY_BYTES", 400)
    monkeypatch.setattr(parquet_writer, "_IMAGES_PER_BUCKET", 2)
    monkeypatch.setattr(parquet_writer, "_ROWS_PER_BUCKET", 2)
    monkeypatch.setattr(parquet_writer, "_UNPLACED_PER_ROW", 2)
    monkeypatch.setattr(parquet_reader, "_ROWS_PER_BUCKET", 2)
    monkeypatch.setattr(parquet_reader, "_ROWS_PER_BATCH", 2)


NUMBER = st.integers() | st.floats() | st.sampled_from([0, 1, 1.0, -0.0, 2**53 + 1, 2**63, 10**40, float("nan")])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | st.text(st.characters(), max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ID = st.integers(0, 3) | st.sampled_from([0.0, 1.0, True, "1", "a", None, float("nan"), 2**70])
FIELDS = {
    "id": ID,
    "image_id": ID,
    "category_id": ID,
    "bbox": st.lists(NUMBER, min_size=4, max_size=4),
    "iscrowd": st.sampled_from([0, 1, True, False, 1.0, 300]),
    "area": NUMBER,
    "segmentation": JSON,
    "score": NUMBER,
    "agreement": NUMBER,
    "flags": st.lists(st.text(max_size=3), max_size=2),
    "error": st.fixed_dictionaries({"reason": st.text(max_size=3), "message": st.text(max_size=3)}),
    "file_name": st.text(max_size=4),
    "width": NUMBER,
    "height": st.integers(1, 99),
    "note": JSON,
    "": JSON,
}


@st.composite
def rows(draw: st.DrawFn) -> Any:
    """Draws a row with some of the known fields in any order, or another JSON value."""
    if draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    keys = draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True))
    return {key: draw(JSON if draw(st.integers(0, 5)) == 0 else FIELDS[key]) for key in keys}


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """Draws a COCO file with its members in any order."""
    members = {
        "images": draw(st.lists(rows(), max_size=4)),
        "annotations": draw(st.lists(rows(), max_size=8)),
        "categories": draw(st.lists(JSON, max_size=2)),
        **draw(st.dictionaries(st.text(max_size=3), JSON, max_size=2)),
    }
    return {key: members[key] for key in draw(st.permutations(sorted(members)))}


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares most of the time of a small file."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.promise("files", "Any COCO file is the same JSON value after its conversion to parquet and back")
@pytest.mark.usefixtures("small_memory", "no_fsync")
@settings(max_examples=150, deadline=None)
@given(raw=files(), row_group_boxes=st.integers(1, 5))
def test_any_coco_file_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any], row_group_boxes: int
) -> None:
    path = packed(tmp_path_factory.mktemp("coco"), raw, row_group_boxes=row_group_boxes)
    assert unpacked(path) == json.dumps(raw)


@pytest.mark.usefixtures("small_memory", "no_fsync")
def test_hostile_files_survive_the_round_trip_or_give_one_error(tmp_path: Path) -> None:
    survived = 0
    for seed in range(150):
        raw = document(random.Random(seed))
        try:
            path = packed(tmp_path, raw, row_group_boxes=1 + seed % 4)
        except BadDataset:
            assert not (isinstance(raw["images"], list) and isinstance(raw["annotations"], list))
            continue
        assert unpacked(path) == json.dumps(raw)
        survived += 1
    assert survived > 100


@pytest.mark.parametrize("name", ["coco_val_dev", "coco_train_mini"])
def test_real_files_survive_the_round_trip(tmp_path: Path, name: str) -> None:
    source = shared("data", name, "annotations.json")
    copy_coco(source, tmp_path / "in.parquet", row_group_boxes=50)
    assert unpacked(tmp_path / "in.parquet") == json.dumps(json.loads(source.read_text()))


def test_parquet_is_read_like_json(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.png", "width": 9, "height": 9} for n in (5, "b", 2)]
    rows = [row(n, image_id=image_id) for n, image_id in enumerate([2, 5, 2, 77, "b"])]
    raw = dataset(*rows, "no row", images=images, categories=[{"id": 3, "name": "cup"}, None])
    path = packed(tmp_path, raw, row_group_boxes=1)
    coco, expected = read_coco(path), parse_coco(raw)
    assert (coco.images, coco.annotations, coco.notes) == (expected.images, expected.annotations, expected.notes)
    scanned: list[Annotation] = []
    head = scan_coco(path, lambda _, annotation: scanned.append(annotation))
    assert scanned == expected.annotations
    assert (head.images, head.category_names, head.count) == (expected.images, expected.category_names, 6)
    assert list(read_list(path, "images")) == images


def test_typed_columns_hold_what_other_tools_need(tmp_path: Path) -> None:
    rle = {"size": [48, 64], "counts": "abc"}
    raw = dataset(
        row(7, segmentation=rle, area=12.5, score=0.5, flags=["EMPTY_MASK"], iscrowd=0, mine={"a": 1}),
        row("text", bbox="none"),
        row(8, image_id=99),
    )
    first, second = pq.read_table(packed(tmp_path, raw)).to_pylist()
    assert (first["index"], first["id"], first["file_name"], first["width"], first["height"]) == (0, 1, "a.png", 64, 48)
    typed, odd = first["annotations"]
    assert (typed["id"], typed["category_id"], typed["bbox"], typed["area"]) == (7, 3, [1.0, 2.0, 10.0, 20.0], 12.5)
    assert (typed["score"], typed["flags"], typed["iscrowd"]) == (0.5, ["EMPTY_MASK"], 0)
    assert json.loads(typed["segmentation"]) == rle
    assert json.loads(typed["extra"]) == {"mine": {"a": 1}}
    assert (odd["id"], odd["bbox"], json.loads(odd["extra"])) == (None, None, {"id": "text", "bbox": "none"})
    assert (second["index"], second["file_name"], [one["index"] for one in second["annotations"]]) == (None, None, [2])


def test_every_annotation_is_in_the_row_of_its_image(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(40)]
    chance = random.Random(3)
    rows = [row(n, image_id=chance.randrange(45)) for n in range(300)]
    dataset_file = ParquetDataset(packed(tmp_path, dataset(*rows, images=images), row_group_boxes=20))
    assert len(dataset_file.row_groups) > 10
    placed = {}
    for image_row in dataset_file.rows():
        positions = [position for position, _ in image_row.annotations]
        assert positions == sorted(positions)
        for position, value in image_row.annotations:
            placed[position] = value
            assert image_row.image is None or value["image_id"] == image_row.image["id"]
            assert (image_row.index is None) == (value["image_id"] >= 40)
    assert [placed[position] for position in range(300)] == rows


@pytest.fixture
def split(tmp_path: Path) -> ParquetDataset:
    return split_file(tmp_path)


class _Watched(io.BufferedReader):
    reads: list[tuple[int, int]]

    def read(self, size: int | None = -1, /) -> bytes:
        begin = self.tell()
        data = super().read(size)
        self.reads.append((begin, begin + len(data)))
        return data


def test_only_the_wanted_row_groups_are_read(split: ParquetDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = pq.ParquetFile(split.path).metadata
    starts = [
        min(
            metadata.row_group(n).column(0).dictionary_page_offset or 1 << 60,
            metadata.row_group(n).column(0).data_page_offset,
        )
        for n in range(20)
    ]
    reads: list[tuple[int, int]] = []

    def watched(path: Path) -> io.BufferedReader:
        file = _Watched(io.FileIO(path))
        file.reads = reads
        return file

    monkeypatch.setattr(parquet_reader, "open_random", watched)
    wanted = range(3, 20, 5)
    found = list(split.rows(split.row_groups[3::5]))
    assert [image_row.index for image_row in found] == list(wanted)
    ends = [*starts[1:], Path(split.path).stat().st_size - 1]
    for group in set(range(20)) - set(wanted):
        overlapping = [
            (begin, end)
            for begin, end in reads
            # The footer lies behind the last row group, and the first four bytes are the magic number.
            if begin < ends[group] and end > starts[group] and end <= starts[-1]
        ]
        assert overlapping == [], f"row group {group}"


def test_parts_in_a_folder_are_one_file_again(split: ParquetDataset, tmp_path: Path) -> None:
    folder = tmp_path / "parts.parquet"
    folder.mkdir()
    for shard in range(3):
        write_part(folder / f"part-{shard}.parquet", split.rows(split.row_groups[shard::3]), split.head)
    (folder / "part-0.errors.jsonl").write_text("not a part")
    assert unpacked(folder) == json.dumps(json.loads((tmp_path / "in.json").read_text()))
    (folder / "part-1.parquet").unlink()
    with pytest.raises(BadDataset, match=r"parts\.parquet"):
        read_coco(folder)
    (folder / "part-1.parquet").write_bytes((folder / "part-0.parquet").read_bytes())
    with pytest.raises(BadDataset, match=r"parts\.parquet"):
        read_coco(folder)


def test_parts_of_different_files_are_refused(split: ParquetDataset, tmp_path: Path) -> None:
    folder = tmp_path / "parts.parquet"
    folder.mkdir()
    write_part(folder / "a.parquet", split.rows(split.row_groups[::2]), split.head)
    write_part(folder / "b.parquet", split.rows(split.row_groups[1::2]), Head({**split.head.members, "x": 1}, 20, 200))
    with pytest.raises(BadDataset, match=r"b\.parquet"):
        ParquetDataset(folder)


def test_rows_before_the_first_wanted_one_are_not_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[int] = []

    def counted(batch: Any, name: str) -> Iterator[ImageRow]:
        restored.append(batch.num_rows)
        return rows_of(batch, name)

    monkeypatch.setattr(parquet_reader, "_ROWS_PER_BATCH", 3)
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(10)]
    rows = [row(n, image_id=n // 2, note=f"n{n}") for n in range(20)]
    packed_rows = ParquetDataset(packed(tmp_path, dataset(*rows, images=images)))
    expected = list(packed_rows.rows())
    monkeypatch.setattr(parquet_reader, "rows_of", counted)
    with RowGroupReader(packed_rows) as reader:
        for start in range(11):
            restored.clear()
            assert list(reader.rows(packed_rows.row_groups[0], start)) == expected[start:]
            assert sum(restored) == 10 - start


def test_of_the_heads_of_many_parts_only_the_first_is_kept(
    split: ParquetDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[weakref.ref[Head]] = []
    kept: list[int] = []

    def read(*arguments: Any) -> tuple[Head, list[int]]:
        kept.append(sum(head() is not None for head in heads))
        found = read_metadata(*arguments)
        heads.append(weakref.ref(found[0]))
        return found

    folder = tmp_path / "parts.parquet"
    folder.mkdir()
    for shard in range(5):
        write_part(folder / f"part-{shard}.parquet", split.rows(split.row_groups[shard::5]), split.head)
    monkeypatch.setattr(parquet_reader, "read_metadata", read)
    ParquetDataset(folder)
    assert kept == [0, 1, 1, 1, 1]


def test_a_folder_without_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "parts.parquet").mkdir()
    with pytest.raises(BadDataset, match=r"parts\.parquet"):
        read_coco(tmp_path / "parts.parquet")


@pytest.mark.parametrize("boxes", [0, 1 << 40])
def test_row_groups_need_a_size_in_range(tmp_path: Path, boxes: int) -> None:
    with pytest.raises(ConfigError):
        packed(tmp_path, dataset(row()), row_group_boxes=boxes)


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path, dataset(row()))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"mask-auto-labeler\[parquet\]"):
        read_coco(path)
    with pytest.raises(ConfigError, match=r"mask-auto-labeler\[parquet\]"):
        copy_coco(tmp_path / "in.json", tmp_path / "out.parquet")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    path = packed(tmp_path, dataset(row(), row(2)))
    first = path.read_bytes()
    assert packed(tmp_path, dataset(row(), row(2))).read_bytes() == first
    assert ParquetDataset(path).sha256 == ParquetDataset(path).sha256
    (tmp_path / "other").mkdir()
    other = packed(tmp_path / "other", dataset(row(), row(3)))
    assert ParquetDataset(other).sha256 != ParquetDataset(path).sha256


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    dataset_file = ParquetDataset(packed(tmp_path, dataset(row())))
    packed(tmp_path, dataset(row(5)))
    with pytest.raises(BadDataset, match=r"in\.parquet"):
        list(dataset_file.rows())


def test_an_error_can_be_stored_with_its_image(tmp_path: Path) -> None:
    error = {"reason": "IMAGE_NOT_FOUND", "message": "a.png: no such file"}
    image = {"id": 1, "file_name": "a.png", "error": error}
    write_part(
        tmp_path / "part.parquet",
        [ImageRow(0, image, [(0, row())])],
        Head(dataset(images=None, annotations=None), 1, 1),
    )
    (found,) = pq.read_table(tmp_path / "part.parquet").to_pylist()
    assert found["error"] == error
    assert read_coco(tmp_path / "part.parquet").raw["images"] == [image]


def test_a_file_in_memory_is_written_by_its_suffix(tmp_path: Path) -> None:
    raw = dataset(row(), row(2))
    write_coco(tmp_path / "out.parquet", raw)
    write_coco(tmp_path / "out.json", raw)
    assert read_coco(tmp_path / "out.parquet").raw == json.loads((tmp_path / "out.json").read_text()) == raw


def test_an_unfinished_writer_writes_no_footer() -> None:
    file = io.BytesIO()

    def write() -> None:
        with PartWriter(file) as writer:
            writer.add(ImageRow(0, {"id": 1}, []))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert file.getvalue() in (b"", b"PAR1")


def test_rows_without_an_image_are_reported_as_in_json(tmp_path: Path) -> None:
    coco = read_coco(packed(tmp_path, dataset(row(image_id=9), row(2, image_id=[1]), None)))
    assert [one.reason for one in coco.annotations] == [
        Reason.IMAGE_UNKNOWN,
        Reason.IMAGE_UNKNOWN,
        Reason.NOT_AN_OBJECT,
    ]
