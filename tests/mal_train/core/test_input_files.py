"""Text files as users bring them: byte order marks, UTF-16, gzip, and damage that is one error."""

import errno
import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from mal_train.core.input_files import decode_text, open_text, read_text

TEXT = "bed,lægte,床\r\nsecond\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_unicode_text_is_read_with_and_without_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    data = TEXT.encode(encoding)
    (tmp_path / "plain").write_bytes(data)
    (tmp_path / "zipped").write_bytes(gzip.compress(data))
    for name in ("plain", "zipped"):
        assert read_text(tmp_path / name, 1000) == TEXT
        with open_text(tmp_path / name) as file:
            assert list(file) == TEXT.splitlines(keepends=True)


def test_other_encodings_are_given_and_a_byte_order_mark_wins(tmp_path: Path) -> None:
    assert decode_text("床".encode("gbk"), "gbk") == "床"
    assert decode_text("床".encode("utf-8-sig"), "gbk") == "床"
    (tmp_path / "latin").write_bytes(TEXT.replace("床", "").encode("latin-1"))
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "latin", 1000)
    assert read_text(tmp_path / "latin", 1000, "latin-1") == TEXT.replace("床", "")
    with pytest.raises(LookupError):
        decode_text(b"a", "nothing")


def test_an_empty_file_is_empty_text(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert read_text(tmp_path / "empty", 1000) == ""
    with open_text(tmp_path / "empty") as file:
        assert list(file) == []


def test_a_size_limit_counts_the_decompressed_text(tmp_path: Path) -> None:
    (tmp_path / "zipped").write_bytes(gzip.compress(b"0" * 10_000_000))
    with pytest.raises(OSError, match=str(errno.EFBIG)):
        read_text(tmp_path / "zipped", 1000)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:20] + b"\xff" * 8 + data[28:], lambda data: data[:3]]
)
def test_damage_of_a_gzip_file_is_an_error_of_reading(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "zipped").write_bytes(damage(gzip.compress(TEXT.encode() * 50)))
    with pytest.raises(OSError, match="gzip"):
        read_text(tmp_path / "zipped", 10_000)
    with pytest.raises(OSError, match="gzip"), open_text(tmp_path / "zipped") as file:
        list(file)
