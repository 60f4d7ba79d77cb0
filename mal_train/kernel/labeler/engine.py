"""Interface between the labeler and what runs its networks: `Engine`, and the engine of torch."""

import contextlib
import threading
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from mal_train.core.masks.geometry import Region
from mal_train.core.settings import Branch
from mal_train.kernel.networks.network import MalNetwork, MaskNetwork, NetworkOutput
from mal_train.kernel.networks.packing import packed


class Engine(Protocol):
    """Runs the two networks of a checkpoint on one device. It knows nothing of boxes and images.

    On a CPU several threads call it at a time, each with the number of torch threads that its pass may use.

    Attributes:
        dtype: dtype of matrix products and convolutions.
    """

    dtype: torch.dtype

    def run(
        self, x_NCHW: Tensor, size_class_N: Tensor, branch: Branch, needed: Sequence[Region] | None = None
    ) -> NetworkOutput:
        """Returns the logits and the feature maps of one network, on the device of the crops.

        Args:
            x_NCHW: float32 (N, 3, S, S) on the device, from `network.normalize`.
            size_class_N: int64 (N,) on the CPU; see `MaskNetwork.forward`.
            branch: student or teacher; the labeler averages them.
            needed: pixels of each crop whose probabilities are needed; None: all. An engine may compute more.

        Raises:
            ConfigError: teacher, and the checkpoint has none.
        """


class TorchEngine:
    """The engine of torch.

    A network is copied and packed (`networks.packing`) when it is first used; later changes of its weights have no
    effect on this engine.

    Args:
        network: student and teacher, on the device and in evaluation mode.
        device: torch device.
        dtype: dtype of matrix products and convolutions; norms, positions and residual sums stay in float32.
    """

    def __init__(self, network: MalNetwork, device: torch.device, dtype: torch.dtype) -> None:
        self._network, self._device, self.dtype = network, device, dtype
        self._packed: dict[Branch, MaskNetwork] = {}
        self._lock = threading.Lock()

    def run(
        self, x_NCHW: Tensor, size_class_N: Tensor, branch: Branch, needed: Sequence[Region] | None = None
    ) -> NetworkOutput:
        """See `Engine.run`."""
        network = self._packed_network(branch)
        with self._autocast():
            output = network.output(x_NCHW, size_class_N, needed)
            return NetworkOutput(output.logits_N1HW.float(), output.feat_NCHW.float())

    def _packed_network(self, branch: Branch) -> MaskNetwork:
        with self._lock:  # the workers of a server on the CPU share an engine
            if branch not in self._packed:
                # Packing returns a copy, of the same class.
                self._packed[branch] = cast(MaskNetwork, packed(self._network.branch_network(branch), self.dtype))
            return self._packed[branch]

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self.dtype)
