"""Crop size of a run: the given one, or else the backbone's."""

import pytest
import torch

from mal_train.commands.common import labeler_config, train_crop_size
from mal_train.commands.training_setup import build_network
from mal_train.config.spec import load_spec
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.kernel.networks.network import MalNetwork


@pytest.mark.parametrize(
    ("overrides", "trained", "labeled"),
    [
        ([], 512, 512),
        (["model.arch=vit-mae-huge/14"], 504, 504),
        (["model.arch=vit-mae-huge/14", "dataset.crop_size=null"], 504, 504),
        (["model.arch=vit-mae-huge/14", "dataset.crop_size=224"], 224, 224),
        (["model.arch=vit-mae-huge/14", "dataset.test_crop_size=518"], 504, 518),
        (["dataset.crop_size=160", "dataset.test_crop_size=224"], 160, 224),
    ],
)
def test_the_default_crop_size_is_the_backbones(overrides: list[str], trained: int, labeled: int) -> None:
    spec = load_spec(None, overrides)
    assert (train_crop_size(spec), labeler_config(spec).crop_size) == (trained, labeled)


@pytest.mark.parametrize("field", ["crop_size", "test_crop_size"])
def test_a_crop_size_that_is_no_multiple_of_the_patch_size_is_refused_with_the_nearest_ones(field: str) -> None:
    spec = load_spec(None, ["model.arch=vit-mae-huge/14", f"dataset.{field}=512"])
    with pytest.raises(ConfigError, match=r"crop_size: 512.*vit-mae-huge/14.*\b14\b.*504.*518"):
        build_network(spec, None, None, Console.silent())


def test_the_huge_backbone_trains_with_its_default_crop_size() -> None:
    spec = load_spec(None, ["model.arch=vit-mae-huge/14"])
    with torch.device("meta"):
        network, _ = build_network(spec, None, None, Console.silent())
        side = train_crop_size(spec)
        logits = network.student(torch.zeros(3, 3, side, side), torch.tensor([0, 1, 2], device="cpu"))
    assert isinstance(network, MalNetwork)
    assert logits.shape == (3, 1, 144, 144)
