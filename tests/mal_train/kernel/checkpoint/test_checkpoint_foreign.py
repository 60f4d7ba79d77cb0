"""Files of other formats are refused by name, and no code in them runs."""

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
from tests.mal_train.kernel.checkpoint.key_pair import DECRYPTION_KEY, ENCRYPTION_KEY


def _pickle(folder: Path, protocol: bytes) -> bytes:
    """Returns a pickle that creates a folder `canary` when it is loaded (opcodes by hand: os.mkdir(path))."""
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


@pytest.mark.promise("checkpoints", "No checkpoint runs code, in any format that could")
@pytest.mark.parametrize("make", CANARIES.values(), ids=CANARIES)
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_file_that_could_run_code_is_refused_and_runs_none(
    tmp_path: Path, make: Callable[[Path], bytes], encrypted: bool
) -> None:
    data = make(tmp_path)
    (tmp_path / "a.malckpt").write_bytes(pyrage.encrypt(data, list(ENCRYPTION_KEY.recipients)) if encrypted else data)
    for read in (load_checkpoint, read_header):
        with pytest.raises(UnknownLayout):
            read(tmp_path / "a.malckpt", DECRYPTION_KEY if encrypted else None)
    assert not (tmp_path / "canary").exists()


def test_the_canary_works_when_it_is_unpickled(tmp_path: Path) -> None:
    """Proves that the payload of the test above runs when it is unpickled."""
    (tmp_path / "p").write_bytes(_pickle(tmp_path, b"\x80\x02"))
    load = "import importlib, sys; importlib.import_module('pic' + 'kle').load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", load, str(tmp_path / "p")], check=True)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"hello, world, this is text\n", "safetensors"),
        (b"-----BEGIN AGE ENCRYPTED FILE-----\n", "armored"),
        (raw({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}), "schema"),
    ],
)
def test_the_error_names_the_format_of_a_foreign_file(tmp_path: Path, data: bytes, named: str) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UnknownLayout, match=named):
        load_checkpoint(tmp_path / "a", None)


def test_missing_file_and_folder_are_checkpoint_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            load_checkpoint(path, None)
        with pytest.raises(CheckpointError, match=str(path)):
            sha256_of(path)
