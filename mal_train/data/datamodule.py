"""Loads training batches: cuts samples in loader processes and collates them into uint8 batches.

A sample depends only on (seed, epoch, box index), not on the process that cuts it or on earlier samples, so a resumed
run sees the same samples as an uninterrupted one. Training processes split each global batch, so that together they see
the same boxes as one process with a batch of that size.

Letters: N samples of a batch, M of them with a mask, H = W = crop size, C channels.
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
from mal_train.core.images.decoder import RgbImage, check_expected_size
from mal_train.core.images.files import read_image
from mal_train.core.images.large_tiff import open_large
from mal_train.core.images.pixels import FormatCounts, PixelFormat
from mal_train.core.images.tiff_reader import TiffReader
from mal_train.core.masks.geometry import box_area
from mal_train.core.size_class import network_size_class
from mal_train.core.storage.addresses import redact
from mal_train.core.storage.retry import TRAINING_ATTEMPTS
from mal_train.data.annotations import SHUFFLE_BYTES, TrainingBoxes, epoch_order
from mal_train.data.augment import Cropping, Views, make_views

CACHE_BYTES = SHUFFLE_BYTES + SHUFFLE_BYTES // 2
"""Maximum bytes of decoded images in a loader process: one shuffle group and the start of the next."""
SHARED_MEMORY = "/dev/shm"
"""File system through which loader processes pass batches."""
STRETCHED, DROPPED = 1, 2
"""Flags of an image whose values are stretched, or that has bands that are not used."""
MAX_REPLACEMENTS = 16
"""Maximum number of boxes tried for one sample, while their images cannot be read."""


class Batch(NamedTuple):
    """N collated samples.

    Attributes:
        student_NHWC: uint8 RGB.
        teacher_NHWC: uint8 RGB.
        box_mask_NHW: uint8, 0 and 1.
        size_class_N: int64 size class of each box; stays on the CPU, where the network selects its filters.
        bad_images: reason and message of each image that could not be read.
        mask_MHW: uint8 masks, 0 and 1; None if no sample has one.
        masked_M: int64 indices of the samples with a mask.
        mask_weight_M: float32 weight of each mask.
        weight: factor of the loss of the batch; 1 unless processes split the last global batch of an epoch unevenly.
    """

    student_NHWC: Tensor
    teacher_NHWC: Tensor
    box_mask_NHW: Tensor
    size_class_N: Tensor
    bad_images: tuple[str, ...]
    mask_MHW: Tensor | None = None
    masked_M: Tensor | None = None
    mask_weight_M: Tensor | None = None
    weight: float = 1.0

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch with its pixels and mask weights on `device`."""
        return self._replace(
            student_NHWC=self.student_NHWC.to(device, non_blocking=True),
            teacher_NHWC=self.teacher_NHWC.to(device, non_blocking=True),
            box_mask_NHW=self.box_mask_NHW.to(device, non_blocking=True),
            mask_MHW=None if self.mask_MHW is None else self.mask_MHW.to(device, non_blocking=True),
            mask_weight_M=None if self.mask_weight_M is None else self.mask_weight_M.to(device, non_blocking=True),
        )


class Sample(NamedTuple):
    """Crop of one box, before collation."""

    views: Views
    size_class: int
    bad_images: tuple[str, ...] = ()
    weight: float = 1.0
    mask_weight: float = 1.0


class SampleIndex(NamedTuple):
    """Index of a sample: epoch, box, and the weight of the loss of its batch."""

    epoch: int
    box: int
    weight: float = 1.0


class BoxDataset(Dataset[Sample]):
    """Dataset that cuts the sample of (epoch, box). Each process has its own cache of decoded images.

    Args:
        boxes: the boxes.
        cropping: how samples are cut.
        seed: of the augmentation.
        formats: (images,) uint8 flags of the decoded images, STRETCHED and DROPPED, that processes share; None: own.
    """

    def __init__(self, boxes: TrainingBoxes, cropping: Cropping, seed: int, formats: Tensor | None = None) -> None:
        self.boxes = boxes
        self.formats = torch.zeros(len(boxes.paths), dtype=torch.uint8) if formats is None else formats
        self.cropping = cropping
        self.seed = seed
        self._decoded: OrderedDict[int, RgbImage | TiffReader] = OrderedDict()
        self._decoded_bytes = 0

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, key: tuple[int, int] | SampleIndex) -> Sample:
        """Returns the sample of a box in an epoch; if its image cannot be read, that of a random other box.

        Raises:
            BadDataset: the images of MAX_REPLACEMENTS boxes in a row cannot be read.
        """
        epoch, index, weight = SampleIndex(*key)
        rng = np.random.default_rng([self.seed, epoch, index])
        bad_images: list[str] = []
        for _ in range(MAX_REPLACEMENTS):
            try:
                sample = self._cut(self._image(int(self.boxes.image_of_box[index])), index, rng)
            except BadImage as error:
                bad_images.append(f"{error.reason}: {error}")
                index = int(rng.integers(len(self.boxes)))
                continue
            return sample._replace(bad_images=tuple(bad_images), weight=weight)
        raise BadDataset(f"images of {MAX_REPLACEMENTS} boxes in a row cannot be read; the last: {bad_images[-1]}")

    def _cut(self, image: RgbImage | TiffReader, index: int, rng: np.random.Generator) -> Sample:
        box = self.boxes.box(index)
        mask = self.boxes.masks[index] if self.boxes.masks else None
        weights = self.boxes.mask_weights
        return Sample(
            make_views(image, box, self.cropping, rng, mask, limits=self.boxes.limits),
            int(network_size_class(box_area(box), self.cropping.compat)),
            mask_weight=1.0 if weights is None else float(weights[index]),
        )

    def _image(self, index: int) -> RgbImage | TiffReader:
        image = self._decoded.get(index)
        if image is None:
            image = self._open(index)
            self._decoded_bytes += _cached_bytes(image)
            while self._decoded and self._decoded_bytes > CACHE_BYTES:
                _, oldest = self._decoded.popitem(last=False)
                self._decoded_bytes -= _cached_bytes(oldest)
        self._decoded[index] = image
        self._decoded.move_to_end(index)
        return image

    def _open(self, index: int) -> RgbImage | TiffReader:
        """Decodes an image; a TIFF above the limits is read by windows later."""
        path, limits = self.boxes.paths[index], self.boxes.limits
        width, height = (int(v) for v in self.boxes.size_wh[index])
        large = open_large(path, limits, str(path))
        if large is not None:
            header, reader = large
            check_expected_size(header, (width, height), str(path))
            self._note_format(index, header.pixel_format)
            return reader
        return read_image(
            path,
            expected_wh=(width, height),
            limits=limits,
            hosts=self.boxes.hosts,
            attempts=TRAINING_ATTEMPTS,
            on_format=lambda found: self._note_format(index, found),
        )

    def _note_format(self, index: int, found: PixelFormat) -> None:
        self.formats[index] = STRETCHED * found.is_stretched + DROPPED * bool(found.dropped_bands)


def _cached_bytes(image: RgbImage | TiffReader) -> int:
    """Returns what an image counts in the cache; one that is read by windows, a shuffle group, as in `epoch_order`."""
    return SHUFFLE_BYTES if isinstance(image, TiffReader) else image.nbytes


class EpochOrder(Sampler[SampleIndex]):
    """Sampler of one process; the trainer calls `set_epoch` before each epoch.

    `epoch_order` is split into global batches of `batch_size` boxes per process, and each process takes its slice of
    every global batch: each box is used exactly once. In the last global batch a process may have one box fewer than
    another, or none; it then gets a box with loss weight 0, because every process must take part in every step. The
    boxes of a global batch are sorted by image, so that few processes open the same image; the gradient of a step does
    not depend on that order.

    Args:
        boxes: all boxes.
        seed: seed of the order.
        batch_size: boxes per step and process.
        rank: rank of this process.
        world_size: number of processes.
    """

    def __init__(
        self, boxes: TrainingBoxes, seed: int, batch_size: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        self.boxes = boxes
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        n_full, remainder = divmod(len(self.boxes), self.batch_size * self.world_size)
        return n_full * self.batch_size + (max(1, self._rank_slice(remainder)[1]) if remainder else 0)

    def __iter__(self) -> Iterator[SampleIndex]:
        epoch, skip = self.epoch, self.skip
        self.skip = 0
        return itertools.islice(self._samples(epoch), skip, None)

    def _samples(self, epoch: int) -> Iterator[SampleIndex]:
        order = epoch_order(self.boxes, self.seed, epoch)
        global_batch_size = self.batch_size * self.world_size
        for start in range(0, len(order), global_batch_size):
            global_batch = order[start : start + global_batch_size]
            if self.world_size > 1:
                global_batch = global_batch[np.argsort(self.boxes.image_of_box[global_batch], kind="stable")]
            first, count = self._rank_slice(len(global_batch))
            local_batch = global_batch[first : first + count] if count else global_batch[:1]
            # Gradients are averaged over processes; with this weight the average is the mean over the global batch.
            weight = count * self.world_size / len(global_batch)
            yield from (SampleIndex(epoch, int(index), weight) for index in local_batch)

    def _rank_slice(self, count: int) -> tuple[int, int]:
        """Returns the start and length of this process's slice of `count` boxes; lengths differ by one at most."""
        start = count * self.rank // self.world_size
        return start, count * (self.rank + 1) // self.world_size - start


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of the data loader of one training process.

    Attributes:
        batch_size: boxes per batch; the last batch of an epoch may be smaller.
        num_workers: number of loader processes; 0 loads in the training process.
        seed: seed of order and augmentation, at least 0.
        pin_memory: put batches into page-locked memory, for CUDA.
        rank: rank of this training process.
        world_size: number of training processes.
    """

    batch_size: int
    num_workers: int
    seed: int
    pin_memory: bool = False
    rank: int = 0
    world_size: int = 1


class BoxDataModule(lightning.LightningDataModule):
    """Lightning data module of the training set."""

    def __init__(self, boxes: TrainingBoxes, cropping: Cropping, settings: LoaderSettings) -> None:
        super().__init__()
        self.boxes = boxes
        self.cropping = cropping
        self.settings = settings
        self._order = EpochOrder(boxes, settings.seed, settings.batch_size, settings.rank, settings.world_size)
        self._formats = torch.zeros(len(boxes.paths), dtype=torch.uint8)
        if settings.num_workers:
            self._formats.share_memory_()  # type: ignore[no-untyped-call]

    def formats(self) -> FormatCounts:
        """Returns the images that this process and its loaders decoded whose values or bands are not used as stored."""
        counts = FormatCounts()
        for flag, names in ((STRETCHED, counts.stretched), (DROPPED, counts.dropped)):
            names.update(
                redact(self.boxes.paths[index]) for index in (self._formats & flag).nonzero().flatten().tolist()
            )
        return counts

    def resume_from(self, epoch: int, batches: int) -> None:
        """Sets the first epoch and skips its first `batches`, which the interrupted run has trained on.

        Needed because Lightning opens the loader of a resumed run before it sets the epoch.
        """
        self._order.set_epoch(epoch)
        self._order.skip = batches * self.settings.batch_size

    def train_dataloader(self) -> DataLoader[Sample]:
        """Returns the loader; each iteration is one epoch."""
        return DataLoader(
            BoxDataset(self.boxes, self.cropping, self.settings.seed, self._formats),
            sampler=self._order,
            batch_size=self.settings.batch_size,
            num_workers=self.settings.num_workers,
            persistent_workers=self.settings.num_workers > 0,
            pin_memory=self.settings.pin_memory,
            collate_fn=collate,
            worker_init_fn=ignore_shutdown_signals,
        )


def ignore_shutdown_signals(worker: int) -> None:
    """Ignores SIGTERM and SIGINT, which reach all processes of a group; the trainer needs its loader to end a step."""
    del worker
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def collate(samples: list[Sample]) -> Batch:
    """Stacks samples of one crop size; in a loader process, in shared memory.

    Raises:
        OutputError: shared memory is full.
    """
    batch = _stack(samples)
    if get_worker_info() is not None:
        # Done here because a failure in the queue of torch prints a trace and drops the batch, and the trainer hangs.
        _move_to_shared_memory([tensor for tensor in batch if isinstance(tensor, Tensor)])
    return batch


def _move_to_shared_memory(tensors: list[Tensor]) -> None:
    try:
        for tensor in tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        needed = sum(tensor.nbytes for tensor in tensors)
        raise shared_memory_error(f"a batch needs {needed} bytes") from error


def shared_memory_error(need: str) -> OutputError:
    """Returns the error for full shared memory; `need` states what needs it."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    return OutputError(
        f"{SHARED_MEMORY}: full; {free} bytes are free and {need}; enlarge it (docker: --shm-size=4g) or set "
        "dataset.num_workers_per_gpu to 0"
    )


def _stack(samples: list[Sample]) -> Batch:
    masked = [(n, sample.views.mask) for n, sample in enumerate(samples) if sample.views.mask is not None]
    return Batch(
        torch.from_numpy(np.stack([sample.views.student for sample in samples])),
        torch.from_numpy(np.stack([sample.views.teacher for sample in samples])),
        torch.from_numpy(np.stack([sample.views.box_mask for sample in samples])),
        torch.tensor([sample.size_class for sample in samples], dtype=torch.int64),
        tuple(message for sample in samples for message in sample.bad_images),
        torch.from_numpy(np.stack([mask for _, mask in masked])) if masked else None,
        torch.tensor([n for n, _ in masked], dtype=torch.int64) if masked else None,
        torch.tensor([samples[n].mask_weight for n, _ in masked], dtype=torch.float32) if masked else None,
        samples[0].weight,
    )
