"""Claims about the client on systems without the POSIX modules `fcntl` and `resource`, such as Windows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mal_client.dataset.journal import journal_path
from mal_client.dataset.shards import Shard

from mal_train.core import locked_file
from mal_train.core.errors import OutputError
from mal_train.core.locked_file import LockedFile
from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, serving

WITHOUT_POSIX = """
import os, sys
sys.modules.update(fcntl=None, resource=None)
for name in ("pread", "pwrite", "O_CLOEXEC", "O_DIRECTORY"):
    delattr(os, name)
from mal_client.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs mal-client in a process without the POSIX modules."""
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )


def label(address: str, dataset: Dataset, *more: str) -> "subprocess.CompletedProcess[str]":
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    return run("label", "--server", address, *given, "--output", str(dataset.output), *more)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path)


def test_a_coco_file_is_labeled_without_fcntl_and_resource(dataset: Dataset) -> None:
    with serving(FakeServer()) as address:
        done = label(address, dataset)
    assert done.returncode == 0, done.stderr
    assert all(row["area"] for row in dataset.labeled().values())
    assert sorted(path.name for path in dataset.folder.iterdir()) == ["images", "in.json", "out.json"]


def test_an_unfinished_run_resumes_without_fcntl_and_resource(dataset: Dataset) -> None:
    with serving(FakeServer(Faults(kill_after=2))) as address:
        assert label(address, dataset).returncode == 3
    fake = FakeServer()
    with serving(fake) as address:
        done = label(address, dataset)
    assert done.returncode == 0, done.stderr
    assert fake.item_ids == ["2"]


def test_shards_are_merged_without_fcntl_and_resource(dataset: Dataset) -> None:
    with serving(FakeServer()) as address:
        for shard in ("0/2", "1/2"):
            assert label(address, dataset, "--shard", shard).returncode == 0
    given = ["--annotations", str(dataset.json_path), "--output", str(dataset.output)]
    done = run("merge", *given, "--shards", "2")
    assert done.returncode == 0, done.stderr
    assert len(dataset.labeled()) == 6
    assert not Shard(0, 2).journal_path(dataset.output).exists()


def test_boxes_are_converted_checked_and_reviewed_without_fcntl_and_resource(dataset: Dataset) -> None:
    images = str(dataset.images_dir)
    boxes = dataset.folder / "boxes.csv"
    boxes.write_text("filename,xmin,ymin,xmax,ymax,class\nimage_0.png,1,2,11,22,cup\n")
    done = run(
        "convert", "--from", "csv", "--labels", str(boxes), "--images", images, "--output", str(dataset.json_path)
    )
    assert done.returncode == 0, done.stderr
    done = run("check", "--annotations", str(dataset.json_path), "--images", images)
    assert "image_0.png" not in done.stderr
    assert "Traceback" not in done.stderr
    with serving(FakeServer()) as address:
        assert label(address, dataset).returncode == 0
    queue = dataset.folder / "queue.json"
    page = dataset.folder / "queue.html"
    done = run(
        *("review", "--annotations", str(dataset.output), "--images", images),
        *("--output", str(queue), "--report", str(page)),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(queue.read_text())
    assert page.stat().st_size > 0


class FakeMsvcrt(SimpleNamespace):
    """Locks bytes of files within this process, as Windows does between processes."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self) -> None:
        super().__init__()
        self._locked: set[tuple[int, int, int]] = set()

    def locking(self, file: int, mode: int, count: int) -> None:
        assert count == 1
        status = os.fstat(file)
        key = (status.st_dev, status.st_ino, os.lseek(file, 0, os.SEEK_CUR))
        if mode == self.LK_UNLCK:
            self._locked.remove(key)
        elif key in self._locked:
            raise PermissionError(13, "Permission denied")
        else:
            self._locked.add(key)


@pytest.fixture(params=["fcntl", "msvcrt", "lock file"])
def lock_module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Locks by one of the three ways."""
    way: str = request.param
    if way != "fcntl":
        monkeypatch.setattr(locked_file, "fcntl", None)
        monkeypatch.setattr(locked_file, "msvcrt", FakeMsvcrt() if way == "msvcrt" else None)
    return way


@pytest.mark.usefixtures("lock_module")
def test_a_file_is_held_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with LockedFile(path) as file:
        file.write_at(0, b"abcdef")
        with pytest.raises(OutputError, match="in use here"):
            LockedFile(path, in_use="in use here")
        assert file.read_at(2, 3) == b"cde"
        assert file.size == 6
    with LockedFile(path) as file:
        file.write_at(file.size, b"\ng")
        assert list(file.lines()) == [b"abcdef\n", b"g"]
        file.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_file_that_a_killed_run_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locked_file, "fcntl", None)
    monkeypatch.setattr(locked_file, "msvcrt", None)
    path = journal_path(tmp_path / "out.json")
    stale = tmp_path / f"{path.name}.lock"
    stale.touch()
    with pytest.raises(OutputError, match=str(stale)):
        LockedFile(path)


def test_a_file_that_cannot_be_deleted_while_open_is_deleted_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    unlink = Path.unlink

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "The process cannot access the file because it is being used by another process")

    file = LockedFile(path)
    monkeypatch.setattr(locked_file, "IS_WINDOWS", True)
    monkeypatch.setattr(Path, "unlink", refuse)
    file.remove()
    monkeypatch.setattr(Path, "unlink", unlink)
    assert path.exists()
    file.close()
    assert not path.exists()
