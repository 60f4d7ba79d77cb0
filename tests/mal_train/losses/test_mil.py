import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mal_train.losses.mil import dice_distance, mil_loss
from tests.reference import fixture


def box_mask_1x8x8() -> Tensor:
    mask = torch.zeros(1, 8, 8)
    mask[0, 2:6, 1:7] = 1
    return mask


@pytest.mark.parametrize("kind", ["blob", "rand", "ties"])
@pytest.mark.parametrize(("name", "loss_of"), [("dice", dice_distance), ("mil", mil_loss)])
def test_loss_and_gradient_agree_with_the_published_code(name: str, loss_of: object, kind: str) -> None:
    assert callable(loss_of)
    with np.load(fixture(f"b_{name}_{kind}.npz")) as stored:
        pred = torch.from_numpy(stored["pred"]).requires_grad_()
        loss = loss_of(pred, torch.from_numpy(stored["target"]))
        torch.autograd.backward(loss.sum())
        assert pred.grad is not None
        np.testing.assert_allclose(loss.detach().numpy(), stored["loss"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(pred.grad.numpy(), stored["grad"], rtol=0, atol=5e-5 * np.abs(stored["grad"]).max())


def test_the_distance_of_two_empty_masks_equals_the_published_one() -> None:
    with np.load(fixture("b_dice_blob.npz")) as stored:
        empty = torch.zeros(1, 56, 56)
        np.testing.assert_allclose(dice_distance(empty, empty).numpy(), stored["zero_case"], atol=1e-7)


@pytest.mark.parametrize(
    ("inside", "outside", "expected"), [(0, 0, 1.0), (0.5, 0.5, 0.2667), (1, 1, 0.1852), (0.9, 0.1, 0.0080)]
)
def test_the_distance_of_known_profiles(inside: float, outside: float, expected: float) -> None:
    label = torch.zeros(1, 128)
    label[:, 20:108] = 1
    pred = torch.where(label > 0, inside, outside)
    assert dice_distance(pred, label).item() == pytest.approx(expected, abs=5e-5)


def test_the_gradient_of_a_bag_of_equal_values_reaches_one_pixel() -> None:
    prob = torch.full((1, 8, 8), 0.5, requires_grad=True)
    torch.autograd.backward(mil_loss(prob, box_mask_1x8x8()).sum())
    assert prob.grad is not None
    assert torch.count_nonzero(prob.grad) <= 16  # 8 rows and 8 columns
    assert torch.count_nonzero(prob.grad) < prob.numel()


def test_a_mask_that_touches_all_sides_of_the_box_has_no_loss() -> None:
    box_mask = box_mask_1x8x8()
    cross = torch.zeros_like(box_mask)
    cross[0, 4, 1:7] = 1
    cross[0, 2:6, 3] = 1
    torch.testing.assert_close(mil_loss(cross, box_mask), mil_loss(box_mask, box_mask))


def test_foreground_outside_the_box_increases_the_loss() -> None:
    box_mask = box_mask_1x8x8()
    spilled = box_mask.clone()
    spilled[0, 7, 0] = 1
    assert mil_loss(spilled, box_mask).item() > mil_loss(box_mask, box_mask).item() + 0.05


def test_losses_are_float32_under_autocast() -> None:
    prob = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    box_mask = box_mask_1x8x8().expand(2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mil_loss(prob, box_mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mil_loss(prob.float(), box_mask), rtol=0, atol=0)


@given(seed=st.integers(0, 2**31), num=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9))
def test_the_loss_of_a_crop_is_independent_of_its_batch_and_in_range(
    seed: int, num: int, height: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(num, height, width, generator=generator)
    box_mask = (torch.rand(num, height, width, generator=generator) > 0.5).float()
    together = mil_loss(prob, box_mask)
    alone = torch.cat([mil_loss(prob[i : i + 1], box_mask[i : i + 1]) for i in range(num)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert bool(((together >= 0) & (together <= 2)).all())
