"""The ViT family: its variants compared with timm's, both stems, and attention compared with torch's."""

from dataclasses import replace
from typing import Any, cast

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from mal_train.core.errors import ConfigError
from mal_train.kernel.checkpoint.lineage import Lineage
from mal_train.kernel.convert import pretrained
from mal_train.kernel.networks import backbones, vit
from mal_train.kernel.networks.backbones import backbone_size, build_backbone
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.kernel.networks.vit import Vit, VitSize, attention


@pytest.mark.parametrize(
    ("arch", "theirs"),
    [
        ("vit-deit-small/16", "deit_small_patch16_224"),
        ("vit-deit-base-distilled/16", "deit_base_distilled_patch16_224"),
        ("vit-deit-iii-base-224/16", "deit3_base_patch16_224"),
    ],
)
def test_a_variant_equals_timms_network_without_its_extra_tokens(
    arch: str, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two blocks cover all code and keep the test fast.
    size = replace(cast(VitSize, backbone_size(arch)), depth=2)
    monkeypatch.setitem(backbones.BACKBONES, arch, size)
    torch.manual_seed(0)
    donor = timm.create_model(theirs, depth=2, dynamic_img_size=True).eval()
    assert isinstance(donor, VisionTransformer)
    with torch.no_grad():
        for name, parameter in donor.named_parameters():
            if name.endswith(("_token", "gamma")):
                torch.nn.init.normal_(parameter)
    monkeypatch.setattr(
        pretrained, "_read", lambda source, key, trust: (donor.state_dict(), Lineage(source, "Apache-2.0"))
    )
    ours = MalNetwork(ModelConfig(arch, mask_head_hidden_channel=4, mask_head_out_channel=4)).eval()
    report = pretrained.load_pretrained(ours, arch)
    assert not any(name.startswith("backbone.") for name in report.missing)
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        tokens = donor.forward_features(x)[:, donor.num_prefix_tokens :]
        expected = tokens.transpose(1, 2).reshape(2, -1, 6, 6)
        torch.testing.assert_close(ours.student.backbone(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("patch", [8, 16])
def test_both_stems_give_one_vector_per_patch(stem: str, patch: int) -> None:
    size = VitSize(32, 1, 2, patch=patch, grid=4, stem="conv" if stem == "conv" else "linear")
    network = Vit(size).eval()
    assert network(torch.zeros(2, 3, 4 * patch, 4 * patch)).shape == (2, 32, 4, 4)
    assert network(torch.zeros(2, 3, 6 * patch, 6 * patch)).shape == (2, 32, 6, 6)


def test_features_of_a_crop_do_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    network = build_backbone("vit-demo/8").eval()
    x = torch.randn(3, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(network(x)[:1], network(x[:1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["plain", "distilled", "deit3"])
@pytest.mark.parametrize("resample", ["antialias", "by_factor"])
def test_a_copy_for_one_grid_has_the_same_features(variant: Any, resample: Any) -> None:
    if resample == "by_factor" and variant != "plain":
        pytest.skip("no network combines them")
    torch.manual_seed(0)
    backbone = VitSize(32, 1, 2, grid=4, variant=variant, resample=resample).build().eval()
    copy = backbone.for_grid(6)
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(copy(x), backbone(x))
        # The network itself still takes crops of any size.
        assert backbone(torch.randn(1, 3, 64, 64)).shape == (1, 32, 4, 4)


def test_a_conv_stem_needs_a_patch_that_is_a_power_of_two() -> None:
    with pytest.raises(ConfigError, match="patch 12"):
        Vit(VitSize(48, 1, 3, patch=12, stem="conv"))


@pytest.mark.parametrize("scores", [1 << 20, 4 * 17**2, 1])
def test_attention_in_bfloat16_agrees_with_torch(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    monkeypatch.setattr(vit, "MAX_CACHED_SCORES", scores)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 17, 16).bfloat16().unbind(0)
    expected = functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(attention(q, k, v).float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("scores", [1 << 20, 4 * 17**2, 1])
def test_gradients_of_attention_in_bfloat16_agree_with_torch(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    monkeypatch.setattr(vit, "MAX_CACHED_SCORES", scores)
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 3, 17, 16)
    ours = inputs.bfloat16().requires_grad_()
    exact = inputs.clone().requires_grad_()
    loss = attention(*ours.unbind(0)).float().square().sum()
    q, k, v = exact.unbind(0)
    expected = functional.scaled_dot_product_attention(q, k, v).square().sum()
    (ours_grad,), (exact_grad,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(ours_grad.float(), exact_grad, atol=0.06, rtol=0.06)


def test_attention_in_float32_is_that_of_torch() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 17, 16).unbind(0)
    assert torch.equal(attention(q, k, v), functional.scaled_dot_product_attention(q, k, v))
