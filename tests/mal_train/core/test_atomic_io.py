"""Claims about files that are written atomically."""

import errno
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mal_train.core import atomic_io, locked_file
from mal_train.core.atomic_io import atomic_write, check_writable, remedy_of, remove_stale_temporaries, write_text
from mal_train.core.errors import OutputError

ACCESS = "system.posix_acl_access"


def access_list(*entries: tuple[int, int, int | None]) -> bytes:
    """Returns an access list of (tag, permission bits, user or group) in the form of linux/posix_acl_xattr.h."""
    undefined = 0xFFFFFFFF
    packed = (struct.pack("<HHI", tag, bits, undefined if name is None else name) for tag, bits, name in entries)
    return struct.pack("<I", 2) + b"".join(packed)


def set_access_list(path: Path, name: str, entries: bytes) -> None:
    try:
        os.setxattr(path, name, entries)
    except OSError as error:
        pytest.skip(f"no access lists here: {error.strerror}")


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


def mode_of(path: Path) -> int:
    """Returns the permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


class TestAccess:
    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o444])
    def test_a_replaced_file_keeps_its_permissions(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        path.chmod(mode)
        with atomic_write(path) as file:
            file.write(b"new")
            written = [mode_of(entry) for entry in tmp_path.iterdir()]
        assert written == [mode, mode]
        assert (path.read_text(), mode_of(path)) == ("new", mode)

    def test_bits_that_run_a_file_as_its_owner_are_not_handed_on(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        path.chmod(0o4755)
        write_text(path, "new")
        assert mode_of(path) == 0o755

    def test_a_new_file_may_be_private_from_its_first_byte(self, tmp_path: Path) -> None:
        with atomic_write(tmp_path / "file", mode=0o600) as file:
            file.write(b"secret")
            assert [mode_of(entry) for entry in tmp_path.iterdir()] == [0o600]
        assert mode_of(tmp_path / "file") == 0o600

    def test_the_bits_of_a_group_are_not_given_to_another_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        path.chmod(0o640)
        old = list(path.lstat())
        old[stat.ST_GID] += 1

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(atomic_io, "_replaceable", lambda _: os.stat_result(old))
        monkeypatch.setattr(os, "fchown", refuse)
        write_text(path, "new")
        assert mode_of(path) == 0o600

    @pytest.mark.skipif(not hasattr(os, "setxattr"), reason="only Linux has these access lists")
    def test_a_replaced_file_keeps_its_access_list(self, tmp_path: Path) -> None:
        # The owner and user 1234 may write; the group may nothing, although the permission bits show rw- for it.
        path, access = (
            tmp_path / "file",
            access_list((1, 6, None), (2, 6, 1234), (4, 0, None), (16, 6, None), (32, 0, None)),
        )
        path.write_text("old")
        set_access_list(path, ACCESS, access)
        assert mode_of(path) == 0o660
        write_text(path, "new")
        assert (mode_of(path), os.getxattr(path, ACCESS)) == (0o660, access)

    @pytest.mark.skipif(not hasattr(os, "setxattr"), reason="only Linux has these access lists")
    def test_the_access_list_of_a_folder_gives_no_more_than_the_replaced_file(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        path.chmod(0o640)
        entries = access_list((1, 6, None), (2, 6, 1234), (4, 0, None), (16, 6, None), (32, 0, None))
        set_access_list(tmp_path, "system.posix_acl_default", entries)
        write_text(path, "new")
        assert mode_of(path) == 0o640
        with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
            os.getxattr(path, ACCESS)


class TestPlaces:
    @pytest.mark.parametrize("name", ["x" * 255, "é" * 125 + ".json"])
    def test_every_name_that_the_file_system_takes_is_written(self, tmp_path: Path, name: str) -> None:
        with atomic_write(tmp_path / name) as file:
            file.write(b"first")
            write_text(tmp_path / name, "second")
        assert (tmp_path / name).read_text() == "first"
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_a_link_is_refused_and_its_target_unchanged(self, tmp_path: Path) -> None:
        victim, link = tmp_path / "victim", tmp_path / "link"
        victim.write_text("victim")
        link.symlink_to(victim)
        with pytest.raises(OutputError, match="link"):
            write_text(link, "new")
        with pytest.raises(OutputError, match="link"):
            check_writable(link)
        assert victim.read_text() == "victim"
        assert sorted(tmp_path.iterdir()) == [link, victim]

    def test_a_link_that_appears_during_the_write_is_replaced_and_not_followed(self, tmp_path: Path) -> None:
        victim, path = tmp_path / "victim", tmp_path / "path"
        victim.write_text("victim")
        with atomic_write(path) as file:
            path.symlink_to(victim)
            file.write(b"new")
        assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("victim", "new", False)

    def test_a_temporary_name_that_is_a_link_is_not_followed(self, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_text("victim")
        (tmp_path / f".file{atomic_io.TEMPORARY_SUFFIX}").symlink_to(victim)
        write_text(tmp_path / "file", "new")
        assert (victim.read_text(), (tmp_path / "file").read_text()) == ("victim", "new")

    def test_a_linked_folder_is_followed(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "folder").symlink_to("real")
        write_text(tmp_path / "folder" / "file", "new")
        assert (tmp_path / "real" / "file").read_text() == "new"

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_only_regular_files_are_replaced(self, tmp_path: Path, make: Any) -> None:
        make(tmp_path / "file")
        before = (tmp_path / "file").lstat()
        with pytest.raises(OutputError):
            write_text(tmp_path / "file", "new")
        with pytest.raises(OutputError):
            check_writable(tmp_path / "file")
        assert (tmp_path / "file").lstat() == before

    def test_an_existing_file_is_kept_where_overwriting_was_not_asked_for(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with atomic_write(path, overwrite=False) as file:
            file.write(b"first")
        with pytest.raises(OutputError, match="already exists"), atomic_write(path, overwrite=False):
            pass
        assert path.read_text() == "first"

    @pytest.mark.parametrize("has_links", [True, False])
    def test_a_file_that_appears_during_the_write_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_links: bool
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        if not has_links:
            monkeypatch.setattr(os, "link", refuse)
        path = tmp_path / "file"
        with pytest.raises(OutputError, match="already exists"), atomic_write(path, overwrite=False):
            path.write_text("early")
        assert path.read_text() == "early"
        assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from mal_train.core.atomic_io import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


class TestLeftovers:
    @staticmethod
    def kill_a_write(path: Path) -> None:
        assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode < 0

    def test_the_next_write_of_a_file_removes_what_a_killed_one_left(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        for _ in range(2):
            self.kill_a_write(path)
            assert len(list(tmp_path.iterdir())) == 1
        write_text(path, "new")
        assert list(tmp_path.iterdir()) == [path]

    def test_a_cleanup_removes_all_leftovers_and_nothing_else(self, tmp_path: Path) -> None:
        self.kill_a_write(tmp_path / "killed")
        others = [tmp_path / ".other.tmp", tmp_path / f"visible{atomic_io.TEMPORARY_SUFFIX}", tmp_path / "file"]
        for path in others:
            path.touch()
        with atomic_write(tmp_path / "running") as file:
            file.write(b"running")
            remove_stale_temporaries(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "running"])
        remove_stale_temporaries(tmp_path / "missing")

    def test_two_writes_of_one_file_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with atomic_write(path) as first:
            first.write(b"first")
            write_text(path, "second")
            assert path.read_text() == "second"
        assert path.read_text() == "first"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_write_survives_a_cleanup_before_its_lock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lock = locked_file.try_lock

        def clean_up_first(descriptor: int) -> bool:
            monkeypatch.setattr(atomic_io, "try_lock", lock)
            remove_stale_temporaries(tmp_path)
            return lock(descriptor)

        monkeypatch.setattr(atomic_io, "try_lock", clean_up_first)
        write_text(tmp_path / "file", "new")
        assert (tmp_path / "file").read_text() == "new"
