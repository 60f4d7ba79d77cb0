"""The table of backbones, their sizes, the two stems, and our attention against torch's."""

import pytest
import torch
from torch.nn import functional

from mal_train.errors import ConfigError
from mal_train.model import vit
from mal_train.model.vit import VIT_SIZES, Vit, VitSize, attention, build_vit, check_crop_size, vit_size


@pytest.mark.parametrize(
    ("arch", "millions"),
    [
        ("vit-deit-tiny/16", 5.5),
        ("vit-deit-small/16", 21.7),
        ("vit-deit-base/16", 85.8),
        ("vit-mae-base/16", 85.8),
        ("vit-mae-large/16", 303.3),
    ],
)
def test_published_backbones_have_the_published_number_of_parameters(arch: str, millions: float) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_vit(arch).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.06)


def test_an_unknown_arch_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vit-deit-small/16'"):
        vit_size("vit-diet-small/16")


@pytest.mark.parametrize("arch", sorted(VIT_SIZES))
def test_every_row_takes_crops_of_its_patch_size(arch: str) -> None:
    check_crop_size(arch, 14 * VIT_SIZES[arch].patch)
    with pytest.raises(ConfigError, match=r"crop_size: .* multiple of"):
        check_crop_size(arch, 14 * VIT_SIZES[arch].patch + 1)


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("patch", [8, 16])
def test_both_stems_give_one_vector_a_patch(stem: str, patch: int) -> None:
    size = VitSize(32, 1, 2, patch=patch, grid=4, stem="conv" if stem == "conv" else "linear")
    network = Vit(size).eval()
    assert network(torch.zeros(2, 3, 4 * patch, 4 * patch)).shape == (2, 32, 4, 4)
    assert network(torch.zeros(2, 3, 6 * patch, 6 * patch)).shape == (2, 32, 6, 6)


def test_a_crops_features_depend_on_no_other_crop_of_the_batch() -> None:
    torch.manual_seed(0)
    network = build_vit("vit-demo/8").eval()
    x = torch.randn(3, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(network(x)[:1], network(x[:1]), atol=1e-5, rtol=1e-4)


def test_a_conv_stem_needs_a_patch_that_is_a_power_of_two() -> None:
    with pytest.raises(ConfigError, match="power of two"):
        Vit(VitSize(48, 1, 3, patch=12, stem="conv"))


@pytest.mark.parametrize("fits_cache", [True, False])
def test_attention_in_bfloat16_agrees_with_torchs_own(monkeypatch: pytest.MonkeyPatch, fits_cache: bool) -> None:
    monkeypatch.setattr(vit, "SCORES_THAT_FIT_THE_CACHE", 1 << 20 if fits_cache else 0)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 17, 16).bfloat16().unbind(0)
    expected = functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(attention(q, k, v).float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("fits_cache", [True, False])
def test_attention_in_bfloat16_has_torchs_gradients(monkeypatch: pytest.MonkeyPatch, fits_cache: bool) -> None:
    monkeypatch.setattr(vit, "SCORES_THAT_FIT_THE_CACHE", 1 << 20 if fits_cache else 0)
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 3, 17, 16)
    ours = inputs.bfloat16().requires_grad_()
    exact = inputs.clone().requires_grad_()
    found = attention(*ours.unbind(0)).float().square().sum()
    q, k, v = exact.unbind(0)
    expected = functional.scaled_dot_product_attention(q, k, v).square().sum()
    (ours_grad,), (exact_grad,) = torch.autograd.grad(found, ours), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(ours_grad.float(), exact_grad, atol=0.06, rtol=0.06)


def test_attention_in_float32_is_torchs_own() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 17, 16).unbind(0)
    assert torch.equal(attention(q, k, v), functional.scaled_dot_product_attention(q, k, v))
