"""Sorting rows that need not fit into memory."""

import random
import tempfile
import tracemalloc
from pathlib import Path

import pytest

from mal_train.core import spill
from mal_train.core.errors import OutputError
from mal_train.core.spill import Spill


@pytest.mark.parametrize("memory_bytes", [0, 2_000, 1 << 20])
def test_rows_come_back_by_key_and_position(monkeypatch: pytest.MonkeyPatch, memory_bytes: int) -> None:
    monkeypatch.setattr(spill, "MEMORY_BYTES", memory_bytes)
    rows = [(n % 37, n // 37 - 1, f'"text {n} \\u00e9"') for n in range(500)]
    random.Random(1).shuffle(rows)
    with Spill(keys_per_bucket=10) as waiting:
        for row in rows:
            waiting.add(*row)
        assert list(waiting.sorted()) == sorted(rows)


def test_memory_is_bounded_and_the_file_has_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spill, "MEMORY_BYTES", 10_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Spill(keys_per_bucket=1) as waiting:
        for key in range(1000):
            waiting.add(key, 0, "x" * 100)
            assert sum(map(len, waiting._buckets.values())) <= 10_000 // 100
        assert list(tmp_path.iterdir()) == []
        assert sum(1 for _ in waiting.sorted()) == 1000


def test_a_bucket_of_any_size_is_read_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "MEMORY_BYTES", 100_000)
    with Spill(keys_per_bucket=4096) as waiting:
        for position in range(10):
            for key in range(4096):
                waiting.add(key, position, "x" * 100)
        tracemalloc.start()
        count = sum(1 for _ in waiting.sorted())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert count == 40_960
    # All rows take 11 MB as Python objects.
    assert peak < 2_000_000


def test_a_missing_temporary_folder_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spill, "MEMORY_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with Spill(keys_per_bucket=1) as waiting, pytest.raises(OutputError, match="TMPDIR"):
        waiting.add(0, 0, "x")
