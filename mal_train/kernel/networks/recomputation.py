"""Gradient checkpointing: keeps the inputs of a module for the backward pass, which computes the rest again."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, *inputs: object) -> Tensor:
    """Returns `module(*inputs)`, with the gradients of a plain call to the bit, in less memory and one more pass.

    Source: Chen et al., "Training deep nets with sublinear memory cost", 2016 (arXiv 1604.06174).
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _without_statistics(module)

    out: Tensor = checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)
    return out


@contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    """Leaves the running statistics of BatchNorm as they are: the first pass has counted the batch."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    counts = [count for norm in norms if (count := norm.num_batches_tracked) is not None]
    counted = [count.clone() for count in counts]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, before in zip(counts, counted, strict=True):
            count.copy_(before)
