"""Claims about files that one process at a time may change."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mal_train.core import locked_file
from mal_train.core.errors import OutputError
from mal_train.core.locked_file import LockedFile


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
    path = tmp_path / "file"
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


def test_a_link_is_refused_and_its_target_unchanged(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="link"):
        LockedFile(tmp_path / "link")
    assert not (tmp_path / "victim").exists()


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="pipe"):
        LockedFile(tmp_path / "pipe")
