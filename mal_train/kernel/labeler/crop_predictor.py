"""Runs the networks on crops: passes on the CPU's cores, branches, mirrored crops, and errors of the device."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mal_train.core.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from mal_train.core.masks import geometry
from mal_train.core.masks.geometry import Region
from mal_train.core.settings import Branch, Compat
from mal_train.core.size_class import network_size_class
from mal_train.kernel.labeler.engine import Engine
from mal_train.kernel.labeler.pass_threads import EqualBits, pass_sizes, pass_threads
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions
from mal_train.kernel.networks.network import NetworkOutput, normalize, probabilities
from mal_train.kernel.networks.regions import mirrored, snapped

CPU_PIXELS_PER_PASS = 2 * 512**2
"""Pixels in one forward pass on one CPU core. More exceed the caches; fewer do not fill the matrix kernels."""

CUDA_ERROR = "CUDA error:"
"""Prefix of CUDA runtime errors. After nearly all of them every later call of the process fails too."""
CUDA_OUT_OF_MEMORY = "CUDA error: out of memory"
"""Prefix of the one exception: the device stays usable."""

_NEEDED_STEP = 8
"""Regions of needed pixels are rounded out to multiples of this, so that few shapes occur (`EqualBits`)."""

MIN_WEIGHT = 1e-6
"""Sum of the weights below which pooled features are scaled down to 0: the mask is empty."""

_Needed = Sequence[Region] | None
"""Pixels of each crop that are needed; None: all."""


class CropPredictor:
    """Predicts crops with one engine on one device.

    Several threads may call it at a time on a CPU, one on a GPU.

    Args:
        engine: runs the networks.
        device: the engine's device.
        compat: clip rule of boxes.
    """

    def __init__(self, engine: Engine, device: torch.device, compat: Compat) -> None:
        self._engine, self._device, self._compat = engine, device, compat
        self._one_crop_each = engine.dtype in (torch.float32, torch.int8)
        self._equal_bits = EqualBits(_are_equal)

    def predict(self, crops: Sequence[Crop], options: PredictOptions) -> list[Prediction]:
        """See `Labeler.predict`."""
        if not crops:
            return []
        try:
            return self._predict_in_passes(crops, options)
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(
                f"a batch of {len(crops)} crops does not fit into {self._device}: {error}"
            ) from error
        except RuntimeError as error:
            if str(error).startswith(CUDA_OUT_OF_MEMORY):
                raise OutOfDeviceMemory(f"a batch of {len(crops)} crops does not fit into {self._device}") from error
            if str(error).startswith(CUDA_ERROR):
                raise DeviceLost(f"{self._device} is lost; restart the process: {error}") from error
            raise DeviceError(f"{self._device} failed on a batch of {len(crops)} crops: {error}") from error

    def max_crops_per_pass(self, crop_size: int) -> int:
        """Returns the largest number of crops of `crop_size` px in one forward pass on the CPU."""
        if self._one_crop_each:
            # Matrix kernels round differently for other batch sizes, and in these precisions the mask of a box must not
            # depend on the other crops in its batch.
            return 1
        return max(CPU_PIXELS_PER_PASS // crop_size**2, 1)

    def _predict_in_passes(self, crops: Sequence[Crop], options: PredictOptions) -> list[Prediction]:
        """Predicts in one pass on a GPU, and on a CPU in passes that its threads share (`pass_threads`)."""
        if self._device.type != "cpu":
            return self._predict_batch(crops, options)
        threads = pass_threads()
        remaining = iter(crops)
        sizes = pass_sizes(len(crops), self.max_crops_per_pass(len(crops[0].pixels)), threads.count)
        batches = [list(itertools.islice(remaining, size)) for size in sizes]

        def predict(batch: Sequence[Crop]) -> list[Prediction]:
            return self._predict_batch(batch, options)

        if not self._one_crop_each:
            results = threads.run(predict, batches)
        elif 2 * len(batches) <= threads.count:
            # One after another on all cores: one core each would leave at least half of them idle.
            results = [self._equal_bits.run(threads, predict, batch, self._kind(batch, options)) for batch in batches]
        else:
            results = threads.run(predict, batches, one_core_each=True)
        return [prediction for predictions in results for prediction in predictions]

    def _kind(self, batch: Sequence[Crop], options: PredictOptions) -> object:
        """Returns what determines the shapes in the pass of a batch."""
        regions = [self._needed(crop) for crop in batch]
        sides = tuple((region.col1 - region.col0, region.row1 - region.row0) for region in regions)
        return len(batch[0].pixels), tuple(self._size_classes(batch).tolist()), sides, options

    def _size_classes(self, crops: Sequence[Crop]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return network_size_class([crop.area for crop in crops], self._compat)

    def _predict_batch(self, crops: Sequence[Crop], options: PredictOptions) -> list[Prediction]:
        """Predicts in one forward pass of each network that the options need."""
        crops_NHWC = torch.from_numpy(np.stack([crop.pixels for crop in crops])).to(self._device, non_blocking=True)
        # Stays on the CPU: its values control the flow in the network.
        size_class_N = torch.from_numpy(self._size_classes(crops))
        side = crops_NHWC.shape[1]
        needed = None if options.whole_map else [self._needed(crop) for crop in crops]
        with torch.inference_mode():
            outputs = self._branch_outputs(normalize(crops_NHWC), size_class_N, options, needed)
            prob_NHW = {branch: probabilities(z.logits_N1HW, side) for branch, z in outputs.items()}
            asked = outputs[options.branch].feat_NCHW
            pooled_NC = pooled_features(asked, prob_NHW[options.branch], [self._needed(crop) for crop in crops])
        pooled = [features.copy() for features in pooled_NC.cpu().numpy()]
        # Copies: a view of one crop would keep the maps of the whole batch in memory.
        maps = {branch: [prob_HW.copy() for prob_HW in prob.cpu().numpy()] for branch, prob in prob_NHW.items()}
        if not options.agreement:
            return [Prediction(prob, pooled=pool) for prob, pool in zip(maps[options.branch], pooled, strict=True)]
        columns = (maps[options.branch], maps[Branch.STUDENT], maps[Branch.TEACHER], pooled)
        return [Prediction(*each) for each in zip(*columns, strict=True)]

    def _branch_outputs(
        self, x_NCHW: Tensor, size_class_N: Tensor, options: PredictOptions, needed: _Needed
    ) -> dict[Branch, NetworkOutput]:
        """Returns the output of the requested branch and of each network that was run."""
        needs_both = options.agreement or options.branch is Branch.MIXED
        networks = (Branch.STUDENT, Branch.TEACHER) if needs_both else (options.branch,)
        outputs = {
            network: self._network_output(x_NCHW, size_class_N, network, options.flip, needed) for network in networks
        }
        if options.branch is Branch.MIXED:
            outputs[Branch.MIXED] = _mean(outputs[Branch.STUDENT], outputs[Branch.TEACHER])
        return outputs

    def _network_output(
        self, x_NCHW: Tensor, size_class_N: Tensor, branch: Branch, flip: bool, needed: _Needed
    ) -> NetworkOutput:
        output = self._engine.run(x_NCHW, size_class_N, branch, needed)
        if not flip:
            return output
        flipped = None if needed is None else [mirrored(region, x_NCHW.shape[-1]) for region in needed]
        mirror = self._engine.run(x_NCHW.flip(-1), size_class_N, branch, flipped)
        return _mean(output, NetworkOutput(mirror.logits_N1HW.flip(-1), mirror.feat_NCHW.flip(-1)))

    def _needed(self, crop: Crop) -> Region:
        """Returns a region of the crop with all pixels on which the mask of its box depends."""
        side = len(crop.pixels)
        region = geometry.pixels_of_mask(crop.box_inside, crop.window, crop.image_hw, side, self._compat)
        return snapped(region, _NEEDED_STEP, side)


def _mean(a: NetworkOutput, b: NetworkOutput) -> NetworkOutput:
    return NetworkOutput((a.logits_N1HW + b.logits_N1HW) / 2, (a.feat_NCHW + b.feat_NCHW) / 2)


def pooled_features(feat_NCHW: Tensor, prob_NHW: Tensor, needed: Sequence[Region]) -> Tensor:
    """Returns the mean (N, C) of each feature over the cells of the map, weighted by their foreground probability.

    Args:
        feat_NCHW: feature maps.
        prob_NHW: foreground probabilities of the pixels of the crops.
        needed: region of each crop outside of which the probabilities are taken as 0: an engine may compute more.
    """
    inside_NHW = torch.zeros_like(prob_NHW)
    for inside_HW, prob_HW, region in zip(inside_NHW, prob_NHW, needed, strict=True):
        pixels = slice(region.row0, region.row1), slice(region.col0, region.col1)
        inside_HW[pixels] = prob_HW[pixels]
    height, width = feat_NCHW.shape[-2:]
    weight_N1hw = functional.adaptive_avg_pool2d(inside_NHW[:, None], (height, width))
    total_N1 = weight_N1hw.flatten(2).sum(-1)
    return (feat_NCHW * weight_N1hw).flatten(2).sum(-1) / total_N1.clamp_min(MIN_WEIGHT)


def _are_equal(left: list[Prediction], right: list[Prediction]) -> bool:
    return all(
        np.array_equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in (
            (one.prob, other.prob),
            (one.pooled, other.pooled),
            (one.student, other.student),
            (one.teacher, other.teacher),
        )
        if a is not None and b is not None
    )
