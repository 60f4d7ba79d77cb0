"""Claims about files that are written atomically."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.atomic_io import remedy_of, write_text
from mal_train.core.errors import OutputError


def refuse_folder_sync(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Lets fsync of a folder fail."""
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_gets_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_folder_sync(monkeypatch, number)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_another_error_of_the_folder_sync_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_folder_sync(monkeypatch, errno.EIO)
    with pytest.raises(OutputError, match="file: .*" + os.strerror(errno.EIO)):
        write_text(tmp_path / "file", "new")


@pytest.mark.parametrize(("number", "is_written"), [(errno.EACCES, True), (errno.EMFILE, False)])
def test_a_folder_may_be_unreadable_but_no_other_error_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, is_written: bool
) -> None:
    # Root reads every folder, so that permission bits alone prove nothing here.
    open_file = os.open

    def fail_on_folder(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if path == tmp_path:
            raise OSError(number, os.strerror(number), str(path))
        return open_file(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", fail_on_folder)
    if not is_written:
        with pytest.raises(OutputError):
            write_text(tmp_path / "file", "new")
        return
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_each_cause_of_a_failed_write_has_its_own_remedy() -> None:
    causes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOENT, errno.EACCES)
    assert len({remedy_of(OSError(number, "")) for number in causes}) == len(causes)
