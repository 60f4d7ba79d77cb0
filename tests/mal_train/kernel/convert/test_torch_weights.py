"""Weight files of other programs: damaged, encrypted and pickled ones raise an error and run no code."""

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mal_train.core.errors import ConfigError, UnknownLayout
from mal_train.kernel.checkpoint.trust import TrustPolicy
from mal_train.kernel.convert.torch_weights import read_weight_file


class HyperParameters:
    """An object that torch.save pickles by its class, like hyper-parameter objects in old checkpoints."""


def test_safetensors_and_torch_files_give_the_same_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert torch.equal(read_weight_file(tmp_path / name)["a"], tensors["a"])


def test_entries_other_than_tensors_are_ignored(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1), "version": 3}}, tmp_path / "a.pt")
    assert list(read_weight_file(tmp_path / "a.pt")) == ["a"]


@pytest.mark.parametrize("is_pinned", [False, True])
def test_the_error_of_pickled_objects_names_them_and_the_remedy(is_pinned: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": HyperParameters()}, path)
    trust = TrustPolicy(sha256=(hashlib.sha256(path.read_bytes()).hexdigest(),) if is_pinned else ())
    with pytest.raises(UnknownLayout, match=r"HyperParameters.*state_dict") as caught:
        read_weight_file(path, trust)
    assert "weights_only" not in str(caught.value)


def test_a_file_encrypted_by_tao_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": 1}, "state_dict_encrypted": "cipher"}, tmp_path / "a.pth")
    with pytest.raises(UnknownLayout, match="TAO"):
        read_weight_file(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut", b"\x80\x02}"])
def test_bytes_of_other_formats_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnknownLayout, match=name):
        read_weight_file(tmp_path / name)


@pytest.mark.parametrize("fraction", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, fraction: float) -> None:
    torch.save({"a": torch.randn(1000)}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(UnknownLayout, match=r"a\.pth"):
        read_weight_file(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, {}])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UnknownLayout, match=r"a\.pth"):
        read_weight_file(tmp_path / "a.pth")


def test_a_folder_is_not_a_weight_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=tmp_path.name):
        read_weight_file(tmp_path)


def test_compressed_entries_are_refused_before_they_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 18)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as stored, zipfile.ZipFile(tmp_path / "b.pth", "w") as deflated:
        for entry in stored.infolist():
            deflated.writestr(entry.filename, stored.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.pth").stat().st_size < 10_000
    with pytest.raises(UnknownLayout, match="compress"):
        read_weight_file(tmp_path / "b.pth")


def test_a_tensor_that_repeats_its_elements_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 16, 1 << 15)}, tmp_path / "a.pth")
    with pytest.raises(UnknownLayout, match="'a'"):
        read_weight_file(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.complex64)],
    ids=["sparse", "meta", "complex"],
)
def test_a_tensor_without_dense_real_elements_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "a.pth")
    with pytest.raises(UnknownLayout, match="'a'"):
        read_weight_file(tmp_path / "a.pth")


def test_names_other_than_text_are_ignored(tmp_path: Path) -> None:
    """As text, this name of 17 nested pairs has 2^17 parts; in the file it has 17."""
    pairs: object = (0, 0)
    for _ in range(16):
        pairs = (pairs, pairs)
    torch.save({pairs: torch.zeros(1), "a": torch.ones(1)}, tmp_path / "a.pth")
    assert list(read_weight_file(tmp_path / "a.pth")) == ["a"]
    torch.save({pairs: torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(UnknownLayout) as caught:
        read_weight_file(tmp_path / "b.pth")
    assert len(str(caught.value)) < 1000
