import pytest
import torch

from mal_train.losses.mask import mask_loss


def test_the_loss_is_zero_for_a_confident_correct_mask_and_large_for_a_wrong_one() -> None:
    target = torch.zeros(2, 8, 8)
    target[:, :4] = 1.0
    logit = (target * 2 - 1) * 30.0
    right, wrong = mask_loss(torch.stack([logit[0], -logit[1]]), target)
    assert right.item() == pytest.approx(0.0, abs=1e-4)
    assert wrong.item() == pytest.approx(31.0, abs=1e-3)


def test_the_loss_of_an_undecided_mask_equals_both_formulas() -> None:
    target = torch.zeros(1, 2, 2)
    target[0, 0] = 1.0
    distance = 1 - 2 * 1.0 / (4 * 0.25 + 1e-3 + 2.0 + 1e-3)
    loss = mask_loss(torch.zeros(1, 2, 2), target).item()
    assert loss == pytest.approx(torch.tensor(2.0).log().item() + distance, abs=1e-6)


def test_the_gradient_points_towards_the_mask() -> None:
    target = (torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    logit = torch.zeros(1, 6, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(mask_loss(logit, target).sum(), logit)
    assert torch.equal(gradient < 0, target > 0)
