"""Calibrates a network for int8: observes its activations on crops of a dataset."""

import itertools
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mal_train.core.errors import BadDataset
from mal_train.core.images.files import ImageSource
from mal_train.core.masks.geometry import Region
from mal_train.core.settings import Branch, LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import PredictOptions
from mal_train.kernel.networks.network import MalNetwork, NetworkOutput
from mal_train.kernel.networks.quantization import Int8Calibration, observed_ranges
from mal_train.offline.dataset_labeler import LabelFailure, Row, label_boxes

DEFAULT_CROPS = 256


def calibrate_int8(
    network: MalNetwork,
    config: LabelerConfig,
    rows: Sequence[Row],
    image_dir: ImageSource,
    *,
    crops: int = DEFAULT_CROPS,
    threads: int = 2,
) -> Int8Calibration:
    """Returns the ranges of the student's activations, in float32 on the CPU.

    Args:
        network: the network; moved to the CPU.
        config: crop size and margin.
        rows: images with their annotations, from `annotations.by_image`.
        image_dir: folder that file names are relative to.
        crops: crops to observe, spread evenly over the boxes; fewer if there are fewer boxes.
        threads: threads for decoding.

    Raises:
        BadDataset: no box can be used; gives the reason of the first one.
        ConfigError: an activation is not finite.
    """
    labeler = Labeler(network, config, engine=_PlainEngine(network.eval()))
    failures: list[LabelFailure] = []
    used = 0
    with observed_ranges(network.student) as ranges:
        options = PredictOptions(whole_map=True)
        selected = _spread(rows, crops)
        for _, result in label_boxes(labeler, selected, image_dir, lambda *_: True, options=options, threads=threads):
            if isinstance(result, LabelFailure):
                failures.append(result)
            else:
                used += 1
    if not used:
        reason = f"{len(failures)} boxes failed; the first: {failures[0].message}" if failures else "it has no boxes"
        raise BadDataset(f"int8: no crops to calibrate with: {reason}")
    return Int8Calibration({f"{Branch.STUDENT}.{name}": bounds for name, bounds in ranges.items()}, used)


class _PlainEngine:
    """Runs the modules themselves, so that their hooks see all activations; one thread at a time."""

    dtype = torch.float32

    def __init__(self, network: MalNetwork) -> None:
        self._network = network
        self._lock = threading.Lock()

    def run(
        self, x_NCHW: Tensor, size_class_N: Tensor, branch: Branch, needed: Sequence[Region] | None = None
    ) -> NetworkOutput:
        """See `Engine.run`."""
        with self._lock:
            return self._network.branch_network(branch).output(x_NCHW, size_class_N, needed)


def _spread(rows: Iterable[Row], count: int) -> list[Row]:
    """Returns the rows with at most `count` usable boxes, spread evenly."""
    usable = [
        (image, annotation)
        for image, annotations in rows
        for annotation in annotations
        if not annotation.iscrowd and annotation.problem is None and image.problem is None
    ]
    step = max(len(usable) / count, 1.0)
    selected = [usable[int(index * step)] for index in range(min(count, len(usable)))]
    groups = itertools.groupby(selected, key=lambda pair: id(pair[0]))
    return [(pairs[0][0], [annotation for _, annotation in pairs]) for _, group in groups if (pairs := list(group))]
