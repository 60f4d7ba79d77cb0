"""The checkpoint file: everything comes back, nothing unverified does, and nothing in it can run."""

import gc
import io
import itertools
import json
import math
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyrage
import pytest
import safetensors
import safetensors.torch
import torch

from mal_train.errors import (
    Altered,
    CheckpointError,
    NonFiniteTraining,
    OutputError,
    Truncated,
    UnknownLayout,
    WrongKey,
)
from mal_train.labeling.settings import Compat, LabelerConfig
from mal_train.model.checkpoint import (
    SCHEMA,
    Checkpoint,
    load_checkpoint,
    read_header,
    save_checkpoint,
    sha256_of,
)
from mal_train.model.keys import DecryptionKey, EncryptionKey, generate_identity, parse_key
from mal_train.model.network import MalNetwork, ModelConfig
from mal_train.model.sealed import CHUNK
from tests.model import age_by_hand

MICRO = ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=8)
LABELER = LabelerConfig(crop_size=64, mask_thres=(0.1, 0.2, 0.3), compat=Compat.TAO)
CATEGORIES = [{"id": 7, "name": "Ἰχθύς", "supercategory": "animal"}, {"id": "x", "name": "y"}]


def identity_key() -> tuple[EncryptionKey, DecryptionKey]:
    seals = parse_key(generate_identity()[1], purpose="encryption", where="environment")
    assert seals is not None
    assert seals.opens is not None
    return seals, seals.opens


SEALS, OPENS = identity_key()
KEYS = pytest.mark.parametrize(("seals", "opens"), [(SEALS, OPENS), (None, None)], ids=["sealed", "bare"])


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "student.a": torch.randn(3, 5),
        "student.scalar": torch.tensor(2.5),
        "student.half": torch.randn(7).bfloat16(),
        "teacher.transposed": torch.randn(4, 6).t(),
        "teacher.count": torch.arange(5),
        "teacher.empty": torch.empty(0, 3),
        "teacher.flag": torch.tensor([True, False, True]),
    }


def training() -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 2**40,
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.randn(3, 5)}, 1: {"exp_avg": torch.randn(2)}},
                "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.9), "fused": None, "params": [0, 1]}],
            }
        ],
        "callbacks": {"Best{'monitor': 'x'}": {"best": torch.tensor(math.inf), "path": "", "worst": math.nan}},
        "rng": {"torch": torch.get_rng_state(), "python": (3, tuple(range(5)), None)},
        "done": False,
    }


def whole(**changes: Any) -> Checkpoint:
    given: dict[str, Any] = {
        "model": MICRO,
        "labeler": LABELER,
        "weights": weights(),
        "categories": CATEGORIES,
        "provenance": {"licence": "Apache-2.0", "miou": math.nan, "boxes": 12},
    }
    return Checkpoint(**(given | changes))


def resume(**changes: Any) -> Checkpoint:
    return whole(kind="resume", training=training(), **changes)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


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


@pytest.mark.parametrize("reads", [load_checkpoint, read_header])
def test_wrong_key_truncation_and_alteration_are_told_apart(tmp_path: Path, reads: Callable[..., object]) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, whole(weights={"student.w": torch.randn(100_000)}), SEALS)
    good = path.read_bytes()
    with pytest.raises(WrongKey):
        reads(path, identity_key()[1])
    path.write_bytes(good[:-1])
    with pytest.raises(Truncated):
        reads(path, OPENS)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(Altered):
        reads(path, OPENS)


def failure(path: Path) -> type[CheckpointError] | None:
    try:
        load_checkpoint(path, OPENS)
    except CheckpointError as error:
        return type(error)
    return None


def test_damaged_file_hands_out_nothing(tmp_path: Path) -> None:
    """Of 500 random flips and cuts none loads, and no tensor of a refused file is reachable."""
    path = tmp_path / "a"
    save_checkpoint(path, whole(weights={"student.w": torch.full((50_000,), 0.5)}), SEALS)
    good = path.read_bytes()
    rng = random.Random(0)
    found = set()
    for trial in range(500):
        at = rng.randrange(len(good))
        flipped = good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
        path.write_bytes(flipped if trial % 2 else good[:at])
        found.add(failure(path))
    gc.collect()
    assert found == {WrongKey, Truncated, Altered}
    assert not [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (50_000,)]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_cut_bare_file_is_truncated(tmp_path: Path, fraction: float) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, whole(weights={"student.w": torch.randn(50_000)}), None)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(Truncated):
        load_checkpoint(path, None)


def test_bytes_after_a_bare_file_are_an_alteration(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", whole(), None)
    with (tmp_path / "a").open("ab") as file:
        file.write(b"x")
    with pytest.raises(Altered, match="1 bytes follow its last tensor"):
        load_checkpoint(tmp_path / "a", None)


def test_flipped_bits_in_the_table_of_a_bare_file_never_do_worse_than_an_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", resume(), None)
    good = (tmp_path / "a").read_bytes()
    length = len(good[8 : 8 + int.from_bytes(good[:8], "little")].rstrip())
    rng = random.Random(2)
    for at in itertools.chain(range(8), (8 + rng.randrange(length) for _ in range(400))):
        (tmp_path / "a").write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
        try:
            load_checkpoint(tmp_path / "a", None)
        except CheckpointError:
            continue


def raw(table: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def metadata(path: Path, **changes: str) -> dict[str, str]:
    save_checkpoint(path, whole(), None)
    with safetensors.safe_open(path, "pt") as file:
        return {**file.metadata(), **changes}


@pytest.mark.parametrize(
    "rows",
    [
        {"student.a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"student.a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"student.a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"student.a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"student.a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"student.a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
        {"student.a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"student.a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}},
        {"student.a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
        {"student.a": {"dtype": "F32", "shape": [2]}},
        {"student.a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        {"student.a": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}},
        {
            "student.a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "student.b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        {"student.a": 5},
    ],
)
def test_table_that_contradicts_itself_is_refused(tmp_path: Path, rows: dict[str, Any]) -> None:
    (tmp_path / "a").write_bytes(raw({"__metadata__": metadata(tmp_path / "b"), **rows}, bytes(8)))
    with pytest.raises(Altered):
        load_checkpoint(tmp_path / "a", None)


def test_table_that_promises_terabytes_allocates_nothing(tmp_path: Path) -> None:
    rows = {"student.a": {"dtype": "U8", "shape": [2**42], "data_offsets": [0, 2**42]}}
    (tmp_path / "a").write_bytes(raw({"__metadata__": metadata(tmp_path / "b"), **rows}, bytes(8)))
    with pytest.raises(Truncated):
        load_checkpoint(tmp_path / "a", None)


def test_flag_with_other_values_than_true_and_false_is_refused(tmp_path: Path) -> None:
    rows = {"student.a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}
    (tmp_path / "a").write_bytes(raw({"__metadata__": metadata(tmp_path / "b"), **rows}, b"\x01\x02"))
    with pytest.raises(Altered, match="is of bool"):
        load_checkpoint(tmp_path / "a", None)


def test_unknown_schema_names_the_version_that_reads_it(tmp_path: Path) -> None:
    changed = metadata(tmp_path / "b", schema="mal-ckpt/9", requires="mask-auto-labeler 4.2")
    (tmp_path / "a").write_bytes(raw({"__metadata__": changed}))
    with pytest.raises(UnknownLayout, match=r"'mal-ckpt/9'.*'mal-ckpt/1'.*mask-auto-labeler 4\.2 or newer"):
        read_header(tmp_path / "a", None)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kind": "other"}, Altered),
        ({"categories": "{}"}, Altered),
        ({"provenance": "[]"}, Altered),
        ({"model": "{"}, Altered),
        ({"model": "[]"}, UnknownLayout),
        ({"model": '{"arch": "vit-of-tomorrow/16"}'}, UnknownLayout),
        ({"model": '{"arch": 5}'}, UnknownLayout),
        ({"model": '{"arch": "vit-micro/16", "mask_head_num_convs": "4"}'}, UnknownLayout),
        ({"labeler": "{}"}, UnknownLayout),
        ({"kind": "resume"}, Altered),
        ({"kind": "resume", "training": "[]"}, Altered),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, changes: dict[str, str], error: type[CheckpointError]
) -> None:
    (tmp_path / "a").write_bytes(raw({"__metadata__": metadata(tmp_path / "b", **changes)}))
    with pytest.raises(error):
        load_checkpoint(tmp_path / "a", None)


def test_missing_setting_is_named(tmp_path: Path) -> None:
    given = metadata(tmp_path / "b")
    del given["labeler"]
    (tmp_path / "a").write_bytes(raw({"__metadata__": given}))
    with pytest.raises(Altered, match="'labeler' is missing"):
        load_checkpoint(tmp_path / "a", None)


def test_tensor_that_belongs_nowhere_is_refused(tmp_path: Path) -> None:
    rows = {"optimizer.a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    (tmp_path / "a").write_bytes(raw({"__metadata__": metadata(tmp_path / "b"), **rows}, b"x"))
    with pytest.raises(UnknownLayout, match=r"optimizer\.a"):
        load_checkpoint(tmp_path / "a", None)


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


MEMORY_PROBE = """
import sys
from pathlib import Path
import torch
from mal_train.model.keys import parse_key
from mal_train.model.sealed import SealedFile, padding, write_sealed
from mal_train.model.tensorfile import TensorFileReader, parts

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
