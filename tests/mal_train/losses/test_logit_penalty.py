"""Penalty of logits outside the slope of the sigmoid."""

import torch

from mal_train.losses.logit_penalty import LOGIT_BOUND, logit_excess


def test_logits_within_the_bound_have_no_loss_and_no_gradient() -> None:
    logits = torch.linspace(-LOGIT_BOUND, LOGIT_BOUND, 64).view(1, 8, 8).requires_grad_()
    loss = logit_excess(logits).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_logits_that_saturate_the_sigmoid_have_a_gradient() -> None:
    logits = torch.full((1, 4, 4), 300.0, requires_grad=True)
    assert not torch.autograd.grad(logits.sigmoid().sum(), logits)[0].any()
    (pull,) = torch.autograd.grad(logit_excess(logits).sum(), logits)
    assert (pull > 1.0).all()


def test_the_loss_of_a_crop_depends_on_that_crop_only() -> None:
    logits = torch.stack([torch.zeros(4, 4), torch.full((4, 4), -10.0)])
    assert logit_excess(logits).tolist() == [0.0, 4.0]
