"""Feeds training: boxes in an order set by seed and epoch, cut in loader processes, collated into uint8 batches.

What a sample looks like depends on (seed, epoch, index) alone, not on which process makes it or what came before: a
run that goes on at an epoch's start sees what an undisturbed one would have seen. Several training processes share each
stretch of the order, so that together they see what one process with a batch as large would see.
"""

import itertools
import shutil
import signal
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from mal_train.core.errors import BadDataset, BadImage, OutputError
from mal_train.core.masks import rle
from mal_train.core.masks.geometry import box_area
from mal_train.core.masks.images import RgbImage, read_image
from mal_train.core.settings import network_branch
from mal_train.data.annotations import WINDOW_BYTES, TrainingBoxes, epoch_order
from mal_train.data.augment import Cropping, Views, make_views

CACHE_BYTES = WINDOW_BYTES + WINDOW_BYTES // 2
"""Decoded pictures that a loader process keeps: one window of the order and the start of the next."""
SHARED_MEMORY = "/dev/shm"
"""Through which loader processes hand over batches."""
REPLACEMENTS = 16
"""Other boxes tried in the place of one whose picture cannot be read."""


class Batch(NamedTuple):
    """N samples; S is the crop size.

    student_NHWC and teacher_NHWC are uint8 RGB, box_mask_NHW uint8 with values 0 and 1. branch_N (int64 size branch)
    stays on the CPU, where it steers the network. bad_images names pictures that could not be read, with the reason.
    mask_MHW (uint8, 0 and 1) are the masks of the M samples that masked_M (int64) counts, and mask_weight_M (float32)
    how much each counts; None without any. weight is the factor of the whole batch's loss: 1, but where several
    processes share an epoch's last stretch unevenly.
    """

    student_NHWC: Tensor
    teacher_NHWC: Tensor
    box_mask_NHW: Tensor
    branch_N: Tensor
    bad_images: tuple[str, ...]
    mask_MHW: Tensor | None = None
    masked_M: Tensor | None = None
    mask_weight_M: Tensor | None = None
    weight: float = 1.0

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its pixels on `device`."""
        return self._replace(
            student_NHWC=self.student_NHWC.to(device, non_blocking=True),
            teacher_NHWC=self.teacher_NHWC.to(device, non_blocking=True),
            box_mask_NHW=self.box_mask_NHW.to(device, non_blocking=True),
            mask_MHW=None if self.mask_MHW is None else self.mask_MHW.to(device, non_blocking=True),
            mask_weight_M=None if self.mask_weight_M is None else self.mask_weight_M.to(device, non_blocking=True),
        )


class Sample(NamedTuple):
    """One box, cut."""

    views: Views
    branch: int
    bad_images: tuple[str, ...]
    weight: float = 1.0
    mask_weight: float = 1.0


class SampleIndex(NamedTuple):
    """Which box in which epoch, and the weight of its batch's loss."""

    epoch: int
    box: int
    weight: float = 1.0


class BoxDataset(Dataset[Sample]):
    """Cuts the sample of (epoch, index). Every process that holds a copy keeps its own few decoded pictures."""

    def __init__(self, boxes: TrainingBoxes, cropping: Cropping, seed: int) -> None:
        self.boxes = boxes
        self.cropping = cropping
        self.seed = seed
        self._decoded: OrderedDict[int, RgbImage] = OrderedDict()
        self._decoded_bytes = 0

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, key: tuple[int, int] | SampleIndex) -> Sample:
        """The sample of box `index` in `epoch`; another box in its place where its picture cannot be read.

        Raises:
            BadDataset: the pictures of REPLACEMENTS boxes in a row cannot be read.
        """
        epoch, index, weight = SampleIndex(*key)
        rng = np.random.default_rng([self.seed, epoch, index])
        bad: list[str] = []
        for _ in range(REPLACEMENTS):
            try:
                image = self._image(int(self.boxes.image_of_box[index]))
            except BadImage as error:
                bad.append(str(error))
                index = int(rng.integers(len(self.boxes)))
                continue
            box = self.boxes.box(index)
            branch = int(network_branch(box_area(box), self.cropping.compat))
            code = self.boxes.masks[index] if self.boxes.masks else None
            mask = None if code is None else rle.decode_mask(code)
            weights = self.boxes.mask_weights
            mask_weight = 1.0 if weights is None else float(weights[index])
            return Sample(make_views(image, box, self.cropping, rng, mask), branch, tuple(bad), weight, mask_weight)
        raise BadDataset(f"{REPLACEMENTS} pictures in a row cannot be read, the last: {bad[-1]}")

    def _image(self, index: int) -> RgbImage:
        image = self._decoded.get(index)
        if image is None:
            width, height = (int(v) for v in self.boxes.size_wh[index])
            image = read_image(self.boxes.paths[index], expected_wh=(width, height))
            self._decoded_bytes += image.nbytes
            while self._decoded and self._decoded_bytes > CACHE_BYTES:
                _, oldest = self._decoded.popitem(last=False)
                self._decoded_bytes -= oldest.nbytes
        self._decoded[index] = image
        self._decoded.move_to_end(index)
        return image


class EpochOrder(Sampler[SampleIndex]):
    """One process's places of every epoch; the trainer calls `set_epoch` before each epoch.

    The order of `epoch_order` is cut into stretches of `batch_size` boxes for each process, and a process takes its
    part of each: no box twice, none left out. The last stretch may give one process a box less than another, or none;
    that one gets a box of the stretch whose loss counts 0, because all must take part in every step. Within a stretch
    the boxes go by picture, so that few processes open the same one; the step's gradient is the stretch's either way.

    Args:
        boxes: all there are.
        seed: of the order.
        batch_size: boxes that one process takes at a time.
        rank: of this process.
        size: number of processes.
    """

    def __init__(self, boxes: TrainingBoxes, seed: int, batch_size: int = 1, rank: int = 0, size: int = 1) -> None:
        self.boxes = boxes
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.size = size
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Number of the epoch that the next iteration belongs to."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.boxes), self.batch_size * self.size)
        return whole * self.batch_size + (max(1, self._share(rest)[1]) if rest else 0)

    def __iter__(self) -> Iterator[SampleIndex]:
        epoch, skip = self.epoch, self.skip
        self.skip = 0
        return itertools.islice(self._places(epoch), skip, None)

    def _places(self, epoch: int) -> Iterator[SampleIndex]:
        order = epoch_order(self.boxes, self.seed, epoch)
        stretch = self.batch_size * self.size
        for start in range(0, len(order), stretch):
            members = order[start : start + stretch]
            if self.size > 1:
                members = members[np.argsort(self.boxes.image_of_box[members], kind="stable")]
            first, count = self._share(len(members))
            mine = members[first : first + count] if count else members[:1]
            # Gradients are averaged over processes; so weighted, the average is the mean over the stretch.
            weight = count * self.size / len(members)
            yield from (SampleIndex(epoch, int(index), weight) for index in mine)

    def _share(self, count: int) -> tuple[int, int]:
        """Where this process's part of `count` boxes starts, and its length; parts differ by one box at most."""
        start = count * self.rank // self.size
        return start, count * (self.rank + 1) // self.size - start


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are made.

    Attributes:
        batch_size: boxes in a batch of one process; the last one of an epoch may be smaller.
        num_workers: loader processes of each process; 0 works in the main one.
        seed: of order and augmentation, ≥ 0.
        pin_memory: page-locked batches, for CUDA.
        rank: of this training process.
        size: number of training processes.
    """

    batch_size: int
    num_workers: int
    seed: int
    pin_memory: bool = False
    rank: int = 0
    size: int = 1


class BoxDataModule(lightning.LightningDataModule):
    """The training loader, as Lightning wants it."""

    def __init__(self, boxes: TrainingBoxes, cropping: Cropping, settings: LoaderSettings) -> None:
        super().__init__()
        self.boxes = boxes
        self.cropping = cropping
        self.settings = settings
        self._order = EpochOrder(boxes, settings.seed, settings.batch_size, settings.rank, settings.size)

    def resume_from(self, epoch: int, batches: int) -> None:
        """Begin with this epoch, and leave out its first batches: a run that was cut off has trained on them.

        Lightning opens the loader of a resumed run before it says which epoch it is.
        """
        self._order.set_epoch(epoch)
        self._order.skip = batches * self.settings.batch_size

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches of one epoch after the other."""
        return DataLoader(
            BoxDataset(self.boxes, self.cropping, self.settings.seed),
            sampler=self._order,
            batch_size=self.settings.batch_size,
            num_workers=self.settings.num_workers,
            persistent_workers=self.settings.num_workers > 0,
            pin_memory=self.settings.pin_memory,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_trainer,
        )


def leave_signals_to_the_trainer(worker: int) -> None:
    """SIGTERM and Ctrl-C reach whole groups of processes; the trainer needs its loader to end the step at hand."""
    del worker
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def collate(samples: list[Sample]) -> Batch:
    """Stacks samples of one crop size; in a loader process into shared memory.

    Raises:
        OutputError: shared memory is full.
    """
    batch = _stack(samples)
    if get_worker_info() is not None:
        # Here and not on the way out, where torch would print a trace, drop the batch, and let the trainer wait for it.
        _share([tensor for tensor in batch if isinstance(tensor, Tensor)])
    return batch


def _share(tensors: list[Tensor]) -> None:
    try:
        for tensor in tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        needed = sum(tensor.nbytes for tensor in tensors)
        raise no_shared_memory(f"where a batch takes {needed}") from error


def no_shared_memory(need: str) -> OutputError:
    """What to say when loader processes have no room left."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    return OutputError(
        f"{SHARED_MEMORY}: full, {free} bytes are free {need}; give it more room (docker: --shm-size=4g), or set "
        "dataset.num_workers_per_gpu to 0, which needs none"
    )


def _stack(samples: list[Sample]) -> Batch:
    masked = [(n, sample.views.mask) for n, sample in enumerate(samples) if sample.views.mask is not None]
    return Batch(
        torch.from_numpy(np.stack([sample.views.student for sample in samples])),
        torch.from_numpy(np.stack([sample.views.teacher for sample in samples])),
        torch.from_numpy(np.stack([sample.views.box_mask for sample in samples])),
        torch.tensor([sample.branch for sample in samples], dtype=torch.int64),
        tuple(text for sample in samples for text in sample.bad_images),
        torch.from_numpy(np.stack([mask for _, mask in masked])) if masked else None,
        torch.tensor([n for n, _ in masked], dtype=torch.int64) if masked else None,
        torch.tensor([samples[n].mask_weight for n, _ in masked], dtype=torch.float32) if masked else None,
        samples[0].weight,
    )
