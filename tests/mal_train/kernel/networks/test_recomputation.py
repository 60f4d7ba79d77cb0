"""Gradient checkpointing changes neither gradients nor statistics."""

import pytest
import torch
from torch import Tensor

from mal_train.core.settings import Branch
from mal_train.kernel.networks.network import MalNetwork, ModelConfig


def step(arch: str, *, checkpointing: bool) -> tuple[MalNetwork, Tensor]:
    torch.manual_seed(0)
    config = ModelConfig(arch, mask_head_hidden_channel=8, mask_head_out_channel=8, vit_dpr=0.4)
    network = MalNetwork(config)
    network.student.set_grad_checkpointing(checkpointing)
    logits = network.logits(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2]), Branch.STUDENT)
    logits.square().mean().backward()  # type: ignore[no-untyped-call]
    return network, logits.detach()


# FAN has BatchNorm, whose statistics the second pass must not count again.
@pytest.mark.parametrize("arch", ["vit-micro/16", "fan_tiny_12_p16_224"])
def test_checkpointing_gives_the_gradients_and_buffers_of_a_plain_step(arch: str) -> None:
    (plain, wanted), (checkpointed, logits) = (step(arch, checkpointing=on) for on in (False, True))
    assert torch.equal(logits, wanted)
    for ours, theirs in zip(checkpointed.student.parameters(), plain.student.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or theirs.grad is None or torch.equal(ours.grad, theirs.grad)
    for buffer, other in zip(checkpointed.student.buffers(), plain.student.buffers(), strict=True):
        assert torch.equal(buffer, other)


def test_checkpointing_keeps_fewer_activations_for_the_backward_pass() -> None:
    def kept(*, checkpointing: bool) -> int:
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            network = MalNetwork(ModelConfig("vit-micro/16", mask_head_hidden_channel=64, mask_head_out_channel=64))
            network.student.set_grad_checkpointing(checkpointing)
            network.logits(torch.zeros(2, 3, 64, 64), torch.tensor([2, 2]), Branch.STUDENT)
        return sum(sizes)

    assert kept(checkpointing=True) < kept(checkpointing=False) / 2
