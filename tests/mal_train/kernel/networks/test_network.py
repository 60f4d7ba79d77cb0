"""The network: parity with the published forward pass, size classes, student and teacher."""

import functools
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mal_train.core.errors import CheckpointError, ConfigError
from mal_train.core.settings import MAX_CROP_SIZE, MAX_SIZES, Branch, Compat
from mal_train.core.size_class import network_size_class
from mal_train.kernel.convert.tao_import import from_tao
from mal_train.kernel.networks.heads import resize
from mal_train.kernel.networks.network import (
    IMAGE_MEAN,
    IMAGE_STD,
    SIZE_CLASS_SCALE,
    MalNetwork,
    MaskNetwork,
    ModelConfig,
    check_map_size,
    normalize,
    probabilities,
)
from tests.mal_train.kernel import published
from tests.reference import fixture

MICRO = ModelConfig("vit-micro/16", mask_head_hidden_channel=16, mask_head_out_channel=12)


def micro(seed: int = 0, config: ModelConfig = MICRO) -> MalNetwork:
    torch.manual_seed(seed)
    return MalNetwork(config).eval()


def crops(number: int, side: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(seed))


CROPS = {"crop128_s1": (1, 3, 128), "crop224_s2": (2, 3, 224), "crop512_s5": (5, 2, 512), "areaborder": (6, 4, 128)}
"""Stored forward passes: seed, number and side of the crops."""
LAYOUTS = {
    "tao_vit_deit_tiny16": published.TAO,
    "nv_vit_deit_tiny16": published.NVLABS,
    "tao6_vit_deit_tiny16": published.TAO6,
    "tao6_fan_tiny_12_p16_224": published.TAO6_FAN,
    "tao6_fan_tiny_8_p4_hybrid": published.TAO6_FAN_HYBRID,
}


@functools.cache
def published_network(name: str) -> MalNetwork:
    imported = from_tao(published.state_dict(LAYOUTS[name]), "reference")
    network = MalNetwork(imported.model).eval()
    network.load_state_dict(imported.weights)
    return network


@pytest.fixture(scope="module")
def tao_network() -> MalNetwork:
    return published_network("tao_vit_deit_tiny16")


@pytest.mark.parametrize("name", sorted(CROPS))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_logits_agree_with_the_published_forward_pass(layout: str, name: str) -> None:
    if name == "areaborder" and layout.startswith("tao6"):
        return  # TAO 6.0 has no such file.
    tao_network, (seed, number, side) = published_network(layout), CROPS[name]
    with np.load(fixture(f"e_forward_{layout}_{name}.npz")) as stored:
        box_xyxy, expected = stored["bboxes"], stored["seg"]
    area = (box_xyxy[:, 2] - box_xyxy[:, 0]) * (box_xyxy[:, 3] - box_xyxy[:, 1])
    size_class_N = torch.from_numpy(network_size_class(area, Compat.TAO))
    with torch.inference_mode():
        logits = tao_network.logits(published.smooth_input(seed, number, side), size_class_N)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", sorted(set(CROPS) - {"areaborder"}))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_intermediate_features_agree_with_the_published_forward_pass(layout: str, name: str) -> None:
    student, (seed, number, side) = published_network(layout).student, CROPS[name]
    with np.load(fixture(f"e_forward_{layout}_{name}.npz")) as stored:
        expected = {part: stored[part] for part in ("roi", "feat_tokens", "spatial_feat_c8", "maskfeat0_c8")}
        box_xyxy, values = stored["bboxes"], stored["x_check"]
    x = published.smooth_input(seed, number, side)
    np.testing.assert_allclose(x.flatten()[[0, 1000, -1]].numpy(), values, atol=1e-6, rtol=0)
    area = (box_xyxy[:, 2] - box_xyxy[:, 0]) * (box_xyxy[:, 3] - box_xyxy[:, 1])
    size_classes = network_size_class(area, Compat.TAO).tolist()
    first = size_classes.index(min(size_classes))  # the published run stored the first crop of the smallest size class
    with torch.inference_mode():
        feat = student.backbone(x)
        pixels = student.mask_head(resize(feat[[first]], SIZE_CLASS_SCALE[size_classes[first]]))
        actual = {
            "roi": student.roi_head(feat),
            # The class token and two patch tokens. The class token is unused, and this FAN never computes it.
            "feat_tokens": feat.flatten(2).transpose(1, 2)[:, :2],
            "spatial_feat_c8": feat[:, :8],
            "maskfeat0_c8": pixels[:, :8],
        }
    expected["feat_tokens"] = expected["feat_tokens"][:, 1:]
    for part, value in expected.items():
        np.testing.assert_allclose(actual[part].numpy(), value, atol=1e-3, rtol=0, err_msg=part)


def test_bfloat16_is_close_to_float32(tao_network: MalNetwork) -> None:
    x, size_class_N = published.smooth_input(2, 3, 224), torch.tensor([0, 1, 2])
    with torch.inference_mode():
        exact = tao_network.logits(x, size_class_N)
        with torch.autocast("cpu", torch.bfloat16):
            approximate = tao_network.logits(x, size_class_N)
    assert approximate.dtype == torch.float32
    # The logits of the published network differ by at most 0.26 between both dtypes, at a standard deviation of 2.8.
    assert float((approximate - exact).abs().max()) < 0.4
    assert float((approximate - exact).abs().mean()) < 0.04


def test_a_box_of_no_size_class_has_logits_of_zero() -> None:
    network = micro()
    logits = network.logits(crops(3), torch.tensor([-1, 1, -1]))
    assert not logits[0].any()
    assert not logits[2].any()
    assert logits[1].any()


def test_a_batch_of_no_size_class_has_a_backward_pass() -> None:
    network = micro().train()
    loss = network.logits(crops(2), torch.tensor([-1, -1])).sum()
    (gradient,) = torch.autograd.grad(loss, network.student.roi_head.mlp2.weight)
    assert not gradient.any()


def test_a_batch_of_mixed_size_classes_equals_separate_batches() -> None:
    network, x = micro(), crops(5)
    size_classes = [2, 0, 1, 1, 0]
    with torch.inference_mode():
        together = network.logits(x, torch.tensor(size_classes))
        alone = [network.logits(x[i : i + 1], torch.tensor([index])) for i, index in enumerate(size_classes)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_size_classes_have_different_logits() -> None:
    network, x = micro(), crops(1)
    small, medium, large = (network.logits(x, torch.tensor([index])) for index in range(3))
    assert not torch.allclose(small, medium, atol=1e-3)
    assert not torch.allclose(medium, large, atol=1e-3)


@pytest.mark.parametrize("convs", [1, 2, 3, 5])
@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("before", [1, 2])
def test_the_logit_map_has_a_quarter_of_the_crop_size_for_every_mask_head(
    convs: int, ratio: float, before: int
) -> None:
    config = ModelConfig(
        "vit-micro/16",
        mask_head_num_convs=convs,
        mask_head_hidden_channel=8,
        mask_head_out_channel=6,
        mask_scale_ratio=ratio,
        mask_scale_ratio_pre=before,
    )
    assert micro(config=config).logits(crops(3), torch.tensor([0, 1, 2])).shape == (3, 1, 16, 16)


@pytest.mark.parametrize("side", [16, 32, 48, 80, 112])
def test_odd_and_tiny_grids_give_a_map_of_a_quarter_of_the_crop(side: int) -> None:
    logits = micro().logits(crops(3, side), torch.tensor([0, 1, 2]))
    assert logits.shape == (3, 1, side // 4, side // 4)


def test_without_size_adjustment_every_box_takes_the_published_larger_map() -> None:
    config = ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=6, not_adjust_scale=True)
    network, x = micro(config=config), crops(3)
    logits = network.logits(x, torch.tensor([0, 1, 2]))
    assert logits.shape == (3, 1, 32, 32)
    torch.testing.assert_close(logits, network.logits(x, torch.tensor([2, 2, 2])))


def test_the_published_default_without_size_adjustment_is_the_medium_branch_interpolated() -> None:
    plain, fixed = ModelConfig("vit-micro/16"), ModelConfig("vit-micro/16", not_adjust_scale=True)
    adjusting, fixing = micro(config=plain), micro(config=fixed)
    x, medium = crops(1), torch.tensor([1])
    with torch.inference_mode():
        head = adjusting.student.mask_head(adjusting.student.backbone(x))
        logits = torch.einsum("nd,ndhw->nhw", adjusting.student.roi_head(adjusting.student.backbone(x)), head)[:, None]
        expected = torch.nn.functional.interpolate(logits, scale_factor=4.0, mode="bilinear")
        torch.testing.assert_close(fixing.logits(x, medium), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("side", "near"), [(100, "96 or 112"), (8, "16"), (0, "16"), (250, "240 or 256")])
def test_the_error_of_a_crop_size_names_the_nearest_multiples_of_the_patch(side: int, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        micro().logits(torch.zeros(1, 3, side, side), torch.tensor([1]))


def test_a_crop_that_is_not_square_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"32 x 64|64 x 32"):
        micro().logits(torch.zeros(1, 3, 32, 64), torch.tensor([1]))


def test_the_teacher_starts_as_a_copy_of_the_student_with_its_own_memory() -> None:
    network = micro()
    for student, teacher in zip(network.student.parameters(), network.teacher.parameters(), strict=True):
        assert torch.equal(student, teacher)
        assert student.data_ptr() != teacher.data_ptr()


def test_gradients_reach_the_student_and_never_the_teacher() -> None:
    network = micro().train()
    loss = network.logits(crops(3), torch.tensor([0, 1, 2]), Branch.MIXED).square().mean()
    # Raises for a parameter without gradient.
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, list(network.student.parameters())))
    assert not any(p.requires_grad for p in network.teacher.parameters())
    assert not network.logits(crops(1), torch.tensor([1]), Branch.TEACHER).requires_grad


def test_the_teacher_stays_in_evaluation_mode_while_the_student_drops_paths() -> None:
    network = MalNetwork(ModelConfig("vit-micro/16", vit_dpr=0.5)).train()
    x, size_class_N = crops(4), torch.tensor([1, 1, 1, 1])
    torch.manual_seed(0)
    teacher = [network.logits(x, size_class_N, Branch.TEACHER) for _ in range(2)]
    student = [network.logits(x, size_class_N) for _ in range(4)]
    assert torch.equal(*teacher)
    assert any(not torch.equal(student[0], other) for other in student[1:])


def test_mixed_is_the_mean_of_both_logit_maps() -> None:
    network = micro()
    with torch.no_grad():
        network.teacher.roi_head.mlp2.weight.mul_(-0.5)
    x, size_class_N = crops(2), torch.tensor([1, 2])
    both = [network.logits(x, size_class_N, branch) for branch in (Branch.STUDENT, Branch.TEACHER)]
    torch.testing.assert_close(network.logits(x, size_class_N, Branch.MIXED), (both[0] + both[1]) / 2)


def test_weights_are_named_by_network_and_module() -> None:
    names = {".".join(name.split(".")[:2]) for name in micro().state_dict()}
    parts = ("backbone", "roi_head", "mask_head")
    assert names == {f"{network}.{part}" for network in ("student", "teacher") for part in parts}


def test_the_mask_head_is_initialized_kaiming_normal_by_fan_out_with_zero_biases() -> None:
    torch.manual_seed(0)
    head = MaskNetwork(ModelConfig("vit-micro/16")).mask_head
    for convolution in head.convs:
        assert isinstance(convolution, nn.Conv2d)
        deviation = (2.0 / (9 * convolution.out_channels)) ** 0.5
        assert float(convolution.weight.detach().std()) == pytest.approx(deviation, rel=0.02)
        assert convolution.bias is not None
        assert not convolution.bias.any()


def test_normalize_uses_imagenets_mean_and_standard_deviation() -> None:
    image = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    expected = [(v / 255 - m) / s for v, m, s in zip((0, 128, 255), IMAGE_MEAN, IMAGE_STD, strict=True)]
    out = normalize(image)
    assert out.shape == (1, 3, 1, 1)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.flatten().numpy(), expected, rtol=1e-6)
    assert image.flatten().tolist() == [0, 128, 255]


def test_probabilities_upsample_before_the_sigmoid() -> None:
    logits = torch.tensor([[[[-4.0, 4.0], [-4.0, 4.0]]]])
    prob = probabilities(logits, 4)
    expected = torch.tensor([-4.0, -2.0, 2.0, 4.0]).sigmoid()
    assert prob.shape == (1, 4, 4)
    torch.testing.assert_close(prob[0, 0], expected)


def test_probabilities_of_a_crop_do_not_depend_on_its_batch() -> None:
    logits = torch.randn(5, 1, 20, 20, generator=torch.Generator().manual_seed(0)) * 4
    together = probabilities(logits, 75)
    assert torch.equal(together, torch.cat([probabilities(logits[i : i + 1], 75) for i in range(5)]))
    assert float(logits.abs().max()) > 1.0


def test_probabilities_carry_gradients() -> None:
    logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(probabilities(logits, 8).sum(), logits)
    torch.testing.assert_close(gradient.sum(), torch.tensor(2 * 64 * 0.25))


def test_model_config_survives_a_round_trip() -> None:
    config = ModelConfig("vit-micro/16", 3, 32, 16, 2, 1.5, True, 0.1)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_setting_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="mask_head_magic"):
        ModelConfig.from_dict({"arch": "vit-micro/16", "mask_head_magic": 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask_head_num_convs", 0),
        ("mask_head_hidden_channel", 0),
        ("mask_head_out_channel", -1),
        ("mask_scale_ratio_pre", 0),
        ("mask_scale_ratio", 0.0),
        ("mask_scale_ratio", float("nan")),
        ("vit_dpr", 1.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_dict({"arch": "vit-micro/16", field: value})


@pytest.mark.parametrize("arch", ["vit-micro/16", "fan_tiny_8_p4_hybrid"])
def test_from_weights_shares_memory_with_the_given_tensors(arch: str) -> None:
    config = ModelConfig(arch, mask_head_hidden_channel=16, mask_head_out_channel=12)
    source = micro(3, config)
    weights = source.weights()
    network = MalNetwork.from_weights(config, weights).eval()
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert {name: tensor.data_ptr() for name, tensor in named.items()} == {n: w.data_ptr() for n, w in weights.items()}
    assert not any(parameter.requires_grad for parameter in network.teacher.parameters())
    x, size_class_N = crops(2), torch.tensor([0, 2])
    with torch.inference_mode():
        for branch in Branch:
            assert torch.equal(network.logits(x, size_class_N, branch), source.logits(x, size_class_N, branch))


def test_a_network_without_a_teacher_supports_the_student_branch_only() -> None:
    source = micro()
    network = MalNetwork.from_weights(
        MICRO, {n: w.double() for n, w in source.weights().items() if n.startswith("student.")}
    )
    with torch.inference_mode():
        x, size_class_N = crops(1), torch.tensor([1])
        assert torch.equal(network.eval().logits(x, size_class_N), source.logits(x, size_class_N))
        with pytest.raises(ConfigError, match="branch teacher"):
            network.logits(x, size_class_N, Branch.TEACHER)


def test_weights_that_do_not_fit_are_refused_and_three_of_them_named() -> None:
    weights = micro().weights()
    name, other = list(weights)[:2]
    for wrong, text in (
        ({**weights, name: torch.zeros(3)}, f"1 of another shape: {name} (3,)"),
        ({**weights, name: weights[name].long()}, f"1 of another type: {name} torch.int64"),
        ({n: w for n, w in weights.items() if n != name}, f"1 missing: {name}"),
        ({**weights, "student.x": weights[other]}, "1 unknown: student.x"),
        ({"student.x": torch.zeros(1)}, "1 unknown: student.x"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(text)) as raised:
            MalNetwork.from_weights(MICRO, wrong)
        assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", MAX_SIZES)
@pytest.mark.parametrize("value", [0, -1, 10**30, 2.0, True, "4", None])
def test_a_size_out_of_range_is_refused_before_anything_is_built(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        ModelConfig("vit-micro/16", **{name: value})  # type: ignore[arg-type]


def test_maps_that_fill_the_memory_are_refused() -> None:
    large = ModelConfig("vit-micro/16", mask_head_hidden_channel=1024, mask_scale_ratio_pre=4, mask_scale_ratio=8.0)
    check_map_size(ModelConfig("vit-micro/16"), MAX_CROP_SIZE)
    with pytest.raises(ConfigError, match="crop_size"):
        check_map_size(large, MAX_CROP_SIZE)
