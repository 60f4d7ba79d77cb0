"""Checkpoint files: content survives a round trip, invalid content is refused, other programs read the files."""

import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyrage
import pytest
import safetensors
import safetensors.torch
import torch

from mal_train.core.errors import CheckpointError, NonFiniteTraining, OutputError, WrongKey
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, read_header, save_checkpoint, sha256_of
from mal_train.kernel.checkpoint.encrypted_file import CHUNK
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey, generate_identity, parse_key
from mal_train.kernel.checkpoint.metadata import SCHEMA
from mal_train.kernel.networks.network import MalNetwork
from mal_train.kernel.networks.quantization import Int8Calibration
from tests.mal_train.kernel.checkpoint import age_by_hand
from tests.mal_train.kernel.checkpoint.checkpoints import (
    CATEGORIES,
    KEYS,
    LABELER,
    MICRO,
    equal,
    metadata,
    raw,
    resume_checkpoint,
    training,
    weights,
    weights_checkpoint,
)
from tests.mal_train.kernel.checkpoint.key_pair import DECRYPTION_KEY, ENCRYPTION_KEY
from tests.paths import ROOT


@KEYS
def test_weights_and_settings_are_loaded_bit_for_bit(
    tmp_path: Path, encryption_key: EncryptionKey | None, decryption_key: DecryptionKey | None
) -> None:
    before = weights_checkpoint()
    save_checkpoint(tmp_path / "a.malckpt", before, encryption_key)
    after = load_checkpoint(tmp_path / "a.malckpt", decryption_key)
    assert equal(dict(sorted(after.weights.items())), dict(sorted(before.weights.items())))
    assert (after.model, after.labeler, after.categories) == (before.model, before.labeler, before.categories)
    assert equal(after.provenance, before.provenance)
    assert (after.kind, after.training) == ("weights", None)
    assert after.sha256 == sha256_of(tmp_path / "a.malckpt")


@KEYS
def test_training_state_keeps_types_order_and_bits(
    tmp_path: Path, encryption_key: EncryptionKey | None, decryption_key: DecryptionKey | None
) -> None:
    before = resume_checkpoint()
    save_checkpoint(tmp_path / "a.malckpt", before, encryption_key)
    after = load_checkpoint(tmp_path / "a.malckpt", decryption_key)
    assert after.kind == "resume"
    assert equal(after.training, before.training)


def test_saving_and_loading_report_the_encryption(tmp_path: Path) -> None:
    path = tmp_path / "a.malckpt"
    plain = save_checkpoint(path, weights_checkpoint(), None)
    assert plain.mode == "none"
    assert load_checkpoint(path, None).encryption == plain
    encrypted = save_checkpoint(path, weights_checkpoint(), ENCRYPTION_KEY)
    assert (encrypted.mode, encrypted.recipients) == ("recipients", 1)
    assert load_checkpoint(path, DECRYPTION_KEY).encryption == encrypted


def test_weights_of_a_resume_file_load_without_its_training_state(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.malckpt", resume_checkpoint(), ENCRYPTION_KEY)
    after = load_checkpoint(tmp_path / "a.malckpt", DECRYPTION_KEY, skip_training_state=True)
    assert (after.kind, after.training) == ("weights", None)
    assert set(after.weights) == set(weights())


def test_a_loaded_network_computes_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = MalNetwork(MICRO).eval()
    save_checkpoint(tmp_path / "a.malckpt", weights_checkpoint(weights=network.state_dict()), ENCRYPTION_KEY)
    checkpoint = load_checkpoint(tmp_path / "a.malckpt", DECRYPTION_KEY)
    other = MalNetwork(checkpoint.model).eval()
    other.load_state_dict(dict(checkpoint.weights))
    x, size_class_N = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    with torch.inference_mode():
        assert torch.equal(network.student(x, size_class_N), other.student(x, size_class_N))


def test_a_plain_checkpoint_is_a_safetensors_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.malckpt", resume_checkpoint(), None)
    with safetensors.safe_open(tmp_path / "a.malckpt", "pt") as file:
        assert file.metadata()["schema"] == SCHEMA
        for name, tensor in weights().items():
            assert equal(file.get_tensor(name), tensor.contiguous())


def test_the_age_library_decrypts_a_checkpoint_to_safetensors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.malckpt", weights_checkpoint(), ENCRYPTION_KEY)
    plain = pyrage.decrypt((tmp_path / "a.malckpt").read_bytes(), list(DECRYPTION_KEY.identities))
    assert len(plain) % CHUNK == 0
    assert equal(safetensors.torch.load(plain)["student.a"], weights()["student.a"])


def test_a_file_written_by_the_age_and_safetensors_libraries_loads(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.malckpt", weights_checkpoint(), None)
    with safetensors.safe_open(tmp_path / "a.malckpt", "pt") as file:
        metadata = file.metadata()
    plain = safetensors.torch.save({name: t.contiguous() for name, t in weights().items()}, metadata)
    (tmp_path / "b.malckpt").write_bytes(pyrage.encrypt(plain, list(ENCRYPTION_KEY.recipients)))
    assert equal(
        load_checkpoint(tmp_path / "b.malckpt", DECRYPTION_KEY).weights["teacher.flag"], weights()["teacher.flag"]
    )


def test_a_passphrase_encrypted_file_loads(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "plain", weights_checkpoint(), None)
    (tmp_path / "a.malckpt").write_bytes(age_by_hand.encrypt((tmp_path / "plain").read_bytes(), "not a secret"))
    key = parse_key("not a secret", purpose="decryption", source="environment")
    after = load_checkpoint(tmp_path / "a.malckpt", key)
    assert equal(after.weights["student.a"], weights()["student.a"])
    assert after.encryption is not None
    assert (after.encryption.mode, after.encryption.work_factor) == ("passphrase", 1)
    assert after.sha256 == sha256_of(tmp_path / "a.malckpt")


def test_equal_checkpoints_are_written_as_equal_plain_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(3)
        save_checkpoint(tmp_path / name, resume_checkpoint(), None)
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_non_finite_weight_is_not_saved_and_the_old_file_stays(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    path = tmp_path / "a.malckpt"
    save_checkpoint(path, weights_checkpoint(), ENCRYPTION_KEY)
    old = path.read_bytes()
    bad = torch.zeros(5_000_000 if dtype is torch.float16 else 10, dtype=dtype)
    bad[-1] = value
    with pytest.raises(NonFiniteTraining, match=r"teacher\.bad"):
        save_checkpoint(path, weights_checkpoint(weights={"teacher.bad": bad}), ENCRYPTION_KEY)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_finite_weights_whose_sum_overflows_are_accepted(tmp_path: Path) -> None:
    large = torch.full((100,), torch.finfo(torch.float32).max)
    save_checkpoint(tmp_path / "a", weights_checkpoint(weights={"student.large": large}), None)
    assert equal(load_checkpoint(tmp_path / "a", None).weights["student.large"], large)


def test_non_finite_weight_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a"
    rows = {"student.w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    path.write_bytes(raw({"__metadata__": metadata(tmp_path / "b"), **rows}, struct.pack("<f", math.nan)))
    with pytest.raises(CheckpointError, match=r"student\.w"):
        load_checkpoint(path, None)


def test_the_calibration_for_int8_is_kept(tmp_path: Path) -> None:
    int8 = Int8Calibration({"student.backbone.a": (-0.1, 1 / 3)}, 12)
    save_checkpoint(tmp_path / "a", weights_checkpoint(int8=int8), None)
    assert load_checkpoint(tmp_path / "a", None).int8 == int8
    content = read_header(tmp_path / "a", None).content
    assert content is not None
    assert content.int8 == int8


def test_weights_must_belong_to_student_or_teacher() -> None:
    with pytest.raises(CheckpointError, match="training/0"):
        weights_checkpoint(weights={"training/0": torch.zeros(1)})


def test_kind_and_training_state_go_together() -> None:
    with pytest.raises(CheckpointError, match="kind 'resume'"):
        weights_checkpoint(kind="resume")
    with pytest.raises(CheckpointError, match="kind 'weights'"):
        weights_checkpoint(training={})


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse(), torch.empty(2, device="meta")]
)
def test_unsupported_tensor_is_refused_and_leaves_no_file(tmp_path: Path, bad: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=str(bad.dtype)):
        save_checkpoint(tmp_path / "a", weights_checkpoint(kind="resume", training={"x": bad}), ENCRYPTION_KEY)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="missing"):
        save_checkpoint(tmp_path / "missing" / "a", weights_checkpoint(), None)


def test_header_without_a_key_shows_encryption_and_size(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", weights_checkpoint(), ENCRYPTION_KEY)
    header = read_header(tmp_path / "a", None)
    assert (header.encryption.mode, header.encryption.recipients) == ("recipients", 1)
    assert header.content is None
    assert header.file_bytes == (tmp_path / "a").stat().st_size


@KEYS
def test_header_shows_settings_and_counts(
    tmp_path: Path, encryption_key: EncryptionKey | None, decryption_key: DecryptionKey | None
) -> None:
    save_checkpoint(tmp_path / "a", resume_checkpoint(), encryption_key)
    content = read_header(tmp_path / "a", decryption_key).content
    assert content is not None
    assert (content.schema, content.kind, content.model, content.labeler) == (SCHEMA, "resume", MICRO, LABELER)
    assert content.categories == CATEGORIES
    assert content.tensors == len(weights()) + 5
    state = training()["rng"]["torch"].numel() + 4 + 60 + 8 + 4
    assert content.tensor_bytes == sum(t.numel() * t.element_size() for t in weights().values()) + state


def test_header_of_a_plain_file_ignores_the_key(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", weights_checkpoint(), None)
    assert read_header(tmp_path / "a", DECRYPTION_KEY).encryption.mode == "none"


def test_key_for_a_plain_file_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", weights_checkpoint(), None)
    with pytest.raises(WrongKey):
        load_checkpoint(tmp_path / "a", DECRYPTION_KEY)


MEMORY_PROBE = """
import sys
from pathlib import Path
import torch
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key
from tests.mal_train.kernel.checkpoint.checkpoints import weights_checkpoint

def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

path, key = Path(sys.argv[1]), parse_key("env:MAL_KEY", purpose="encryption", source="environment")
weights, moments = ([torch.ones(1 << 22) for _ in range(4)] for _ in range(2))
checkpoint = weights_checkpoint(
    weights={f"student.{i}": tensor for i, tensor in enumerate(weights)}, kind="resume", training={"moments": moments}
)
before = peak_kib()
save_checkpoint(path, checkpoint, key)
print(peak_kib() - before)
del checkpoint, weights, moments
loaded = load_checkpoint(path, key.decryption_key)
print(peak_kib() - before)
assert all(bool((tensor == 1).all()) for tensor in [*loaded.weights.values(), *loaded.training["moments"]])
"""


@pytest.mark.promise("checkpoints", "Saving and loading a checkpoint take little memory beside the tensors")
def test_saving_and_loading_take_little_memory_beside_the_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    """128 MiB of tensors. The limit is 128 MiB beside tensors of any size (benchmarks/checkpoint.py: 1 GiB)."""
    monkeypatch.setenv("MAL_KEY", generate_identity()[1])
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path / "a")]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    saving, loading = (int(line) / 1024 for line in output.split())
    record("memory beside 128 MiB of tensors", saving_mib=saving, loading_mib=loading)
    assert saving < 32
    assert loading < 32
