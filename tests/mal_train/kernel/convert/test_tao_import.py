"""Published checkpoints: recognized layouts, dropped tensors, and errors that name the tensor."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mal_train.core.errors import ConfigError, UnknownLayout
from mal_train.core.settings import Branch
from mal_train.kernel.convert.tao_import import from_tao, read_tao_checkpoint
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from tests.mal_train.kernel import published


def tao_names(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Returns random weights of a network under the names of TAO 6.25 to 7.0."""
    torch.manual_seed(seed)
    weights = {
        name.replace(".weight", ".conv.weight").replace(".bias", ".conv.bias") if ".mask_head." in name else name: value
        for name, value in MalNetwork(config).state_dict().items()
    }
    width = weights["student.backbone.norm.weight"].numel()
    for network in ("student", "teacher"):
        weights[f"{network}.backbone.head.weight"] = torch.zeros(1000, width)
        weights[f"{network}.backbone.head.bias"] = torch.zeros(1000)
    return weights


TINY = ModelConfig("vit-deit-tiny/16", mask_head_hidden_channel=8, mask_head_out_channel=4)


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_a_published_checkpoint_is_read_plain_or_wrapped(tmp_path: Path, wrap: str | None) -> None:
    weights = tao_names(TINY)
    content: object = {wrap: weights, "epoch": 3, "loops": {"x": [1]}, "pytorch-lightning_version": "2"}
    torch.save(weights if wrap is None else content, tmp_path / "model.pth")
    imported = read_tao_checkpoint(tmp_path / "model.pth")
    assert imported.model == TINY
    assert torch.equal(imported.weights["teacher.roi_head.mlp1.bias"], weights["teacher.roi_head.mlp1.bias"])


def test_the_reference_checkpoint_has_the_defaults_of_tao() -> None:
    imported = from_tao(published.state_dict(published.TAO), "reference")
    assert imported.model == ModelConfig("vit-deit-tiny/16")
    assert set(imported.weights) == set(MalNetwork(imported.model).state_dict())


@pytest.mark.parametrize("convs", [1, 2, 4, 6])
def test_the_shape_of_the_mask_head_is_read_from_the_weights(convs: int) -> None:
    config = ModelConfig(
        "vit-micro/16",
        mask_head_num_convs=convs,
        mask_head_hidden_channel=8,
        mask_head_out_channel=8 if convs == 1 else 6,
    )
    assert from_tao(tao_names(config), "made").model == config


def test_student_and_teacher_have_their_own_weights() -> None:
    weights = tao_names(TINY)
    weights["teacher.roi_head.mlp2.bias"] = weights["teacher.roi_head.mlp2.bias"] + 1.0
    imported = from_tao(weights, "made")
    network = MalNetwork(imported.model).eval()
    network.load_state_dict(imported.weights)
    x, size_class_N = torch.ones(1, 3, 32, 32), torch.tensor([1])
    assert not torch.equal(network.logits(x, size_class_N), network.logits(x, size_class_N, Branch.TEACHER))


def test_the_classifier_is_dropped_and_reported() -> None:
    imported = from_tao(tao_names(TINY), "made")
    assert imported.dropped == tuple(
        f"{n}.backbone.head.{p}" for n in ("student", "teacher") for p in ("weight", "bias")
    )
    assert "student.backbone.head.weight" in str(imported)


def test_without_a_teacher_the_student_is_copied() -> None:
    imported = from_tao({k: v for k, v in tao_names(TINY).items() if k.startswith("student.")}, "made")
    assert imported.teacher_copied
    ours, theirs = (imported.weights[f"{network}.roi_head.mlp1.weight"] for network in ("student", "teacher"))
    assert torch.equal(ours, theirs)
    assert ours.data_ptr() != theirs.data_ptr()


def test_half_precision_weights_are_converted_to_float32() -> None:
    imported = from_tao({name: tensor.half() for name, tensor in tao_names(TINY).items()}, "made")
    assert {tensor.dtype for tensor in imported.weights.values()} == {torch.float32}


def test_a_base_network_has_taos_default_name() -> None:
    with torch.device("meta"):
        weights = tao_names(ModelConfig("vit-deit-base/16"))
    assert from_tao(weights, "made").model.arch == "vit-mae-base/16"


@pytest.mark.parametrize("layout", [published.NVLABS, published.TAO6])
def test_the_convolutional_stem_is_recognized(layout: str) -> None:
    imported = from_tao(published.state_dict(layout), "old.pth")
    assert imported.model == ModelConfig("vit-deit-tiny/16-convstem")
    assert imported.dropped == ()
    assert set(imported.weights) == set(MalNetwork(imported.model).state_dict())
    assert "NVlabs" in imported.layout


def test_the_error_of_an_unknown_depth_names_the_known_backbones() -> None:
    weights = published.state_dict(published.NVLABS)
    weights = {name: tensor for name, tensor in weights.items() if ".blocks.11." not in name}
    with pytest.raises(UnknownLayout, match=r"width 192, depth 11, patch 16.*vit-deit-tiny/16-convstem"):
        from_tao(weights, "old.pth")


@pytest.mark.parametrize(
    ("layout", "arch"),
    [(published.TAO6_FAN, "fan_tiny_12_p16_224"), (published.TAO6_FAN_HYBRID, "fan_tiny_8_p4_hybrid")],
)
def test_fan_is_recognized_and_its_class_token_dropped(layout: str, arch: str) -> None:
    imported = from_tao(published.state_dict(layout), "fan.pth")
    assert imported.model == ModelConfig(arch)
    assert set(imported.weights) == set(MalNetwork(imported.model).state_dict())
    parts = ("head.", "cls_token", "cls_attn_blocks.0.attn.", "cls_attn_blocks.0.mlp.", "cls_attn_blocks.0.gamma2")
    for part in parts:
        assert any(name.startswith(f"student.backbone.{part}") for name in imported.dropped)
    assert not any(name.endswith(("norm1.weight", "gamma1")) for name in imported.dropped)


def test_the_error_of_an_unknown_fan_names_the_known_ones() -> None:
    weights = published.state_dict(published.TAO6_FAN)
    weights = {name: tensor for name, tensor in weights.items() if ".blocks.11." not in name}
    with pytest.raises(UnknownLayout, match=r"width 192, depth 11, heads 4, ConvNeXt blocks 0.*fan_tiny_12_p16_224"):
        from_tao(weights, "fan.pth")


def _remove_tensor(weights: dict[str, Tensor]) -> None:
    del weights["student.backbone.blocks.3.norm1.weight"]


def _add_tensor(weights: dict[str, Tensor]) -> None:
    weights["student.backbone.blocks.3.ls1.gamma"] = torch.ones(192)


def _remove_from_teacher(weights: dict[str, Tensor]) -> None:
    del weights["teacher.mask_head.convs.0.conv.weight"]


def _change_position_table(weights: dict[str, Tensor]) -> None:
    weights["student.backbone.pos_embed"] = torch.zeros(1, 198, 192)


def _remove_block(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if ".blocks.11." in name]:
        del weights[name]


def _flatten_stem(weights: dict[str, Tensor]) -> None:
    weights["student.backbone.patch_embed.proj.weight"] = torch.zeros(192, 768)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_remove_tensor, r"blocks\.3\.norm1\.weight"),
        (_add_tensor, r"blocks\.3\.ls1\.gamma"),
        (_remove_from_teacher, r"teacher\.mask_head\.convs\.0\.weight"),
        (_change_position_table, r"pos_embed.*\(1, 198, 192\).*\(1, 197, 192\)"),
        (_remove_block, "width 192, depth 11, patch 16"),
        (_flatten_stem, r"patch_embed\.proj\.weight"),
    ],
)
def test_the_error_of_a_checkpoint_that_almost_matches_names_the_tensor(
    change: Callable[[dict[str, Tensor]], None], named: str
) -> None:
    weights = tao_names(TINY)
    change(weights)
    with pytest.raises(UnknownLayout, match=named):
        from_tao(weights, "made")


def test_the_error_of_backbone_weights_names_the_setting_for_them() -> None:
    prefix = "student.backbone."
    weights = {k.removeprefix(prefix): v for k, v in tao_names(TINY).items() if k.startswith(prefix)}
    with pytest.raises(UnknownLayout, match=r"train\.pretrained_model_path"):
        from_tao(weights, "deit.pth")


def test_the_error_of_another_network_names_its_first_tensor() -> None:
    with pytest.raises(UnknownLayout, match=r"conv1\.weight"):
        from_tao({"conv1.weight": torch.zeros(1)}, "resnet.pth")


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.pth"):
        read_tao_checkpoint(tmp_path / "absent.pth")
