"""The engine of OpenVINO, for CPUs: float32, or int8 with the ranges that a checkpoint stores.

A network is converted in two graphs, so that backbones are compiled once for all size classes: crop → feature map and
filter, and those → logits. Graphs have static shapes and one crop, so the result of a crop depends on nothing else.
All graphs of a network are converted and compiled when the first is used, which takes seconds.
"""

import copy
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from mal_train.core.errors import ConfigError
from mal_train.core.masks.geometry import Region
from mal_train.core.settings import Branch
from mal_train.kernel.networks.network import SIZE_CLASS_SCALE, MalNetwork, MaskNetwork, NetworkOutput
from mal_train.kernel.networks.precision import has_int8_dot_product
from mal_train.kernel.networks.quantization import Int8Calibration, quantized
from mal_train.kernel.networks.vit import Vit

Floats = NDArray[np.float32]

MARGIN_SHARE: Final = 16
"""A mask graph computes the complete crop, or its center without a sixteenth of the side at each border: few graphs,
which can all be made at the start. Nearly all crops of margin 0.4 need no more than the center."""


class OpenVinoEngine:
    """The engine of OpenVINO; see `Engine`. Later changes of the network's weights have no effect once a graph is made.

    Args:
        network: student and teacher, on the CPU and in evaluation mode.
        calibration: ranges for int8; None: float32.

    Raises:
        ConfigError: OpenVINO is not installed, or a layer of the student has no range.
    """

    def __init__(self, network: MalNetwork, calibration: Int8Calibration | None = None) -> None:
        self.dtype = torch.float32 if calibration is None else torch.int8
        self._network, self._calibration = network, calibration
        self._openvino = import_openvino()
        _ignore_warnings_of_the_tracer()
        self._core = self._openvino.Core()
        self._branches: dict[Branch, MaskNetwork] = {}
        self._models: dict[_Key, Any] = {}
        self._compiled: dict[tuple[_Key, int], Any] = {}
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._branch_network(Branch.STUDENT)

    def run(
        self, x_NCHW: Tensor, size_class_N: Tensor, branch: Branch, needed: Sequence[Region] | None = None
    ) -> NetworkOutput:
        """See `Engine.run`."""
        crops, side = x_NCHW.numpy(), x_NCHW.shape[-1]
        regions = [Region(0, 0, side, side)] * len(crops) if needed is None else needed
        rows = [
            self._run_crop(np.ascontiguousarray(crops[n : n + 1]), _mask_key(branch, side, size_class, region))
            for n, (size_class, region) in enumerate(zip(size_class_N.tolist(), regions, strict=True))
        ]
        return NetworkOutput(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*rows, strict=True)))

    def _run_crop(self, crop_1CHW: Floats, key: "_Key") -> tuple[Floats, Floats]:
        """Returns the logits and the feature map of one crop."""
        feat, kernel = self._run_graph(_Key(key.branch, key.side), crop_1CHW)
        (logits,) = self._run_graph(key, feat, kernel)
        return logits, feat

    def _run_graph(self, key: "_Key", *inputs: Floats) -> list[Floats]:
        """Returns copies of the outputs of a graph."""
        requests: dict[tuple[_Key, int], Any] = self._of_thread.__dict__.setdefault("requests", {})
        # The labeler gives every pass its number of torch threads.
        variant = (key, torch.get_num_threads())
        if variant not in requests:
            requests[variant] = self._compiled_graph(*variant).create_infer_request()
        # Outputs that are shared would be overwritten when this thread runs the graph again.
        results = requests[variant].infer(list(inputs), share_inputs=True, share_outputs=False)
        return list(results.values())

    def _compiled_graph(self, key: "_Key", threads: int) -> Any:
        """Returns a graph; the first time makes all graphs of its network, so that no later crop waits for one."""
        with self._lock:
            if (key, threads) not in self._compiled:
                for each in dict.fromkeys((*_keys(key.branch, key.side), key)):
                    if (each, threads) not in self._compiled:
                        self._compiled[each, threads] = self._compile(each, threads)
            return self._compiled[key, threads]

    def _compile(self, key: "_Key", threads: int) -> Any:
        if key not in self._models:
            self._models[key] = self._converted(key)
        return self._core.compile_model(self._models[key], "CPU", _options(threads))

    def _converted(self, key: "_Key") -> Any:
        # The caller is in inference mode, whose tensors cannot be traced.
        with torch.inference_mode(mode=False), torch.no_grad():
            network = _for_side(self._branch_network(key.branch), key.side)
            crop = torch.zeros(1, 3, key.side, key.side)
            if key.size_class is None:
                return self._traced(_Features(network), crop)
            return self._traced(_MaskLogits(network, key.size_class, key.needed), *network.features(crop))

    def _traced(self, module: nn.Module, *inputs: Tensor) -> Any:
        contiguous = tuple(x.contiguous() for x in inputs)
        return self._openvino.convert_model(
            module.eval(), example_input=contiguous, input=[list(x.shape) for x in contiguous]
        )

    def _branch_network(self, branch: Branch) -> MaskNetwork:
        """Returns the network to convert, quantized for int8. Raises ConfigError: no teacher, or no ranges of it."""
        if branch not in self._branches:
            network = self._network.branch_network(branch)
            if self._calibration is not None:
                network = int8_network(network, self._calibration, str(branch))
            self._branches[branch] = network
        return self._branches[branch]


@dataclass(frozen=True)
class _Key:
    """A graph: without a size class the first of a network, otherwise a second one.

    Attributes:
        branch: student or teacher.
        side: side of the crop in px.
        size_class: see `MaskNetwork.forward`.
        is_center: the margin at the border needs no logits (`MARGIN_SHARE`).
    """

    branch: Branch
    side: int
    size_class: int | None = None
    is_center: bool = False

    @property
    def needed(self) -> Region:
        """Pixels of the crop whose probabilities the graph computes."""
        margin = self.side // MARGIN_SHARE if self.is_center else 0
        return Region(margin, margin, self.side - margin, self.side - margin)


class _Features(nn.Module):
    """The first graph: crop (1, 3, S, S) → feature map and filter."""

    def __init__(self, network: MaskNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_1CHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.features(x_1CHW)


class _MaskLogits(nn.Module):
    """The second graph: feature map and filter → logits (1, 1, 4h, 4w)."""

    def __init__(self, network: MaskNetwork, size_class: int, needed: Region) -> None:
        super().__init__()
        self.network, self._size_class, self._needed = network, size_class, needed

    def forward(self, feat_1CHW: Tensor, filter_1D: Tensor) -> Tensor:
        size_class_1 = torch.tensor([self._size_class])
        return self.network.mask_logits(feat_1CHW, filter_1D, size_class_1, [self._needed])


def import_openvino() -> Any:
    """Returns the module openvino, without its telemetry: nothing is sent.

    Raises:
        ConfigError: OpenVINO is not installed, or was imported with its telemetry before.
    """
    if sys.modules.get("openvino_telemetry") is not None:
        raise ConfigError(
            "network_engine: openvino; this process has imported OpenVINO with its telemetry, which would send events: "
            "load a labeler before anything else imports openvino"
        )
    # None makes its import fail, which OpenVINO handles: the conversion would send an event to its vendor.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        raise ConfigError(
            "network_engine: openvino is not installed; run: pip install 'mask-auto-labeler[openvino]', or use "
            "network_engine: torch"
        ) from None


def _ignore_warnings_of_the_tracer() -> None:
    """Ignores that it is deprecated, and that it freezes shapes: they are constant here.

    For the process: `catch_warnings` around a conversion would also change the filters of all other threads.
    """
    warnings.filterwarnings("ignore", category=TracerWarning)
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")


def int8_network(network: MaskNetwork, calibration: Int8Calibration, prefix: str) -> MaskNetwork:
    """Returns a copy that rounds as int8 kernels of this CPU compute.

    Args:
        network: one of the two networks.
        calibration: ranges of its activations.
        prefix: its name, student or teacher.

    Raises:
        ConfigError: a layer has no range.
    """
    if has_int8_dot_product():
        return quantized(network, calibration.of(prefix))
    # Kernels then add products in pairs in 16 bits, which hold 2 · 255 · 63 and saturate beyond; and those of linear
    # layers take longer than in float32.
    return quantized(network, calibration.of(prefix), weight_levels=63, kinds=(nn.Conv2d,))


def _for_side(network: MaskNetwork, side: int) -> MaskNetwork:
    """Returns a copy for one size of crops: OpenVINO cannot resample position tables."""
    if not isinstance(network.backbone, Vit):
        return network
    clone = copy.copy(network)
    clone._modules = {**network._modules, "backbone": network.backbone.for_grid(side // network.backbone.patch)}
    return clone


def _keys(branch: Branch, side: int) -> tuple[_Key, ...]:
    """Returns all graphs of a network, except that of boxes without a size class."""
    masks = [
        _Key(branch, side, size, is_center) for size in range(len(SIZE_CLASS_SCALE)) for is_center in (False, True)
    ]
    return (_Key(branch, side), *masks)


def _mask_key(branch: Branch, side: int, size_class: int, needed: Region) -> _Key:
    """Returns the smallest mask graph that computes the needed pixels."""
    center = _Key(branch, side, size_class, is_center=True)
    inner = center.needed
    fits = (inner.col0 <= needed.col0 and inner.row0 <= needed.row0) and (
        needed.col1 <= inner.col1 and needed.row1 <= inner.row1
    )
    return center if fits else _Key(branch, side, size_class)


def _options(threads: int) -> dict[str, Any]:
    """Returns the options of a compiled graph: as many passes run in parallel, each in its stream, as fit the cores."""
    streams = max(len(os.sched_getaffinity(0)) // threads, 1)
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": streams * threads,
        # A pinned thread would stay on its core while another process uses it.
        "ENABLE_CPU_PINNING": False,
    }
