"""Objects in a real S3 server on loopback: slow, missing, changed, refused, broken, too large; reads and writes."""

import errno
import logging
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from mal_train.core.errors import BadDataset, BadImage, ConfigError, OutputError, StorageError, StoreUnreachable
from mal_train.core.proxies import exempt_this_machine
from mal_train.core.storage import object_store, reading
from mal_train.core.storage.listing import local_folder
from mal_train.core.storage.reading import local_copy, open_random, read_bytes
from mal_train.core.storage.retry import ATTEMPTS
from mal_train.core.storage.writing import (
    StagedOutput,
    check_writable,
    staged_folder,
    staged_output,
    write_output,
)
from mal_train.distributed.launch import free_port
from tests.mal_train.core.storage.test_web import files_of_at_most
from tests.object_store import S3, SECRET_KEY
from tests.proxy import recording_proxy

LIMIT = 1000


def reason_of(address: str, max_bytes: int = LIMIT) -> str:
    with pytest.raises(StorageError) as caught:
        read_bytes(address, max_bytes)
    assert SECRET_KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value.reason


def test_a_store_on_this_machine_is_reached_directly(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("a.jpg", b"pixels")
    with recording_proxy() as proxy:
        for variable in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        for variable in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(variable, "other.example")
        exempt_this_machine()  # as every command does
        assert read_bytes(s3.address("a.jpg"), 100) == b"pixels"
        assert proxy.requests == []


def test_object_is_read_by_one_request(s3: S3) -> None:
    s3.put("a b/ü.jpg", b"pixels")
    assert read_bytes(s3.address("a b/ü.jpg"), LIMIT) == b"pixels"
    assert s3.requests == ["GET a b/ü.jpg"]


def test_empty_object_and_object_of_the_limit(s3: S3) -> None:
    s3.put("empty", b"")
    s3.put("full", bytes(LIMIT))
    assert read_bytes(s3.address("empty"), LIMIT) == b""
    assert read_bytes(s3.address("full"), LIMIT) == bytes(LIMIT)


def test_object_above_the_limit_is_not_downloaded(s3: S3) -> None:
    s3.put("large", bytes(LIMIT + 1))
    assert reason_of(s3.address("large")) == "TOO_LARGE"
    assert reason_of(s3.address("large"), 0) == "TOO_LARGE"


def test_missing_object_and_missing_bucket(s3: S3) -> None:
    assert reason_of(s3.address("nothing")) == "NOT_FOUND"
    assert reason_of("s3://no-such-bucket/a.jpg") == "BUCKET_NOT_FOUND"
    with pytest.raises(StorageError) as caught, local_copy("s3://no-such-bucket/a.json"):
        pass
    assert caught.value.reason == "BUCKET_NOT_FOUND"


def test_wrong_credentials(s3: S3) -> None:
    s3.put("a", b"x")
    s3.require_credentials()
    assert reason_of(s3.address("a")) == "CREDENTIALS_REFUSED"
    with pytest.raises(OutputError):
        check_writable(s3.address("out.json"))


def test_no_credentials(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert reason_of(s3.address("a")) == "NO_CREDENTIALS"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("AccessDenied", "ACCESS_DENIED"),
        ("ExpiredToken", "CREDENTIALS_REFUSED"),
        ("SignatureDoesNotMatch", "CREDENTIALS_REFUSED"),
    ],
)
def test_refused_object(s3: S3, code: str, reason: str) -> None:
    s3.fail("a", status=403, code=code)
    assert reason_of(s3.address("a")) == reason
    assert len(s3.requests) == 1


def test_busy_store_is_asked_again(s3: S3) -> None:
    s3.put("a", b"x")
    s3.fail("a", status=503, code="SlowDown", times=ATTEMPTS - 1)
    assert read_bytes(s3.address("a"), LIMIT) == b"x"
    assert len(s3.requests) == ATTEMPTS


def test_store_that_stays_busy_is_unreachable(s3: S3) -> None:
    s3.fail("a", status=503, code="SlowDown")
    with pytest.raises(StoreUnreachable):
        read_bytes(s3.address("a"), LIMIT)
    assert len(s3.requests) == ATTEMPTS


def test_broken_connection_is_repeated(s3: S3) -> None:
    s3.put("a", b"0123456789")
    s3.cut("a", times=2)
    assert read_bytes(s3.address("a"), LIMIT) == b"0123456789"


def test_store_that_is_not_there(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StoreUnreachable):
        read_bytes(s3.address("a"), LIMIT)
    with pytest.raises(OutputError):
        check_writable(s3.address("a"))


def test_slow_store_times_out(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store.S3Store, "attempts", 2)
    monkeypatch.setitem(object_store.S3Store.options["config_kwargs"], "read_timeout", 0.2)
    s3.put("a", b"x")
    s3.delay("a", 2.0)
    with pytest.raises(StoreUnreachable):
        read_bytes(s3.address("a"), LIMIT)
    assert len(s3.requests) == 2


def test_local_copy_is_private_and_removed(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(reading, "BLOCK_BYTES", 7)
    content = os.urandom(100)
    s3.put("boxes.json", content)
    with local_copy(s3.address("boxes.json")) as path:
        assert path.read_bytes() == content
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_copy_of_a_killed_process_is_removed(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / ".boxes.json.k1ll3d.mal-tmp").write_bytes(b"part of a file")
    s3.put("boxes.json", b"x")
    with local_copy(s3.address("boxes.json")) as first, local_copy(s3.address("boxes.json")) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second])


def test_local_copy_of_an_object_that_changes(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(reading, "BLOCK_BYTES", 10)
    s3.put("boxes.json", b"a" * 30)
    s3.before("boxes.json", lambda: s3.put("boxes.json", b"b" * 30), skip=1)
    with pytest.raises(StorageError) as caught, local_copy(s3.address("boxes.json")):
        pass
    assert caught.value.reason == "CHANGED"
    assert list(tmp_path.iterdir()) == []


def test_local_copy_has_limits(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("boxes.json", bytes(100))
    with pytest.raises(StorageError) as caught, local_copy(s3.address("boxes.json"), max_bytes=99):
        pass
    assert caught.value.reason == "TOO_LARGE"
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(99))
    with pytest.raises(OutputError), local_copy(s3.address("boxes.json")):
        pass


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_error_in_the_block_names_the_address(s3: S3) -> None:
    s3.put("boxes.json", b"no JSON")
    with pytest.raises(BadDataset) as caught, local_copy(s3.address("boxes.json")) as path:
        raise BadDataset(f"{path}: not JSON")
    assert str(caught.value) == "s3://photos/boxes.json: not JSON"


def test_local_path_is_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"x")
    with local_copy(str(path)) as copy:
        assert copy == path
    assert path.exists()
    assert read_bytes(path, LIMIT) == b"x"
    with pytest.raises(StorageError) as caught:
        read_bytes(path, 0)
    assert caught.value.reason == "TOO_LARGE"
    with open_random(path) as file:
        assert file.read() == b"x"


def test_random_access_reads_ranges_of_one_version(s3: S3) -> None:
    content = os.urandom(1000)
    s3.put("a.parquet", content)
    with open_random(s3.address("a.parquet")) as file:
        assert file.seekable()
        assert file.seek(-10, os.SEEK_END) == 990
        assert file.read(20) == content[990:]
        file.seek(100)
        assert file.read(50) == content[100:150]
        assert file.tell() == 150
        buffer = bytearray(8)
        assert file.readinto(buffer) == 8  # type: ignore[attr-defined]
        assert buffer == content[150:158]
        assert file.read() == content[158:]
        assert file.read() == b""
        s3.put("a.parquet", os.urandom(1000))
        file.seek(0)
        with pytest.raises(StorageError) as caught:
            file.read(10)
    assert caught.value.reason == "CHANGED"


def test_random_access_to_nothing(s3: S3) -> None:
    with pytest.raises(StorageError) as caught:
        open_random(s3.address("nothing.parquet"))
    assert caught.value.reason == "NOT_FOUND"


def test_output_appears_whole(s3: S3) -> None:
    with write_output(s3.address("out.json")) as file:
        file.write(b"{}")
        assert s3.names() == []
    assert s3.get("out.json") == b"{}"


def test_failed_output_leaves_the_old_one(s3: S3) -> None:
    s3.put("out.json", b"old")
    with pytest.raises(ZeroDivisionError), write_output(s3.address("out.json")) as file:
        file.write(bytes([1 // 0]))
    assert s3.get("out.json") == b"old"
    s3.fail("out.json", status=403, code="AccessDenied", method="PUT")
    with pytest.raises(OutputError), write_output(s3.address("out.json")) as file:
        file.write(b"new")
    assert s3.get("out.json") == b"old"


def test_large_output_in_parts_is_whole_or_nothing(s3: S3) -> None:
    size = 101 * 1024 * 1024
    with write_output(s3.address("large")) as file:
        file.truncate(size)
    assert len(s3.get("large") or b"") == size
    s3.fail("large", status=403, code="AccessDenied", method="PUT")
    with pytest.raises(OutputError), write_output(s3.address("large")) as file:
        file.truncate(size)
    assert s3.unfinished_uploads() == 0


def test_busy_store_gets_the_output_again(s3: S3) -> None:
    s3.fail("out.json", status=503, code="SlowDown", method="PUT", times=2)
    with write_output(s3.address("out.json")) as file:
        file.write(b"x")
    assert s3.get("out.json") == b"x"


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_a_full_disk_is_an_error_of_the_output(s3: S3, size: int) -> None:
    with files_of_at_most(500), pytest.raises(OutputError) as caught, write_output(s3.address("out.json")) as file:
        file.write(bytes(size))
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert s3.names() == []


def test_writable_is_checked_without_a_trace(s3: S3) -> None:
    s3.fail("out.json", status=503, code="SlowDown", method="DELETE", times=2)
    check_writable(s3.address("out.json"))
    assert s3.names() == []
    assert s3.unfinished_uploads() == 0
    with pytest.raises(OutputError):
        check_writable("s3://no-such-bucket/out.json")


def test_staged_output_publishes_the_main_file_last(s3: S3) -> None:
    s3.put("out/a.errors.jsonl", b"of an earlier run")
    s3.put("out/a.masks/1.png", b"old")
    s3.put("out/a.masks/7.png", b"not written this time")
    with staged_output(s3.address("out/a.json"), ["a.errors.jsonl", "a.masks"]) as path:
        path.write_bytes(b"main")
        path.with_name("a.masks").mkdir()
        path.with_name("a.masks").joinpath("1.png").write_bytes(b"new")
    assert s3.names() == ["out/a.json", "out/a.masks/1.png", "out/a.masks/7.png"]
    assert s3.get("out/a.masks/1.png") == b"new"
    assert [line for line in s3.requests if line.startswith("PUT")][-1] == "PUT out/a.json"
    assert not path.parent.exists()


def test_staged_files_stay_when_publishing_fails(s3: S3, tmp_path: Path) -> None:
    staged = StagedOutput(s3.address("out.json"), tmp_path / "out.json")
    staged.path.write_bytes(b"x")
    s3.fail("out.json", status=403, code="AccessDenied", times=1)
    with pytest.raises(OutputError):
        staged.publish()
    assert staged.path.read_bytes() == b"x"
    staged.publish()
    assert s3.get("out.json") == b"x"
    assert not staged.path.exists()


def test_folder_is_uploaded_file_by_file(s3: S3) -> None:
    with staged_folder(s3.address("export")) as folder:
        (folder / "labels").mkdir()
        (folder / "labels" / "a.txt").write_bytes(b"1")
        (folder / "data.yaml").write_bytes(b"2")
    assert s3.names() == ["export/data.yaml", "export/labels/a.txt"]


def test_names_below_a_prefix(s3: S3) -> None:
    for key in ("images/b.jpg", "images/x/a.jpg", "images2/c.jpg", "other.jpg"):
        s3.put(key, b"x")
    assert list(reading.store_of(s3.address("images")).names(s3.address("images"))) == ["b.jpg", "x/a.jpg"]
    assert list(reading.store_of(s3.address("images")).names(s3.address("images/b.jpg"))) == []


def test_local_folder_holds_the_files_below_a_prefix(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for key in ("labels/a.txt", "labels/deeper/b.txt", "labels/c.xml"):
        s3.put(key, key.encode())
    with local_folder(s3.address("labels"), (".txt",), LIMIT) as folder:
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert found == {"a.txt": b"labels/a.txt", "deeper/b.txt": b"labels/deeper/b.txt"}
    s3.put("labels/../../evil.txt", b"x")
    with pytest.raises((BadImage, StorageError)), local_folder(s3.address("labels"), (".txt",), LIMIT):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a.txt", "a.txt/b.txt"], [f"{'x' * 300}.txt"]])
def test_names_that_no_local_folder_can_hold_are_one_error(s3: S3, names: list[str]) -> None:
    for name in names:
        s3.put(f"labels/{name}", b"x")
    with pytest.raises(OutputError), local_folder(s3.address("labels"), (".txt",), LIMIT):
        pass


def test_a_long_name_is_shortened_for_the_copy(s3: S3) -> None:
    name = "字" * 100 + ".json"
    s3.put(name, b"{}")
    with local_copy(s3.address(name)) as path:
        assert path.read_bytes() == b"{}"


def test_a_missing_temporary_folder_is_one_error(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("a.json", b"{}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    for block in (local_copy(s3.address("a.json")), local_folder(s3.address("a"), (".txt",), LIMIT)):
        with pytest.raises(OutputError), block:
            pass
    with pytest.raises(OutputError), staged_output(s3.address("b.json")):
        pass


def test_no_secret_in_debug_logs(s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    s3.put("a", b"x")
    read_bytes(s3.address("a"), LIMIT)
    s3.fail("b", status=503)
    with pytest.raises(StoreUnreachable):
        read_bytes(s3.address("b"), LIMIT)
    assert SECRET_KEY not in caplog.text


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsspec", "fsspec.asyn"):
        monkeypatch.setitem(sys.modules, name, None)
    for address in ("s3://b/k", "https://h/p"):
        with pytest.raises(ConfigError):
            read_bytes(address, LIMIT)


def test_forked_process_makes_its_own_connections(s3: S3) -> None:
    s3.put("a", b"x")
    assert read_bytes(s3.address("a"), LIMIT) == b"x"
    child = os.fork()
    if child == 0:
        os._exit(0 if read_bytes(s3.address("a"), LIMIT) == b"x" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
