"""Data sets on the server in the forms that exporters write, and images with more objects than one request."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mal_server.errors import InvalidRequest
from mal_server.evaluation import dataset_reader
from mal_server.evaluation.dataset_reader import memory_of, read_dataset
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_train.core.settings import RowRules
from tests.mal_train.core.coco.coco_rows import dataset, row

FOLDERS = "folders"


def read(folder: Path, raw: Any, rules: RowRules = RowRules(), *, compress: bool = False) -> Any:  # noqa: B008
    text = json.dumps(raw).encode()
    (folder / "a.json").write_bytes(gzip.compress(text) if compress else text)
    return read_dataset(AllowedDirs({"data": folder}, FOLDERS), "data/a.json", "data", rules)


def test_a_compressed_file_is_read_and_counts_with_its_size_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = dataset(*(row(n) for n in range(500)))
    assert len(read(tmp_path, raw, compress=True).rows) == 500
    folders = AllowedDirs({"data": tmp_path}, FOLDERS)
    compressed = memory_of(folders, "data/a.json")
    assert len(read(tmp_path, raw).rows) == 500
    assert memory_of(folders, "data/a.json") == compressed
    monkeypatch.setattr(dataset_reader, "MAX_FILE_BYTES", 1000)
    for compress in (True, False):
        with pytest.raises(InvalidRequest, match="at most 1000"):
            read(tmp_path, raw, compress=compress)


def test_a_damaged_compressed_file_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(gzip.compress(b"{}" * 500)[:-12])
    folders = AllowedDirs({"data": tmp_path}, FOLDERS)
    for work in (lambda: memory_of(folders, "data/a.json"), lambda: read_dataset(folders, "data/a.json", "data")):
        with pytest.raises(InvalidRequest, match="gzip") as caught:
            work()
        assert str(tmp_path) not in str(caught.value)


def test_rows_of_any_category_or_none_have_one_in_the_report(tmp_path: Path) -> None:
    raw = dataset(row(1), row(2, category_id=None), row(3, category_id="x"), row(4, category_id=9))
    found = read(tmp_path, raw)
    assert sorted(found.category_names) == [1, 2, 3, 4]
    assert sorted(found.category_names.values()) == ["(none)", "9", "cup", "x"]
    integers = read(tmp_path, dataset(row(1), row(4, category_id=9)))
    assert dict(integers.category_names) == {3: "cup", 9: "9"}


def test_rules_decide_on_crowds(tmp_path: Path) -> None:
    raw = dataset(row(1, iscrowd=1))
    iscrowd = [json.loads(read(tmp_path, raw, rules).rows[0])[4] for rules in (RowRules(), RowRules(True))]
    assert iscrowd == [True, False]


def test_a_name_of_another_spelling_is_found_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.PNG").write_bytes(b"x")
    found = read(tmp_path, dataset(row(1), images=[{"id": 1, "file_name": "c:\\images\\A.png"}]))
    assert found.image_names.name_in_folder("c:\\images\\A.png") == "a.PNG"
