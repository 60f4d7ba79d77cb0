"""The folder of the parts of a job: finished parts are kept, others removed, and other jobs refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.coco.parquet_parts import Part, divide
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_writer import write_part
from mal_train.core.coco.part_folder import PartCounts, PartFolder
from mal_train.core.coco.stream import write_coco
from mal_train.core.errors import BadDataset, ConfigError, OutputError

MANIFEST = {"input_sha256": "a" * 64, "part_boxes": 2}
# Of a version that did not count crowd regions.
COUNTS: dict[str, Any] = {"rows": 3, "labeled": 2, "failed": {"BAD_BOX": 1}}


@pytest.fixture
def dataset(tmp_path: Path) -> ParquetDataset:
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(6)]
    rows = [{"id": n, "image_id": n // 2, "category_id": 1, "bbox": [0, 0, 4, 4]} for n in range(12)]
    path = tmp_path / "in.parquet"
    write_coco(path, {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cup"}]})
    return ParquetDataset(path)


def write(folder: PartFolder, part: Part, dataset: ParquetDataset, *, is_noted: bool = True) -> None:
    rows = list(dataset.rows())[part.start : part.stop]
    write_part(folder.path / part.name, rows, dataset.head)
    if is_noted:
        folder.add(part.number, COUNTS)


def opened(folder: Path, dataset: ParquetDataset, manifest: dict[str, Any] | None = None, **options: Any) -> PartFolder:
    return PartFolder(folder, divide(dataset.row_groups, 4), manifest or MANIFEST, **options)


def test_a_later_run_keeps_noted_parts_and_removes_others(tmp_path: Path, dataset: ParquetDataset) -> None:
    with opened(tmp_path / "out.parquet", dataset) as folder:
        assert folder.missing() == list(folder.parts)
        write(folder, folder.parts[0], dataset)
        write(folder, folder.parts[1], dataset, is_noted=False)
    with opened(tmp_path / "out.parquet", dataset) as folder:
        assert [path.name for path in folder.path.iterdir()] == [folder.parts[0].name]
        assert folder.missing() == list(folder.parts[1:])
        assert folder.counts() == PartCounts(3, 2, Counter({"BAD_BOX": 1}), 0)


def test_a_part_whose_file_was_deleted_is_missing(tmp_path: Path, dataset: ParquetDataset) -> None:
    with opened(tmp_path / "out.parquet", dataset) as folder:
        write(folder, folder.parts[1], dataset)
    (folder.path / folder.parts[1].name).unlink()
    with opened(tmp_path / "out.parquet", dataset) as folder:
        assert folder.missing() == list(folder.parts)
        assert folder.counts() == PartCounts(0, 0, Counter(), 0)
        write(folder, folder.parts[1], dataset)
        assert folder.is_finished(folder.parts[1])


def test_another_job_is_refused_with_the_difference_until_restart(tmp_path: Path, dataset: ParquetDataset) -> None:
    with opened(tmp_path / "out.parquet", dataset) as folder:
        for part in folder.parts:
            write(folder, part, dataset)
    other = {**MANIFEST, "input_sha256": "b" * 64}
    with pytest.raises(ConfigError, match=f"input_sha256 '{'a' * 64}' instead of '{'b' * 64}'"):
        opened(tmp_path / "out.parquet", dataset, other)
    assert len(list(folder.path.iterdir())) == len(folder.parts)
    with opened(tmp_path / "out.parquet", dataset, other, restart=True) as folder:
        assert list(folder.path.iterdir()) == []
        assert folder.missing() == list(folder.parts)


def test_a_job_that_ended_before_its_first_part_keeps_no_other_out(tmp_path: Path, dataset: ParquetDataset) -> None:
    opened(tmp_path / "out.parquet", dataset).__exit__()
    other = {**MANIFEST, "part_boxes": 3}
    with opened(tmp_path / "out.parquet", dataset, other) as folder:
        write(folder, folder.parts[0], dataset, is_noted=False)
    with pytest.raises(ConfigError):
        opened(tmp_path / "out.parquet", dataset)
    with opened(tmp_path / "out.parquet", dataset, other) as folder:
        write(folder, folder.parts[0], dataset)
    (folder.path / folder.parts[0].name).unlink()
    with pytest.raises(ConfigError):
        opened(tmp_path / "out.parquet", dataset)


@pytest.mark.parametrize(("name", "restart"), [("part-000000000.parquet", False), ("labels.parquet", True)])
def test_files_of_another_origin_are_refused_and_kept(
    name: str, restart: bool, tmp_path: Path, dataset: ParquetDataset
) -> None:
    path = tmp_path / "out.parquet"
    path.mkdir()
    (path / name).write_bytes(b"of the user")
    with pytest.raises(ConfigError, match=name):
        opened(path, dataset, restart=restart)
    assert (path / name).read_bytes() == b"of the user"


@pytest.mark.parametrize("restart", [False, True])
def test_the_parts_of_shards_are_not_those_of_this_job(
    tmp_path: Path, dataset: ParquetDataset, *, restart: bool
) -> None:
    with opened(tmp_path / "out.parquet", dataset) as folder:
        shard = folder.path / "part-00000-of-00002.parquet"
        shard.write_bytes(b"labels")
    with pytest.raises(ConfigError):
        opened(tmp_path / "out.parquet", dataset, restart=restart)
    assert shard.read_bytes() == b"labels"


def test_parts_without_a_journal_are_discarded_only_by_restart(tmp_path: Path, dataset: ParquetDataset) -> None:
    path = tmp_path / "out.parquet"
    path.mkdir()
    (path / "part-000000000.parquet").write_bytes(b"of a job whose journal is lost")
    with opened(path, dataset, restart=True) as folder:
        assert list(folder.path.iterdir()) == []


@pytest.mark.parametrize("left", [b"", b"0badc0de", b'0badc0de {"input_sha'])
def test_parts_beside_a_journal_that_names_no_job_are_kept_until_restart(
    tmp_path: Path, dataset: ParquetDataset, left: bytes
) -> None:
    with opened(tmp_path / "out.parquet", dataset) as folder:
        write(folder, folder.parts[0], dataset)
    folder.journal.write_bytes(left)  # what a power cut may leave
    part = folder.path / folder.parts[0].name
    for _ in range(2):
        with pytest.raises(ConfigError):
            opened(tmp_path / "out.parquet", dataset)
        assert part.exists()
    with opened(tmp_path / "out.parquet", dataset, restart=True):
        assert not part.exists()


def test_two_runs_cannot_use_a_folder(tmp_path: Path, dataset: ParquetDataset) -> None:
    with opened(tmp_path / "out.parquet", dataset), pytest.raises(OutputError):
        opened(tmp_path / "out.parquet", dataset)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path, dataset: ParquetDataset) -> None:
    (tmp_path / "out.parquet").write_bytes(b"of the user")
    with pytest.raises(OutputError):
        opened(tmp_path / "out.parquet", dataset)


def test_a_missing_row_is_found_at_the_end(tmp_path: Path, dataset: ParquetDataset) -> None:
    with opened(tmp_path / "out.parquet", dataset) as folder:
        for part in folder.parts:
            write(folder, part, dataset)
        folder.check_complete(dataset)
        first = folder.parts[0]
        write_part(folder.path / first.name, list(dataset.rows())[first.start + 1 : first.stop], dataset.head)
        with pytest.raises(BadDataset):
            folder.check_complete(dataset)
