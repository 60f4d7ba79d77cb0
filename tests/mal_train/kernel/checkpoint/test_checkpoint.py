"""The checkpoint file: everything comes back, what must not be written is refused, others read it."""

import math
import struct
import subprocess
import sys
from pathlib import Path

import pyrage
import pytest
import safetensors
import safetensors.torch
import torch

from mal_train.core.errors import CheckpointError, NonFiniteTraining, OutputError, WrongKey
from mal_train.kernel.checkpoint.checkpoint import SCHEMA, load_checkpoint, read_header, save_checkpoint, sha256_of
from mal_train.kernel.checkpoint.encrypted_file import CHUNK
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey, generate_identity, parse_key
from mal_train.kernel.networks.network import MalNetwork
from tests.mal_train.kernel.checkpoint import age_by_hand
from tests.mal_train.kernel.checkpoint.checkpoints import (
    CATEGORIES,
    KEYS,
    LABELER,
    MICRO,
    resume,
    same,
    training,
    weights,
    whole,
)
from tests.mal_train.kernel.checkpoint.key_pair import OPENS, SEALS


@KEYS
def test_weights_and_settings_come_back_to_the_bit(
    tmp_path: Path, seals: EncryptionKey | None, opens: DecryptionKey | None
) -> None:
    before = whole()
    save_checkpoint(tmp_path / "a.malckpt", before, seals)
    after = load_checkpoint(tmp_path / "a.malckpt", opens)
    assert same(dict(sorted(after.weights.items())), dict(sorted(before.weights.items())))
    assert (after.model, after.labeler, after.categories) == (before.model, before.labeler, before.categories)
    assert same(after.provenance, before.provenance)
    assert (after.kind, after.training) == ("weights", None)
    assert after.sha256 == sha256_of(tmp_path / "a.malckpt")


@KEYS
def test_training_state_comes_back_with_types_order_and_bits(
    tmp_path: Path, seals: EncryptionKey | None, opens: DecryptionKey | None
) -> None:
    before = resume()
    save_checkpoint(tmp_path / "a.malckpt", before, seals)
    after = load_checkpoint(tmp_path / "a.malckpt", opens)
    assert after.kind == "resume"
    assert same(after.training, before.training)


def test_seal_is_told_so_that_an_unencrypted_file_can_be_announced(tmp_path: Path) -> None:
    path = tmp_path / "a.malckpt"
    assert str(save_checkpoint(path, whole(), None)) == "not encrypted"
    assert str(load_checkpoint(path, None).seal) == "not encrypted"
    assert str(save_checkpoint(path, whole(), SEALS)) == "sealed for 1 recipient"
    assert str(load_checkpoint(path, OPENS).seal) == "sealed for 1 recipient"


def test_weights_of_a_resume_file_load_without_its_training_state(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.malckpt", resume(), SEALS)
    after = load_checkpoint(tmp_path / "a.malckpt", OPENS, weights_only_kind=True)
    assert (after.kind, after.training) == ("weights", None)
    assert set(after.weights) == set(weights())


def test_network_that_went_through_a_file_gives_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = MalNetwork(MICRO).eval()
    save_checkpoint(tmp_path / "a.malckpt", whole(weights=network.state_dict()), SEALS)
    checkpoint = load_checkpoint(tmp_path / "a.malckpt", OPENS)
    other = MalNetwork(checkpoint.model).eval()
    other.load_state_dict(dict(checkpoint.weights))
    x, branch = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    with torch.inference_mode():
        assert torch.equal(network.student(x, branch), other.student(x, branch))


def test_bare_file_is_plain_safetensors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.malckpt", resume(), None)
    with safetensors.safe_open(tmp_path / "a.malckpt", "pt") as file:
        assert file.metadata()["schema"] == SCHEMA
        for name, tensor in weights().items():
            assert same(file.get_tensor(name), tensor.contiguous())


def test_stock_age_opens_a_sealed_file_to_plain_safetensors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.malckpt", whole(), SEALS)
    plain = pyrage.decrypt((tmp_path / "a.malckpt").read_bytes(), list(OPENS.identities))
    assert len(plain) % CHUNK == 0
    assert same(safetensors.torch.load(plain)["student.a"], weights()["student.a"])


def test_file_that_age_and_safetensors_wrote_loads(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.malckpt", whole(), None)
    with safetensors.safe_open(tmp_path / "a.malckpt", "pt") as file:
        metadata = file.metadata()
    plain = safetensors.torch.save({name: t.contiguous() for name, t in weights().items()}, metadata)
    (tmp_path / "b.malckpt").write_bytes(pyrage.encrypt(plain, list(SEALS.recipients)))
    assert same(load_checkpoint(tmp_path / "b.malckpt", OPENS).weights["teacher.flag"], weights()["teacher.flag"])


def test_passphrase_file_loads(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "bare", whole(), None)
    (tmp_path / "a.malckpt").write_bytes(age_by_hand.seal((tmp_path / "bare").read_bytes(), "not a secret"))
    key = parse_key("not a secret", purpose="decryption", where="environment")
    after = load_checkpoint(tmp_path / "a.malckpt", key)
    assert same(after.weights["student.a"], weights()["student.a"])
    assert str(after.seal) == "sealed by a passphrase (scrypt 2^1)"
    assert after.sha256 == sha256_of(tmp_path / "a.malckpt")


def test_same_content_makes_the_same_bare_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(3)
        save_checkpoint(tmp_path / name, resume(), None)
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weight_that_is_no_number_is_refused_and_the_old_file_stays(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    path = tmp_path / "a.malckpt"
    save_checkpoint(path, whole(), SEALS)
    old = path.read_bytes()
    bad = torch.zeros(5_000_000 if dtype is torch.float16 else 10, dtype=dtype)
    bad[-1] = value
    with pytest.raises(NonFiniteTraining, match=r"weight teacher\.bad holds NaN or infinity"):
        save_checkpoint(path, whole(weights={"teacher.bad": bad}), SEALS)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_finite_weights_whose_sum_overflows_are_accepted(tmp_path: Path) -> None:
    large = torch.full((100,), torch.finfo(torch.float32).max)
    save_checkpoint(tmp_path / "a", whole(weights={"student.large": large}), None)
    assert same(load_checkpoint(tmp_path / "a", None).weights["student.large"], large)


def test_weight_that_is_no_number_is_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, whole(weights={"student.w": torch.full((16,), 0.12345)}), None)
    path.write_bytes(path.read_bytes().replace(struct.pack("<f", 0.12345), struct.pack("<f", math.nan)))
    with pytest.raises(CheckpointError, match=r"weight student\.w holds NaN"):
        load_checkpoint(path, None)


def test_names_outside_student_and_teacher_are_refused() -> None:
    with pytest.raises(CheckpointError, match="names start with 'student"):
        whole(weights={"training/0": torch.zeros(1)})


def test_kind_and_training_state_go_together() -> None:
    with pytest.raises(CheckpointError, match="'resume' has a training state"):
        whole(kind="resume")
    with pytest.raises(CheckpointError, match="'resume' has a training state"):
        whole(training={})


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse(), torch.empty(2, device="meta")]
)
def test_tensor_the_format_does_not_know_is_refused_and_leaves_no_file(tmp_path: Path, bad: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="plain dense"):
        save_checkpoint(tmp_path / "a", whole(kind="resume", training={"x": bad}), SEALS)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not written"):
        save_checkpoint(tmp_path / "missing" / "a", whole(), None)


def test_header_without_a_key_shows_what_can_be_known(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", whole(), SEALS)
    header = read_header(tmp_path / "a", None)
    assert str(header.seal) == "sealed for 1 recipient"
    assert header.content is None
    assert header.file_bytes == (tmp_path / "a").stat().st_size


@KEYS
def test_header_shows_settings_and_counts(
    tmp_path: Path, seals: EncryptionKey | None, opens: DecryptionKey | None
) -> None:
    save_checkpoint(tmp_path / "a", resume(), seals)
    content = read_header(tmp_path / "a", opens).content
    assert content is not None
    assert (content.schema, content.kind, content.model, content.labeler) == (SCHEMA, "resume", MICRO, LABELER)
    assert content.categories == CATEGORIES
    assert content.tensors == len(weights()) + 5
    state = training()["rng"]["torch"].numel() + 4 + 60 + 8 + 4
    assert content.tensor_bytes == sum(t.numel() * t.element_size() for t in weights().values()) + state


def test_header_of_a_file_that_is_not_encrypted_passes_over_the_key(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", whole(), None)
    assert read_header(tmp_path / "a", OPENS).seal.how == "none"


def test_key_for_a_file_that_is_not_encrypted_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", whole(), None)
    with pytest.raises(WrongKey, match="not encrypted"):
        load_checkpoint(tmp_path / "a", OPENS)


MEMORY_PROBE = """
import sys
from pathlib import Path
import torch
from mal_train.kernel.checkpoint.keys import parse_key
from mal_train.kernel.checkpoint.encrypted_file import SealedFile, padding, write_sealed
from mal_train.kernel.checkpoint.tensorfile import TensorFileReader, parts

def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

path, key = Path(sys.argv[1]), parse_key("env:MAL_KEY", purpose="encryption", where="environment")
names = [f"student.{i}" for i in range(8)]
tensors = {name: torch.ones(1 << 22) for name in names}
before = peak_kib()
write_sealed(path, parts(tensors, {}, padding), key)
print(peak_kib() - before)
del tensors
with SealedFile(path) as file:
    reader = TensorFileReader("file", file.content_bytes, lambda head: names)
    file.read_into(reader, key.opens)
    reader.finish()
assert all(bool((reader.tensors[name] == 1).all()) for name in names)
print(peak_kib() - before)
"""


def test_memory_beside_the_tensors_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 MiB of tensors; the promise is 128 MiB beside them, whatever their size (benchmarks/checkpoint.py: 1 GiB)."""
    monkeypatch.setenv("MAL_KEY", generate_identity()[1])
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path / "a")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(int(line) < 32 << 10 for line in output.split())
