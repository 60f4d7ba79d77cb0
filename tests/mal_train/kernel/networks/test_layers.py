"""Layers that the backbones share."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mal_train.kernel.networks.layers import DropPath, WithoutInitialization


def test_drop_path_drops_whole_crops_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25).train()
    factors = layer(torch.ones(4000, 2, 3))
    assert torch.equal(factors, factors[:, :1, :1].expand_as(factors))
    assert {round(float(value), 4) for value in factors.unique()} == {0.0, round(1 / 0.75, 4)}
    assert abs(float(factors.mean()) - 1.0) < 0.05


def test_drop_path_changes_nothing_in_evaluation() -> None:
    x = torch.randn(3, 5, 7)
    assert torch.equal(DropPath(0.9).eval()(x), x)


def test_drop_path_of_rate_zero_changes_nothing() -> None:
    x = torch.randn(3, 5, 7)
    assert torch.equal(DropPath(0.0).train()(x), x)


@pytest.mark.parametrize("init", [nn.init.normal_, nn.init.kaiming_normal_, nn.init.uniform_, torch.Tensor.normal_])
def test_without_initialization_weights_keep_their_values(init: Callable[[torch.Tensor], object]) -> None:
    weight = torch.full((4, 4), 7.0)
    with WithoutInitialization():
        assert init(weight) is weight
    assert bool((weight == 7.0).all())


def test_without_initialization_layers_compute_as_usual() -> None:
    with WithoutInitialization():
        layer = nn.Linear(3, 2)
        layer.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        assert layer(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]
