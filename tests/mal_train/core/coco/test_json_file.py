"""JSON files that are compressed, and files of other formats in their place, whose error names how to convert them."""

import gzip
import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mal_train.core.coco.annotations import read_coco
from mal_train.core.coco.json_file import errors_path
from mal_train.core.coco.json_reader import JsonMemberReader
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.coco.plan import read_plan
from mal_train.core.coco.stream import copy_coco, scan_coco, write_coco
from mal_train.core.errors import BadDataset


@pytest.mark.parametrize(
    ("name", "text", "formats"),
    [
        ("boxes.csv", "file_name,xmin,ymin,xmax,ymax\na.jpg,1,2,3,4\n", ["csv"]),
        ("boxes.csv.gz", "file_name", ["csv"]),
        ("a.XML", "<annotation/>", ["voc", "cvat"]),
        ("a.txt", "0 .5 .5 .1 .1\n", ["yolo", "dota"]),
        ("b.txt", "", ["yolo", "dota"]),
        ("folder", None, ["yolo", "voc", "dota", "labelme"]),
        ("dataset", "[]", []),
        ("a.json", "<annotation/>", []),
    ],
)
def test_the_error_names_the_formats_that_are_converted(
    tmp_path: Path, name: str, text: str | None, formats: list[str]
) -> None:
    path = tmp_path / name
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    for read in (read_coco, read_plan, lambda path: scan_coco(path, lambda *_: None)):
        with pytest.raises(BadDataset) as raised:
            read(path)
        _, has_remedy, listed = str(raised.value).partition("mal-client convert --from ")
        assert bool(has_remedy) == bool(formats)
        assert all(word in listed for word in formats)


COCO = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "床"}]}


@pytest.mark.parametrize("write", [write_json_atomic, write_coco])
def test_a_file_named_gz_is_compressed_and_holds_the_same_text(
    tmp_path: Path, write: Callable[[Path, Mapping[str, object]], None]
) -> None:
    plain, packed, again = tmp_path / "a.json", tmp_path / "a.json.GZ", tmp_path / "b.json.gz"
    for path in (plain, packed, again):
        write(path, COCO)
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert packed.read_bytes() == again.read_bytes()
    copy_coco(packed, tmp_path / "back.json")
    assert (tmp_path / "back.json").read_bytes() == plain.read_bytes()


def test_a_compressed_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    write_coco(path, COCO)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json_atomic(path, {"first": 1, "second": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["out.json", "out.json.gz", "out.JSON.GZ", "out.parquet"])
def test_files_beside_an_output_have_its_name_without_suffixes(tmp_path: Path, name: str) -> None:
    assert errors_path(tmp_path / name) == tmp_path / "out.errors.jsonl"


READERS: dict[str, Callable[[Path], object]] = {
    "whole": read_coco,
    "rows": lambda path: scan_coco(path, lambda *_: None),
    "list": lambda path: list(JsonMemberReader(path).rows()),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_error_of_a_truncated_file_names_line_and_column_once(tmp_path: Path, reader: str) -> None:
    rows = [{"id": number, "bbox": [1.5, 2, 30, 40], "note": "é\n床"} for number in range(6000)]
    content = rows if reader == "list" else {"images": [], "annotations": rows}
    text, path = json.dumps(content, indent=1, ensure_ascii=False), tmp_path / "a.json"
    rng = random.Random(5)
    for end in [*(rng.randrange(3, len(text)) for _ in range(12)), 3, len(text) - 1]:
        path.write_text(text[:end], encoding="utf-8")
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text[:end])
        with pytest.raises(BadDataset) as raised:
            READERS[reader](path)
        found = re.findall(r"line ([0-9]+),? column ([0-9]+)|char", str(raised.value))
        assert found == [(str(expected.value.lineno), str(expected.value.colno))]
        assert str(raised.value).startswith(f"{path}: not JSON")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_file_is_named_as_empty(tmp_path: Path, reader: str, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadDataset, match="empty file"):
        READERS[reader](tmp_path / "a.json")
