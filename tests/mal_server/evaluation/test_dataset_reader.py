"""Annotation files below the server's data folders."""

from collections.abc import Callable
from pathlib import Path

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
