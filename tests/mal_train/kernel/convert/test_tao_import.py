"""Published checkpoints: what is read, what is dropped and said, and what is refused by its name."""

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
    """Random weights of a network under the names that TAO 6.25 to 7.0 gives them."""
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
def test_a_published_checkpoint_is_read_bare_or_wrapped(tmp_path: Path, wrap: str | None) -> None:
    weights = tao_names(TINY)
    content: object = {wrap: weights, "epoch": 3, "loops": {"x": [1]}, "pytorch-lightning_version": "2"}
    torch.save(weights if wrap is None else content, tmp_path / "model.pth")
    found = read_tao_checkpoint(tmp_path / "model.pth")
    assert found.model == TINY
    assert torch.equal(found.weights["teacher.roi_head.mlp1.bias"], weights["teacher.roi_head.mlp1.bias"])


def test_the_reference_checkpoint_gives_the_defaults_of_tao() -> None:
    found = from_tao(published.state_dict(published.TAO), "reference")
    assert found.model == ModelConfig("vit-deit-tiny/16")
    assert set(found.weights) == set(MalNetwork(found.model).state_dict())


@pytest.mark.parametrize("convs", [1, 2, 4, 6])
def test_the_shape_of_the_mask_head_is_read_from_the_weights(convs: int) -> None:
    config = ModelConfig(
        "vit-micro/16",
        mask_head_num_convs=convs,
        mask_head_hidden_channel=8,
        mask_head_out_channel=8 if convs == 1 else 6,
    )
    assert from_tao(tao_names(config), "made").model == config


def test_student_and_teacher_answer_with_their_own_weights() -> None:
    weights = tao_names(TINY)
    weights["teacher.roi_head.mlp2.bias"] = weights["teacher.roi_head.mlp2.bias"] + 1.0
    found = from_tao(weights, "made")
    network = MalNetwork(found.model).eval()
    network.load_state_dict(found.weights)
    x, branch_N = torch.ones(1, 3, 32, 32), torch.tensor([1])
    assert not torch.equal(network.logits(x, branch_N), network.logits(x, branch_N, Branch.TEACHER))


def test_the_classifier_is_dropped_and_named() -> None:
    found = from_tao(tao_names(TINY), "made")
    assert found.dropped == tuple(f"{n}.backbone.head.{p}" for n in ("student", "teacher") for p in ("weight", "bias"))
    assert "student.backbone.head.weight" in str(found)


def test_a_checkpoint_without_a_teacher_takes_the_student_for_both() -> None:
    found = from_tao({k: v for k, v in tao_names(TINY).items() if k.startswith("student.")}, "made")
    assert found.teacher_copied
    ours, theirs = (found.weights[f"{network}.roi_head.mlp1.weight"] for network in ("student", "teacher"))
    assert torch.equal(ours, theirs)
    assert ours.data_ptr() != theirs.data_ptr()


def test_half_precision_weights_become_float32() -> None:
    found = from_tao({name: tensor.half() for name, tensor in tao_names(TINY).items()}, "made")
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.float32}


def test_base_is_called_by_taos_default_name() -> None:
    with torch.device("meta"):
        weights = tao_names(ModelConfig("vit-deit-base/16"))
    assert from_tao(weights, "made").model.arch == "vit-mae-base/16"


@pytest.mark.parametrize("layout", [published.NVLABS, published.TAO6])
def test_the_older_stem_is_recognized_and_read(layout: str) -> None:
    found = from_tao(published.state_dict(layout), "old.pth")
    assert found.model == ModelConfig("vit-deit-tiny/16-convstem")
    assert found.dropped == ()
    assert set(found.weights) == set(MalNetwork(found.model).state_dict())
    assert "layout of NVlabs and TAO up to 6.0, vit-deit-tiny/16-convstem" in str(found)


def test_an_older_stem_of_another_depth_is_refused_with_the_rows_that_have_it() -> None:
    weights = published.state_dict(published.NVLABS)
    weights = {name: tensor for name, tensor in weights.items() if ".blocks.11." not in name}
    with pytest.raises(UnknownLayout, match=r"width 192, depth 11, patch 16.*known: vit-deit-tiny/16-convstem"):
        from_tao(weights, "old.pth")


@pytest.mark.parametrize(
    ("layout", "arch"),
    [(published.TAO6_FAN, "fan_tiny_12_p16_224"), (published.TAO6_FAN_HYBRID, "fan_tiny_8_p4_hybrid")],
)
def test_fan_is_recognized_and_read_but_for_its_class_token(layout: str, arch: str) -> None:
    found = from_tao(published.state_dict(layout), "fan.pth")
    assert found.model == ModelConfig(arch)
    assert set(found.weights) == set(MalNetwork(found.model).state_dict())
    parts = ("head.", "cls_token", "cls_attn_blocks.0.attn.", "cls_attn_blocks.0.mlp.", "cls_attn_blocks.0.gamma2")
    for part in parts:
        assert any(name.startswith(f"student.backbone.{part}") for name in found.dropped)
    assert not any(name.endswith(("norm1.weight", "gamma1")) for name in found.dropped)


def test_a_fan_of_unknown_shape_is_refused_with_the_rows_there_are() -> None:
    weights = published.state_dict(published.TAO6_FAN)
    weights = {name: tensor for name, tensor in weights.items() if ".blocks.11." not in name}
    with pytest.raises(UnknownLayout, match=r"width 192, depth 11, heads 4, ConvNeXt blocks 0.*fan_tiny_12_p16_224"):
        from_tao(weights, "fan.pth")


def _lacks(weights: dict[str, Tensor]) -> None:
    del weights["student.backbone.blocks.3.norm1.weight"]


def _surplus(weights: dict[str, Tensor]) -> None:
    weights["student.backbone.blocks.3.ls1.gamma"] = torch.ones(192)


def _half_a_teacher(weights: dict[str, Tensor]) -> None:
    del weights["teacher.mask_head.convs.0.conv.weight"]


def _position_table(weights: dict[str, Tensor]) -> None:
    weights["student.backbone.pos_embed"] = torch.zeros(1, 198, 192)


def _depth(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if ".blocks.11." in name]:
        del weights[name]


def _stem_of_another_shape(weights: dict[str, Tensor]) -> None:
    weights["student.backbone.patch_embed.proj.weight"] = torch.zeros(192, 768)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_lacks, "blocks.3.norm1.weight is missing"),
        (_surplus, "blocks.3.ls1.gamma is not part of"),
        (_half_a_teacher, r"teacher.mask_head.convs.0.weight is missing"),
        (_position_table, r"pos_embed has shape \(1, 198, 192\) instead of \(1, 197, 192\)"),
        (_depth, "width 192, depth 11, patch 16"),
        (_stem_of_another_shape, "not a MAL checkpoint"),
    ],
)
def test_a_checkpoint_that_almost_fits_is_refused_with_the_reason(
    spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    weights = tao_names(TINY)
    spoil(weights)
    with pytest.raises(UnknownLayout, match=message):
        from_tao(weights, "made")


def test_weights_of_a_backbone_alone_are_sent_to_the_right_setting() -> None:
    prefix = "student.backbone."
    weights = {k.removeprefix(prefix): v for k, v in tao_names(TINY).items() if k.startswith(prefix)}
    with pytest.raises(UnknownLayout, match=r"train\.pretrained_model_path"):
        from_tao(weights, "deit.pth")


def test_something_else_is_refused_with_what_it_begins_with() -> None:
    with pytest.raises(UnknownLayout, match=r"begins with conv1\.weight"):
        from_tao({"conv1.weight": torch.zeros(1)}, "resnet.pth")


def test_a_missing_file_is_a_mistake_of_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_tao_checkpoint(tmp_path / "absent.pth")
