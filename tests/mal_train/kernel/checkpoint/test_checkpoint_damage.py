"""Damaged and inconsistent checkpoint files raise distinct errors, and no unverified content is returned."""

import gc
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mal_train.core.errors import (
    Altered,
    CheckpointError,
    Truncated,
    UnknownLayout,
    WrongKey,
)
from mal_train.core.score_model import MASK_FEATURES, ScoreModel
from mal_train.core.settings import LabelerConfig, ScoreType
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, read_header, save_checkpoint
from mal_train.kernel.checkpoint.tensorfile import MAX_JSON
from mal_train.kernel.networks.network import MalNetwork
from tests.mal_train.kernel.checkpoint.checkpoints import LABELER, metadata, raw, resume_checkpoint, weights_checkpoint
from tests.mal_train.kernel.checkpoint.key_pair import DECRYPTION_KEY, ENCRYPTION_KEY, identity_key


@pytest.mark.parametrize("read", [load_checkpoint, read_header])
def test_wrong_key_truncation_and_alteration_are_different_errors(tmp_path: Path, read: Callable[..., object]) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, weights_checkpoint(weights={"student.w": torch.randn(100_000)}), ENCRYPTION_KEY)
    good = path.read_bytes()
    with pytest.raises(WrongKey):
        read(path, identity_key()[1])
    path.write_bytes(good[:-1])
    with pytest.raises(Truncated):
        read(path, DECRYPTION_KEY)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(Altered):
        read(path, DECRYPTION_KEY)


def load_error(path: Path) -> type[CheckpointError] | None:
    try:
        load_checkpoint(path, DECRYPTION_KEY if path.read_bytes().startswith(b"age") else None)
    except CheckpointError as error:
        return type(error)
    return None


def test_a_damaged_file_returns_no_tensor(tmp_path: Path) -> None:
    """Of 500 random flips and cuts none loads, and no tensor of a refused file stays reachable."""
    path = tmp_path / "a"
    save_checkpoint(path, weights_checkpoint(weights={"student.w": torch.full((50_000,), 0.5)}), ENCRYPTION_KEY)
    good = path.read_bytes()
    rng = random.Random(0)
    found = set()
    for trial in range(500):
        at = rng.randrange(len(good))
        flipped = good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
        path.write_bytes(flipped if trial % 2 else good[:at])
        found.add(load_error(path))
    gc.collect()
    assert found == {WrongKey, Truncated, Altered}
    assert not [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (50_000,)]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_plain_file_is_truncated(tmp_path: Path, fraction: float) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, weights_checkpoint(weights={"student.w": torch.randn(50_000)}), None)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(Truncated):
        load_checkpoint(path, None)


def test_bytes_after_a_plain_file_are_an_alteration(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", weights_checkpoint(), None)
    with (tmp_path / "a").open("ab") as file:
        file.write(b"x")
    with pytest.raises(Altered, match="1 bytes"):
        load_checkpoint(tmp_path / "a", None)


@pytest.mark.parametrize("part", ["length", "header", "digest", "content"])
def test_every_flipped_bit_of_a_plain_file_is_found(tmp_path: Path, part: str) -> None:
    save_checkpoint(tmp_path / "a", resume_checkpoint(), None)
    good = (tmp_path / "a").read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    digest_at = good.index(b'"sha256"')
    rng = random.Random(2)
    places = {
        "length": range(8),
        "header": [rng.randrange(8, len(good[:header_end].rstrip()) + 2) for _ in range(300)],
        "digest": range(digest_at, digest_at + 77),
        "content": [rng.randrange(header_end, len(good)) for _ in range(100)],
    }
    for at in places[part]:
        flipped = good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
        (tmp_path / "a").write_bytes(flipped)
        assert load_error(tmp_path / "a") is not None, at


def test_a_plain_file_without_a_digest_is_read_as_before(tmp_path: Path) -> None:
    rows = {"student.a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    (tmp_path / "a").write_bytes(raw({"__metadata__": metadata(tmp_path / "b"), **rows}, bytes(4)))
    assert load_checkpoint(tmp_path / "a", None).weights["student.a"] == 0


def test_a_header_without_bounds_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    text = b"{" + b" " * (MAX_JSON + 1) + b"}"
    (tmp_path / "a").write_bytes(raw(text))
    assert load_error(tmp_path / "a") is UnknownLayout


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
def test_an_inconsistent_header_is_refused(tmp_path: Path, rows: dict[str, Any]) -> None:
    (tmp_path / "a").write_bytes(raw({"__metadata__": metadata(tmp_path / "b"), **rows}, bytes(8)))
    with pytest.raises(Altered):
        load_checkpoint(tmp_path / "a", None)


def test_a_header_that_claims_terabytes_allocates_nothing(tmp_path: Path) -> None:
    rows = {"student.a": {"dtype": "U8", "shape": [2**42], "data_offsets": [0, 2**42]}}
    (tmp_path / "a").write_bytes(raw({"__metadata__": metadata(tmp_path / "b"), **rows}, bytes(8)))
    with pytest.raises(Truncated):
        load_checkpoint(tmp_path / "a", None)


def test_a_bool_tensor_with_other_values_is_refused(tmp_path: Path) -> None:
    rows = {"student.a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}
    (tmp_path / "a").write_bytes(raw({"__metadata__": metadata(tmp_path / "b"), **rows}, b"\x01\x02"))
    with pytest.raises(Altered, match=r"student\.a.*\bbool\b"):
        load_checkpoint(tmp_path / "a", None)


def test_unknown_schema_names_the_version_that_reads_it(tmp_path: Path) -> None:
    changed = metadata(tmp_path / "b", schema="mal-ckpt/9", requires="mask-auto-labeler 4.2")
    (tmp_path / "a").write_bytes(raw({"__metadata__": changed}))
    with pytest.raises(UnknownLayout, match=r"mal-ckpt/9.*mal-ckpt/1.*mask-auto-labeler 4\.2"):
        read_header(tmp_path / "a", None)


def labeler(**changes: object) -> str:
    """Returns settings of the labeler as JSON, with changes."""
    return json.dumps({**LABELER.to_dict(), **changes})


def scored_by(pooled: int) -> LabelerConfig:
    """Returns settings with a score model of that many pooled features."""
    length = len(MASK_FEATURES) + pooled
    model = ScoreModel(MASK_FEATURES, (0.0,) * length, (1.0,) * length, (0.0,) * length, 0.5)
    return replace(LABELER, score=ScoreType.REGRESSION, score_model=model)


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_a_score_model_of_another_backbone_is_refused(tmp_path: Path, difference: int) -> None:
    network = MalNetwork(weights_checkpoint().model)
    labeler = scored_by(network.student.backbone(torch.zeros(1, 3, 64, 64)).shape[1] + difference)
    save_checkpoint(tmp_path / "a", weights_checkpoint(labeler=labeler), None)
    assert load_error(tmp_path / "a") is (UnknownLayout if difference else None)


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
        ({"model": '{"arch": "vit-micro/16", "mask_head_num_convs": 12000}'}, UnknownLayout),
        ({"model": json.dumps({"arch": "x" * 1_000_000})}, UnknownLayout),
        ({"labeler": labeler(crop_size={"$f": "inf"})}, UnknownLayout),
        ({"labeler": labeler(crop_size=100_000)}, UnknownLayout),
        ({"labeler": labeler(crop_size=72)}, UnknownLayout),
        ({"labeler": labeler(margin_rate=10**400)}, UnknownLayout),
        ({"labeler": labeler(mask_thres=[{"$f": "nan"}] * 3)}, UnknownLayout),
        ({"labeler": labeler(calibration=[[0, 0]] * 100_000)}, UnknownLayout),
        ({"categories": "[1]"}, Altered),
        ({"unknown": ""}, UnknownLayout),
        ({"int8": "[]"}, UnknownLayout),
        ({"int8": "{"}, Altered),
        ({"int8": json.dumps({"crops": 1, "ranges": {"a": [2, 1]}})}, UnknownLayout),
        ({"sha256": "0"}, Altered),
        ({"kind": "resume"}, Altered),
        ({"kind": "resume", "training": "[]"}, Altered),
    ],
    ids=range(25),
)
def test_invalid_settings_are_refused(tmp_path: Path, changes: dict[str, str], error: type[CheckpointError]) -> None:
    (tmp_path / "a").write_bytes(raw({"__metadata__": {**metadata(tmp_path / "b"), **changes}}))
    with pytest.raises(error) as raised:
        load_checkpoint(tmp_path / "a", None)
    assert len(str(raised.value)) < 1000


def test_missing_setting_is_named(tmp_path: Path) -> None:
    given = metadata(tmp_path / "b")
    del given["labeler"]
    (tmp_path / "a").write_bytes(raw({"__metadata__": given}))
    with pytest.raises(Altered, match=r"'labeler'.*missing"):
        load_checkpoint(tmp_path / "a", None)


def test_a_tensor_of_neither_weights_nor_training_state_is_refused(tmp_path: Path) -> None:
    rows = {"optimizer.a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    (tmp_path / "a").write_bytes(raw({"__metadata__": metadata(tmp_path / "b"), **rows}, b"x"))
    with pytest.raises(UnknownLayout, match=r"optimizer\.a"):
        load_checkpoint(tmp_path / "a", None)
