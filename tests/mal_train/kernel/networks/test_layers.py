"""Layers that the backbones share."""

import torch

from mal_train.kernel.networks.layers import DropPath


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
