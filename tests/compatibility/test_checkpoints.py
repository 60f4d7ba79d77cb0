"""Checkpoints of the former release: they load, and give the same logits and labels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mal_train.core.masks import rle
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, read_header
from mal_train.kernel.checkpoint.keys import DecryptionKey, parse_key
from mal_train.kernel.labeler.load import build_labeler
from mal_train.kernel.labeler.types import Label
from mal_train.kernel.networks.network import MalNetwork

FILES = Path(__file__).parent
IMAGE = np.random.default_rng(5).integers(0, 256, (90, 140, 3), dtype=np.uint8)
CROPS_NCHW = np.random.default_rng(6).standard_normal((2, 3, 64, 64), dtype=np.float32)


def key_of(name: str) -> DecryptionKey | None:
    setting = f"file:{FILES / 'identity.txt'}" if name == "encrypted.malckpt" else None
    return parse_key(setting, purpose="decryption", source="yaml")


NAMES = pytest.mark.parametrize("name", ["weights.malckpt", "encrypted.malckpt"])


@NAMES
def test_the_settings_are_read(name: str) -> None:
    checkpoint = load_checkpoint(FILES / name, key_of(name))
    assert (checkpoint.kind, checkpoint.training) == ("weights", None)
    assert checkpoint.labeler == LabelerConfig(64, 0.4, (0.3, 0.4, 0.5), calibration=((0.0, 0.1), (1.0, 0.9)))
    assert checkpoint.categories == [{"id": 1, "name": "cup", "supercategory": "Geschirr"}]
    assert checkpoint.provenance == {
        "starting_weights": "random",
        "starting_weights_licence": "none",
        "licence": "Apache-2.0",
        "epochs": 2,
        "steps": 8,
        "supervision": "boxes",
    }
    assert checkpoint.encryption is not None
    assert checkpoint.encryption.mode == ("none" if name == "weights.malckpt" else "recipients")


@NAMES
def test_the_logits_are_the_same(name: str) -> None:
    checkpoint = load_checkpoint(FILES / name, key_of(name))
    network = MalNetwork.from_weights(checkpoint.model, checkpoint.weights).eval()
    with torch.inference_mode():
        logits = network.logits(torch.from_numpy(CROPS_NCHW), torch.tensor([0, 2]))
    np.testing.assert_allclose(logits.numpy(), np.load(FILES / "logits.npy"), atol=1e-4, rtol=0)


@NAMES
def test_the_labels_are_the_same(name: str) -> None:
    expected = json.loads((FILES / "labels.json").read_text())
    labeler = build_labeler(load_checkpoint(FILES / name, key_of(name)), precision="float32")
    labels = [label for label in labeler.label(IMAGE, expected["boxes"]) if isinstance(label, Label)]
    for label, stored in zip(labels, expected["labels"], strict=True):
        # Processors round float32 differently, which may move a pixel across the threshold.
        assert rle.iou(label.rle, Rle.from_coco(stored["rle"])) > 0.98
        assert label.score == pytest.approx(stored["score"], abs=0.01)
        assert list(label.flags) == stored["flags"]


def test_the_training_state_is_the_same() -> None:
    checkpoint = load_checkpoint(FILES / "resume.malckpt", None)
    assert (checkpoint.kind, sorted(checkpoint.weights)) == ("resume", ["student.a", "teacher.a"])
    assert torch.equal(checkpoint.weights["student.a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(checkpoint.weights["teacher.a"], torch.arange(6).bfloat16().view(3, 2))
    assert checkpoint.training is not None
    assert (checkpoint.training["epoch"], checkpoint.training["global_step"]) == (3, 40)
    assert checkpoint.training["loops"] == {"done": False, (1, "a"): [True, None]}
    assert math.isnan(checkpoint.training["callbacks"]["Best"]["worst"])
    (optimizer,) = checkpoint.training["optimizer_states"]
    assert optimizer["param_groups"] == [{"lr": 1e-4, "betas": (0.9, 0.95), "fused": None, "params": [0]}]
    torch.manual_seed(0)
    assert torch.equal(optimizer["state"][0]["exp_avg"], torch.randn(3, 5))


def test_the_header_of_the_encrypted_file_is_read_without_a_key() -> None:
    header = read_header(FILES / "encrypted.malckpt", None)
    assert (header.encryption.mode, header.encryption.recipients, header.content) == ("recipients", 1, None)
