"""Files that are no checkpoint: called what they are, and no code in them runs."""

import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyrage
import pytest

from mal_train.core.errors import CheckpointError, UnknownLayout
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, read_header, sha256_of
from tests.mal_train.kernel.checkpoint.checkpoints import raw
from tests.mal_train.kernel.checkpoint.key_pair import OPENS, SEALS


def _pickle(folder: Path, protocol: bytes) -> bytes:
    """A pickle that makes a file named canary when somebody loads it (opcodes by hand: os.mkdir(path))."""
    return protocol + b"cos\nmkdir\n(V" + str(folder / "canary").encode() + b"\ntR."


def _zipped(folder: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle(folder, b"\x80\x02"))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def _tarred(folder: Path) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("pickle", "storages", "tensors", "sys_info"):
            data = _pickle(folder, b"\x80\x02")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


CANARIES: dict[str, Callable[[Path], bytes]] = {
    "pickle, protocol 0": lambda folder: _pickle(folder, b""),
    "pickle, protocol 2": lambda folder: _pickle(folder, b"\x80\x02"),
    "pickle, protocol 4": lambda folder: _pickle(folder, b"\x80\x04"),
    "torch's older file": lambda folder: b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + _pickle(folder, b"\x80\x02"),
    "zip": _zipped,
    "tar": _tarred,
}


@pytest.mark.parametrize("make", CANARIES.values(), ids=CANARIES)
@pytest.mark.parametrize("inside", [False, True], ids=["bare", "sealed"])
def test_file_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, make: Callable[[Path], bytes], inside: bool
) -> None:
    data = make(tmp_path)
    (tmp_path / "a.malckpt").write_bytes(pyrage.encrypt(data, list(SEALS.recipients)) if inside else data)
    for read in (load_checkpoint, read_header):
        with pytest.raises(UnknownLayout):
            read(tmp_path / "a.malckpt", OPENS if inside else None)
    assert not (tmp_path / "canary").exists()


def test_canary_would_have_shown(tmp_path: Path) -> None:
    """The payload of the test above works: loaded the dangerous way, it leaves its mark."""
    (tmp_path / "p").write_bytes(_pickle(tmp_path, b"\x80\x02"))
    load = "import importlib, sys; importlib.import_module('pic' + 'kle').load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", load, str(tmp_path / "p")], check=True)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello, world, this is text\n", "not a checkpoint of this project"),
        (b"-----BEGIN AGE ENCRYPTED FILE-----\n", "armored age file"),
        (raw({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}), "without a schema"),
    ],
)
def test_foreign_file_is_called_what_it_is(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UnknownLayout, match=message):
        load_checkpoint(tmp_path / "a", None)


def test_missing_file_and_folder_are_checkpoint_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(path, None)
        with pytest.raises(CheckpointError, match="cannot be read"):
            sha256_of(path)
