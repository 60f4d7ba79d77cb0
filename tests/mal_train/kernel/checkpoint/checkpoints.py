"""Small checkpoints for tests: weights of every dtype, a training state, and files assembled by hand."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from mal_train.core.settings import Compat, LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.tensorfile import DIGEST_NAME
from mal_train.kernel.networks.network import ModelConfig
from tests.mal_train.kernel.checkpoint.key_pair import DECRYPTION_KEY, ENCRYPTION_KEY

MICRO = ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=8)
LABELER = LabelerConfig(crop_size=64, mask_thres=(0.1, 0.2, 0.3), compat=Compat.TAO)
CATEGORIES = [{"id": 7, "name": "Ἰχθύς", "supercategory": "animal"}, {"id": "x", "name": "y"}]
KEYS = pytest.mark.parametrize(
    ("encryption_key", "decryption_key"), [(ENCRYPTION_KEY, DECRYPTION_KEY), (None, None)], ids=["encrypted", "plain"]
)


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


def weights_checkpoint(**changes: Any) -> Checkpoint:
    given: dict[str, Any] = {
        "model": MICRO,
        "labeler": LABELER,
        "weights": weights(),
        "categories": CATEGORIES,
        "provenance": {"licence": "Apache-2.0", "miou": math.nan, "boxes": 12},
    }
    return Checkpoint(**(given | changes))


def resume_checkpoint(**changes: Any) -> Checkpoint:
    return weights_checkpoint(kind="resume", training=training(), **changes)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def raw(table: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def metadata(path: Path, **changes: str) -> dict[str, str]:
    """Returns the metadata of a checkpoint without its digest, as earlier versions wrote them, with changes."""
    save_checkpoint(path, weights_checkpoint(), None)
    with safetensors.safe_open(path, "pt") as file:
        return {name: text for name, text in {**file.metadata(), **changes}.items() if name != DIGEST_NAME}
