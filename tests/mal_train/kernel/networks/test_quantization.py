"""Simulated int8: ranges that are observed, layers that round to them, and the form in checkpoints."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from mal_train.core.errors import ConfigError
from mal_train.kernel.networks.heads import ConvRelu
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.kernel.networks.quantization import (
    Int8Calibration,
    QuantizedLayer,
    observed_ranges,
    quantizable,
    quantized,
)
from tests.networks import spread_network


def test_ranges_are_the_least_and_greatest_inputs_over_all_passes() -> None:
    student = spread_network().eval().student
    crops = torch.rand(2, 3, 32, 32) * torch.tensor([1.0, 3.0])[:, None, None, None] - 0.5
    with torch.no_grad(), observed_ranges(student) as ranges:
        for crop in crops:
            student(crop[None], torch.tensor([1]))
    assert ranges.keys() == quantizable(student).keys()
    assert ranges["backbone.patch_embed.proj"] == (float(crops.min()), float(crops.max()))


def test_the_block_leaves_no_hooks() -> None:
    student = spread_network().eval().student
    with observed_ranges(student):
        pass
    assert not any(layer._forward_pre_hooks for layer in student.modules())


def test_depthwise_convolutions_and_the_filter_of_a_crop_stay_in_float32() -> None:
    student = MalNetwork(ModelConfig("fan_tiny_8_p4_hybrid", mask_head_hidden_channel=16)).student
    names = quantizable(student)
    assert not any("dwconv" in name or "conv_dw" in name or name.startswith("roi_head") for name in names)
    assert {"backbone.blocks.0.attn.kv", "backbone.blocks.7.mlp.mlp_v.fc2", "mask_head.convs.0"} <= names.keys()


@pytest.mark.parametrize("layer", [nn.Linear(8, 5), nn.Conv2d(8, 5, 3, padding=1), ConvRelu(8, 5, 3, padding=1)])
def test_a_layer_rounds_inputs_and_weights_by_half_a_step(layer: nn.Linear | nn.Conv2d) -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 8, 6, 8) * 3 - 1
    step = (float(x.max()) - float(x.min())) / 255
    weight_step = layer.weight.abs().amax(tuple(range(1, layer.weight.ndim))).max() / 127
    products = layer.weight[0].numel()
    with torch.no_grad():
        difference = (QuantizedLayer(layer, float(x.min()), float(x.max()), 127)(x) - layer(x)).abs().max()
    bound = products * (step * layer.weight.abs().max() + weight_step * x.abs().max() + step * weight_step)
    assert 0 < difference < bound


def test_inputs_beyond_the_range_are_clipped_and_zero_stays_zero() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    small = QuantizedLayer(layer, 0.5, 2.0, 127)
    with torch.no_grad():
        out = small(torch.tensor([[-1.0], [0.0], [2.0], [5.0]]))[:, 0]
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 2.0, 2.0]))


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_a_constant_input_is_kept(value: float) -> None:
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [0.0]]))
        out = QuantizedLayer(layer, value, value, 127)(torch.full((1, 1), value))[0]
    torch.testing.assert_close(out, torch.tensor([value, 0.0]))
    calibration = Int8Calibration({"student.a": (value, value)}, 1)
    assert Int8Calibration.from_dict(calibration.to_dict()) == calibration


def test_an_activation_that_is_not_a_number_is_never_forgotten() -> None:
    student = spread_network().eval().student
    with torch.no_grad(), observed_ranges(student) as ranges:
        for crop in (torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), math.nan), torch.ones(1, 3, 32, 32)):
            student(crop, torch.tensor([1]))
    with pytest.raises(ConfigError, match="finite"):
        Int8Calibration(ranges, 3)


def test_a_quantized_copy_is_close_to_its_network_which_stays_as_it_was() -> None:
    student = spread_network().eval().student
    x, sizes = torch.rand(2, 3, 64, 64), torch.tensor([0, 2])
    with torch.no_grad():
        before = student(x, sizes)
        with observed_ranges(student) as ranges:
            student(x, sizes)
        rounded = quantized(student, ranges)(x, sizes)
        assert torch.equal(student(x, sizes), before)
    assert 0 < float((rounded - before).abs().mean()) < 0.05 * float(before.std())


def test_a_kind_of_layer_may_stay_in_float32() -> None:
    student = spread_network().eval().student
    with torch.no_grad(), observed_ranges(student) as ranges:
        student(torch.rand(1, 3, 32, 32), torch.tensor([1]))
    copy = quantized(student, ranges, weight_levels=63, kinds=(nn.Conv2d,))
    rounded = [layer.layer for layer in copy.modules() if isinstance(layer, QuantizedLayer)]
    assert len(rounded) == 3  # the patches, and two convolutions of the mask head
    assert all(isinstance(layer, nn.Conv2d) for layer in rounded)


def test_a_layer_without_a_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        quantized(spread_network().student, {name: (0.0, 1.0) for name in ("backbone.patch_embed.proj",)})


def test_the_stored_form_is_read_back() -> None:
    calibration = Int8Calibration({"student.backbone.x": (-1.5, 2.25), "teacher.y": (0.0, 3.0)}, 7)
    assert Int8Calibration.from_dict(calibration.to_dict()) == calibration
    assert calibration.of("student") == {"backbone.x": (-1.5, 2.25)}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"crops": 1},
        {"crops": "1", "ranges": {}},
        {"crops": 1, "ranges": {}, "levels": 3},
        {"crops": 1, "ranges": {"a": [1.0, 0.5]}},
        {"crops": 1, "ranges": {"a": [0.0, math.inf]}},
        {"crops": 1, "ranges": {"a": [math.nan, 1.0]}},
    ],
)
def test_a_damaged_form_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Int8Calibration.from_dict(data)
