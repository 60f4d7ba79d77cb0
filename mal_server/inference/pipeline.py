"""A request's way from encoded image to masks: prepare, wait for a batch, finish. Knows nothing of gRPC or protos.

    LabelRequest → prepare (CPU pool) → Batcher (device) → finish (CPU pool) → PartialResult, PartialResult, …

Two modes: streaming returns a PartialResult for each device batch that held crops of the request; a request with
`resolve_overlaps` is collected, since overlaps can be resolved only after all of its batches have finished.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from mal_server.inference.finishing import CropSlice, MaskFinisher
from mal_server.inference.image_store import FileImage, ImageStore
from mal_server.inference.preparation import RGB_BYTES_PER_PIXEL, CropPreparer, Prepared
from mal_server.inference.requests import (
    InstanceResult,
    LabelRequest,
    PartialResult,
    ResultBudget,
    Timing,
    merge,
    merge_timings,
)
from mal_server.inference.worker import Predictor
from mal_server.ops.metrics import Metrics
from mal_server.scheduling.admission import Admission, DeadlineExceeded
from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.memory_limiter import MemoryLimiter
from mal_train.core.images.header import ImageLimits
from mal_train.core.settings import Branch
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions

CropBatcher = Batcher[PredictOptions, Crop, Prediction]
CropAdmission = Admission[PredictOptions, Crop, Prediction]

ENCODED_COPIES = 2
"""An encoded image is in the message and in the request that is read from it."""


class Pipeline:
    """Labels requests with one model.

    Args:
        predictor: prepares and finishes; the workers' own ones predict.
        batcher: shared by all requests.
        pool: threads for CPU work.
        images: resolves image sources.
        limits: larger images are refused before they are decoded.
        memory_limiter: limits the memory of decoded images and pasted masks.
        crop_size: side of a crop in px.
        max_result_bytes: limit of the masks of a request whose results are collected.
        metrics: receives stages, masks and timings.
    """

    def __init__(
        self,
        predictor: Predictor,
        batcher: CropBatcher,
        pool: PriorityThreadPool,
        images: ImageStore,
        limits: ImageLimits,
        *,
        memory_limiter: MemoryLimiter,
        crop_size: int,
        max_result_bytes: int,
        metrics: Metrics,
    ) -> None:
        self._predictor = predictor
        self._batcher = batcher
        self._images = images
        self._preparer = CropPreparer(predictor, pool, images, limits, memory_limiter)
        self._finisher = MaskFinisher(
            predictor, pool, memory_limiter, crop_size=crop_size, max_result_bytes=max_result_bytes
        )
        self._crop_pixels = crop_size**2
        self._max_result_bytes = max_result_bytes
        self._metrics = metrics

    async def label(self, request: LabelRequest) -> AsyncGenerator[PartialResult, None]:
        """Yields partial results, at least one, that together hold every instance once.

        Raises:
            QueueFull: too many requests are waiting.
            DeadlineExceeded: the deadline passed.
            BadImage: the image cannot be used.
            NotFound, InvalidRequest: the image is not on the server, or its path is invalid.
            DeviceLost: the device failed for good.
        """
        async with self._admitted(request) as (admission, partials):
            async for partial in partials:
                admission.hold(partial.size_bytes)
                yield partial
                admission.free_taken()

    @asynccontextmanager
    async def labeled(self, request: LabelRequest) -> AsyncIterator[PartialResult]:
        """Returns all results of a request as one, whose memory is counted until the context ends.

        Raises:
            ResponseTooLarge: the masks exceed `max_result_bytes`.
            Exception: the errors of `label`.
        """
        budget = ResultBudget(self._max_result_bytes)
        collected = []
        async with self._admitted(request) as (admission, partials):
            async for partial in partials:
                budget.spent_on(partial.results)
                collected.append(partial)
            merged = merge(collected)
            admission.hold(merged.size_bytes)
            yield merged

    async def label_merged(self, request: LabelRequest) -> PartialResult:
        """Returns all results of a request as one. Raises the errors of `labeled`."""
        async with self.labeled(request) as result:
            return result

    @asynccontextmanager
    async def _admitted(
        self, request: LabelRequest
    ) -> AsyncIterator[tuple[CropAdmission, AsyncGenerator[PartialResult, None]]]:
        """Admits a request; returns the capacity that it holds until the context ends, and its partial results."""
        encoded = None if isinstance(request.image, FileImage) else self._images.get(request.image)
        with self._admit(request, encoded) as admission:
            async with aclosing(self._partials(request, encoded, admission)) as partials:
                yield admission, partials

    async def _partials(
        self, request: LabelRequest, encoded: bytes | None, admission: CropAdmission
    ) -> AsyncGenerator[PartialResult, None]:
        prepared = await self._preparer.prepare(request, encoded)
        self._metrics.decoded(prepared.decode_s)
        if not prepared.crops:
            yield PartialResult(prepared.failed, Timing(decode_s=prepared.decode_s))
            return
        slices = admission.submit(request.predict_options, prepared.crops)
        # From here on only the queue has the pixels, and drops those of a crop when its batch has run; but those of
        # boxes with points stay until the request ends.
        prepared = prepared.for_finish()
        async with aclosing(slices):
            if request.output_options.resolve_overlaps:
                yield await self._collect(request, prepared, slices)
                return
            async with aclosing(self._stream(request, prepared, slices)) as partials:
                async for partial in partials:
                    yield partial

    def _admit(self, request: LabelRequest, encoded: bytes | None) -> CropAdmission:
        # A file on disk takes no memory while its request waits.
        return self._batcher.admit(
            max(len(request.boxes), 1),
            size_bytes=len(request.boxes) * self._bytes_of_a_box(request),
            shared_bytes=ENCODED_COPIES * len(encoded or b"") + self._kept_bytes(request),
            priority=request.priority,
            caller=request.caller,
            deadline=request.deadline,
        )

    def _bytes_of_a_box(self, request: LabelRequest) -> int:
        """Returns the memory of a box: first its crop, uint8 RGB, then its maps, float32."""
        options = request.predict_options
        maps = 1 if not options.agreement else 3 if options.branch is Branch.MIXED else 2
        return max(RGB_BYTES_PER_PIXEL, 4 * maps) * self._crop_pixels

    def _kept_bytes(self, request: LabelRequest) -> int:
        """Returns the memory of the crops of boxes with points, which are kept until the request ends."""
        with_points = sum(map(bool, request.points or ()))
        return with_points * RGB_BYTES_PER_PIXEL * self._crop_pixels

    async def _stream(
        self, request: LabelRequest, prepared: Prepared, slices: AsyncGenerator[CropSlice, None]
    ) -> AsyncGenerator[PartialResult, None]:
        """Yields the masks of each batch as it finishes; the first partial result also holds the invalid boxes."""
        failed = prepared.failed
        async for batch_slice in slices:
            self._check_deadline(request, batch_slice)
            results, finish_s = await self._finisher.finish(request, prepared, batch_slice)
            timing = replace(_timing(batch_slice, prepared), finish_s=finish_s)
            del batch_slice  # its maps, while the caller takes the masks
            yield self._partial_result((*failed, *results), timing)
            failed = ()

    async def _collect(
        self, request: LabelRequest, prepared: Prepared, slices: AsyncGenerator[CropSlice, None]
    ) -> PartialResult:
        """Waits for all batches, then returns masks that do not overlap."""
        collected: list[CropSlice] = []
        async for batch_slice in slices:
            self._check_deadline(request, batch_slice)
            collected.append(batch_slice)
        results, finish_s = await self._finisher.finish_resolved(request, prepared, collected)
        timing = merge_timings([_timing(batch_slice, prepared) for batch_slice in collected])
        return self._partial_result((*prepared.failed, *results), replace(timing, finish_s=finish_s))

    def _check_deadline(self, request: LabelRequest, batch_slice: CropSlice) -> None:
        if request.deadline <= asyncio.get_running_loop().time():
            self._metrics.dropped("deadline_encoding", len(batch_slice.indices))
            raise DeadlineExceeded("the deadline passed before the masks were encoded")

    def _partial_result(self, results: tuple[InstanceResult, ...], timing: Timing) -> PartialResult:
        """Returns the results of some batches and records them in metrics and traces."""
        self._metrics.finished(timing.finish_s)
        for result in results:
            if isinstance(result.outcome, Label):
                self._metrics.labeled(result.outcome.flags)
        self._metrics.part_done(timing)
        return PartialResult(results, timing)


def _timing(batch_slice: CropSlice, prepared: Prepared) -> Timing:
    return Timing(batch_slice.queue_s, prepared.decode_s, batch_slice.run_s, 0.0, batch_slice.batch_size)
