"""Small training runs: spec, weights and status."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mal_train.config.spec import Spec, load_spec
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint
from mal_train.losses.crf import MeanField

SMALL = [
    "dataset.crop_size=32",
    "dataset.min_obj_size=100",
    "dataset.num_workers_per_gpu=0",
    "model.arch=vit-micro/16",
    "model.mask_head_hidden_channel=8",
    "model.mask_head_out_channel=8",
    "model.vit_dpr=0.3",
    "train.batch_size=4",
    "train.num_epochs=3",
    "train.lr=1e-4",
    "train.loss_mil_step=2",
    "train.loss_crf_step=4",
    "train.crf_num_iter=3",
    "train.use_amp=false",
]


def plain_mean_field(patch: pytest.MonkeyPatch) -> None:
    """Disables compilation, which takes longer than the runs."""
    patch.setattr(
        "mal_train.commands.training_setup.MeanField", lambda **settings: MeanField(**settings, compiled=False)
    )


def spec_of(scenes: dict[str, tuple[Path, Path]], results: Path, *overrides: str, validate: bool = False) -> Spec:
    return load_spec(None, overrides_of(scenes, results, *overrides, validate=validate))


def overrides_of(
    scenes: dict[str, tuple[Path, Path]], results: Path, *overrides: str, validate: bool = False
) -> list[str]:
    paths = [f"results_dir='{results}'"]
    for part, (annotations, images) in scenes.items():
        if part == "train" or validate:
            paths += [f"dataset.{part}_ann_path='{annotations}'", f"dataset.{part}_img_dir='{images}'"]
    return [*SMALL, *paths, *overrides]


def weights(path: Path) -> dict[str, Tensor]:
    return dict(load_checkpoint(path, None).weights)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def statuses(results: Path) -> list[str]:
    return [json.loads(line)["status"] for line in (results / "train" / "status.json").read_text().splitlines()]
