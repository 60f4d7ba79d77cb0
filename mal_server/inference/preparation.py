"""First stage of the pipeline: decodes a request's image and cuts a crop for each box, on the CPU pool.

A small request is one CPU task. A larger one takes several, so that others may run in between, and holds memory of a
`MemoryLimiter` from decoding to its last crop.
"""

import time
from dataclasses import dataclass, replace
from functools import partial

from mal_server.inference.image_store import FileImage, ImageStore
from mal_server.inference.requests import InstanceResult, LabelRequest
from mal_server.inference.worker import Predictor
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.leased_steps import LeasedSteps
from mal_server.scheduling.memory_limiter import MemoryLimiter
from mal_train.core.errors import BadBox, BadImage
from mal_train.core.images.container import Container
from mal_train.core.images.decoder import RgbImage, decode_container
from mal_train.core.images.header import ImageLimits, read_container
from mal_train.core.masks.image_patch import ImagePatch
from mal_train.kernel.labeler.types import Crop

BOXES_PER_TASK = 8
"""Boxes cut, or masks finished, by one CPU task."""

MAX_SMALL_BYTES = 16 * 1024 * 1024
"""Memory to decode the image of a small request, and to cut its boxes: a JPEG of 2 megapixels with boxes of half its
size. Small requests need no memory limit: each thread decodes one at a time."""

RGB_BYTES_PER_PIXEL = 3
"""Memory of a pixel of a decoded image."""


@dataclass(frozen=True)
class Prepared:
    """The outcome for every box of a request.

    Attributes:
        crops: crops of the valid boxes, in the order of the boxes.
        crop_ids: instance id of each crop.
        failed: errors of the other boxes.
        decode_s: CPU seconds.
    """

    crops: list[Crop]
    crop_ids: list[int]
    failed: tuple[InstanceResult, ...]
    decode_s: float

    def for_finish(self) -> "Prepared":
        """Returns what the last stage needs; see `Crop.for_finish`."""
        return replace(self, crops=[crop.for_finish() for crop in self.crops])


@dataclass(frozen=True)
class _OpenImage:
    """An image after the walk through its file.

    Attributes:
        memory_bytes: memory that decoding takes, or cutting the boxes if that is more.
        cutting_bytes: memory that the largest box takes beside the decoded image while it is cut.
        container: None for a file on disk that waits for memory: no limit counts its bytes meanwhile, so it is read
            again afterwards.
    """

    memory_bytes: int
    cutting_bytes: int
    container: Container | None


class CropPreparer:
    """Prepares requests for the device.

    Args:
        predictor: cuts crops.
        pool: threads for CPU work.
        images: reads image files, and keeps decodable images that a request asks to keep.
        limits: larger images are refused before they are decoded.
        memory_limiter: limits the memory of decoded images; shared by all models.
    """

    def __init__(
        self,
        predictor: Predictor,
        pool: PriorityThreadPool,
        images: ImageStore,
        limits: ImageLimits,
        memory_limiter: MemoryLimiter,
    ) -> None:
        self._predictor = predictor
        self._pool = pool
        self._images = images
        self._limits = limits
        self._memory_limiter = memory_limiter

    async def prepare(self, request: LabelRequest, encoded: bytes | None) -> Prepared:
        """Returns the crops of a request; `encoded` is None for a file on disk.

        Raises:
            BadImage: the image cannot be used.
            NotFound, InvalidRequest: the file does not exist, or its path is invalid.
        """
        small = await self._pool.run(request.priority, self._prepare_small, request, encoded, caller=request.caller)
        crops, decode_s = await self._prepare_large(request, small) if isinstance(small, _OpenImage) else small
        outcomes = list(zip(request.instance_ids, crops, strict=True))
        return Prepared(
            crops=[crop for crop in crops if isinstance(crop, Crop)],
            crop_ids=[id_ for id_, crop in outcomes if isinstance(crop, Crop)],
            failed=tuple(InstanceResult(id_, error) for id_, error in outcomes if isinstance(error, BadBox)),
            decode_s=decode_s,
        )

    def _prepare_small(
        self, request: LabelRequest, encoded: bytes | None
    ) -> tuple[list[Crop | BadBox], float] | _OpenImage:
        """Reads, decodes and cuts; returns early if the request needs several tasks."""
        started = time.perf_counter()
        opened, container = self._open(request, encoded)
        if opened.memory_bytes > MAX_SMALL_BYTES or len(request.boxes) > BOXES_PER_TASK:
            return replace(opened, container=None) if isinstance(request.image, FileImage) else opened
        image = self._decode(request, container)
        crops = self._predictor.prepare(_in_place(image, request), request.boxes, points=request.points)
        return crops, time.perf_counter() - started

    async def _prepare_large(self, request: LabelRequest, large: _OpenImage) -> tuple[list[Crop | BadBox], float]:
        async with LeasedSteps(
            self._pool, self._memory_limiter, request.priority, request.caller, large.memory_bytes
        ) as leased:
            image = await leased.run(self._decode_large, request, large)
            leased.shrink(image.nbytes + large.cutting_bytes)
            crops: list[Crop | BadBox] = []
            while len(crops) < len(request.boxes):
                first = len(crops)
                part = slice(first, first + BOXES_PER_TASK)
                points = None if request.points is None else request.points[part]
                prepare = partial(self._predictor.prepare, first=first, points=points)
                crops += await leased.run(prepare, _in_place(image, request), request.boxes[part])
            return crops, leased.cpu_s

    def _open(self, request: LabelRequest, encoded: bytes | None) -> tuple[_OpenImage, Container]:
        """Walks through the image, and returns the memory that it takes: that of a file on disk counts, too."""
        file_bytes = 0
        if isinstance(request.image, FileImage):
            encoded = self._images.read(request.image)
            file_bytes = len(encoded)
        container = read_container(encoded or b"", limits=self._limits)
        width, height = container.header.size_wh
        # No crop of a part of an image is larger than the part.
        boxes = request.boxes if request.region is None else ((0.0, 0.0, float(width), float(height)),)
        cutting_bytes = self._predictor.preparing_bytes((height, width), boxes)
        memory_bytes = max(container.peak_bytes + file_bytes, RGB_BYTES_PER_PIXEL * width * height + cutting_bytes)
        return _OpenImage(memory_bytes, cutting_bytes, container), container

    def _decode_large(self, request: LabelRequest, large: _OpenImage) -> RgbImage:
        container = large.container
        if container is None:
            opened, container = self._open(request, None)
            if opened.memory_bytes > large.memory_bytes or opened.cutting_bytes > large.cutting_bytes:
                raise BadImage("the file changed while the request waited; send it again")
        return self._decode(request, container)

    def _decode(self, request: LabelRequest, container: Container) -> RgbImage:
        image = decode_container(container, expected_wh=request.expected_wh)
        self._images.on_decoded(request.image)
        return image


def _in_place(image: RgbImage, request: LabelRequest) -> RgbImage | ImagePatch:
    """Returns a complete image, or the part of a larger one in its place."""
    region = request.region
    if region is None:
        return image
    width, height = region.image_wh
    return ImagePatch(image, region.x0, region.y0, (height, width))
