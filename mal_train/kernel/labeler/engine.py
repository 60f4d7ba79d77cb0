"""The seam between the labeler and what runs its networks: `Engine`, and the engine of torch."""

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mal_train.core.masks.geometry import Region
from mal_train.core.settings import Branch
from mal_train.kernel.networks.network import MalNetwork


class Engine(Protocol):
    """Runs the two networks of a checkpoint on one device. It knows nothing of boxes and images.

    On a CPU several threads call it at a time, each with the number of torch threads that its pass may use.
    """

    def logits(
        self, x_NCHW: Tensor, size_class_N: Tensor, branch: Branch, needed: Sequence[Region] | None = None
    ) -> Tensor:
        """Returns the logits float32 (N, 1, 4h, 4w) of one network, on the device of the crops.

        Args:
            x_NCHW: float32 (N, 3, S, S) on the device, from `network.normalize`.
            size_class_N: int64 (N,) on the CPU; see `MaskNetwork.forward`.
            branch: student or teacher; the labeler averages them.
            needed: pixels of each crop whose probabilities are needed; None: all. An engine may compute more.

        Raises:
            ConfigError: teacher, and the checkpoint has none.
        """


class TorchEngine:
    """The engine of torch: the networks themselves, with matrix products in the given dtype.

    Args:
        network: student and teacher, on the device and in evaluation mode.
        device: torch device.
        dtype: dtype of matrix products and convolutions; norms, positions and residual sums stay in float32.
    """

    def __init__(self, network: MalNetwork, device: torch.device, dtype: torch.dtype) -> None:
        self._network, self._device, self._dtype = network, device, dtype

    def logits(
        self, x_NCHW: Tensor, size_class_N: Tensor, branch: Branch, needed: Sequence[Region] | None = None
    ) -> Tensor:
        """See `Engine.logits`."""
        with self._autocast():
            return self._network.logits(x_NCHW, size_class_N, branch, needed).float()

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self._dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)
