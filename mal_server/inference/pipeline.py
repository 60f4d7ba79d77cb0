"""A request's way from encoded image to masks: prepare, wait for a batch, finish. Knows nothing of gRPC or protos.

    LabelRequest → prepare (CPU pool) → Batcher (device) → finish (CPU pool) → PartialResult, PartialResult, …

Two modes: streaming returns a PartialResult for each device batch that held crops of the request; a request with
`resolve_overlaps` is collected, since overlaps can be resolved only after all of its batches have finished.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from mal_server.inference.image_store import FileImage, ImageStore
from mal_server.inference.preparation import BOXES_PER_TASK, CropPreparer, Prepared, timed
from mal_server.inference.requests import InstanceResult, LabelRequest, PartialResult, Timing, merge, merge_timings
from mal_server.inference.worker import Predictor
from mal_server.ops.metrics import Metrics
from mal_server.scheduling.admission import Admission, BatchSlice, DeadlineExceeded
from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.memory_limiter import MemoryLimiter
from mal_train.core.errors import DeviceError, DeviceLost
from mal_train.core.images.header import ImageLimits
from mal_train.core.masks.encodings import encode
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions

CropBatcher = Batcher[PredictOptions, Crop, Prediction]
CropAdmission = Admission[PredictOptions, Crop, Prediction]
CropSlice = BatchSlice[Prediction]


class Pipeline:
    """Labels requests with one model.

    Args:
        predictor: prepares and finishes; the workers' own ones predict.
        batcher: shared by all requests.
        pool: threads for CPU work.
        images: resolves image sources.
        limits: larger images are refused before they are decoded.
        memory_limiter: limits the memory of decoded images.
        crop_size: side of a crop in px.
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
        metrics: Metrics,
    ) -> None:
        self._predictor = predictor
        self._batcher = batcher
        self._pool = pool
        self._images = images
        self._preparer = CropPreparer(predictor, pool, images, limits, memory_limiter)
        self._crop_bytes = 3 * crop_size**2
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
        encoded = None if isinstance(request.image, FileImage) else self._images.get(request.image)
        with self._admit(request, encoded) as admission:
            prepared = await self._preparer.prepare(request, encoded)
            self._metrics.decoded(prepared.decode_s)
            if not prepared.crops:
                yield PartialResult(prepared.failed, Timing(decode_s=prepared.decode_s))
            elif request.output_options.resolve_overlaps:
                yield await self._collect(request, prepared, admission)
            else:
                async with aclosing(self._stream(request, prepared, admission)) as partials:
                    async for partial in partials:
                        yield partial

    async def label_merged(self, request: LabelRequest) -> PartialResult:
        """Returns all results of a request as one. Raises the errors of `label`."""
        async with aclosing(self.label(request)) as partials:
            return merge([partial async for partial in partials])

    def _admit(self, request: LabelRequest, encoded: bytes | None) -> CropAdmission:
        # A file on disk takes no memory while its request waits.
        size_bytes = len(encoded or b"") + len(request.boxes) * self._crop_bytes
        return self._batcher.admit(
            max(len(request.boxes), 1), size_bytes=size_bytes, priority=request.priority, deadline=request.deadline
        )

    async def _stream(
        self, request: LabelRequest, prepared: Prepared, admission: CropAdmission
    ) -> AsyncGenerator[PartialResult, None]:
        """Yields the masks of each batch as it finishes; the first partial result also holds the invalid boxes."""
        failed = prepared.failed
        async for batch_slice in admission.submit(request.predict_options, prepared.crops):
            self._check_deadline(request, batch_slice)
            results, finish_s = await self._finish(request, prepared, batch_slice)
            timing = replace(_timing(batch_slice, prepared), finish_s=finish_s)
            yield self._partial_result((*failed, *results), timing)
            failed = ()

    async def _collect(self, request: LabelRequest, prepared: Prepared, admission: CropAdmission) -> PartialResult:
        """Waits for all batches, then returns masks that do not overlap."""
        slices: list[CropSlice] = []
        async for batch_slice in admission.submit(request.predict_options, prepared.crops):
            self._check_deadline(request, batch_slice)
            slices.append(batch_slice)
        results, finish_s = await self._pool.run(
            request.priority, timed, self._finish_without_overlaps, request, prepared, slices
        )
        timing = merge_timings([_timing(batch_slice, prepared) for batch_slice in slices])
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

    async def _finish(
        self, request: LabelRequest, prepared: Prepared, batch_slice: CropSlice
    ) -> tuple[list[InstanceResult], float]:
        """Returns the results of one batch and the CPU seconds they took; splits the work over the pool's threads."""
        outcomes = list(zip(batch_slice.indices, batch_slice.outcomes, strict=True))
        size = min(-(-len(outcomes) // self._pool.threads), BOXES_PER_TASK)
        chunks = [outcomes[start : start + size] for start in range(0, len(outcomes), size)]
        finished = await asyncio.gather(
            *(self._pool.run(request.priority, timed, self._finish_chunk, request, prepared, c) for c in chunks)
        )
        return [result for results, _ in finished for result in results], sum(seconds for _, seconds in finished)

    def _finish_chunk(
        self, request: LabelRequest, prepared: Prepared, outcomes: Sequence[tuple[int, Prediction | Exception]]
    ) -> list[InstanceResult]:
        return [self._finish_crop(request, prepared, index, outcome) for index, outcome in outcomes]

    def _finish_crop(
        self, request: LabelRequest, prepared: Prepared, index: int, outcome: Prediction | Exception
    ) -> InstanceResult:
        prediction = _prediction_or_crop_error(outcome)
        if isinstance(prediction, DeviceError):
            return InstanceResult(prepared.crop_ids[index], prediction)
        options = request.output_options
        label = self._predictor.finish(
            prepared.crops[index],
            prediction,
            threshold=options.threshold,
            min_component_area_px=options.min_component_area_px,
        )
        return _encoded(request, prepared.crop_ids[index], label)

    def _finish_without_overlaps(
        self, request: LabelRequest, prepared: Prepared, slices: Sequence[CropSlice]
    ) -> list[InstanceResult]:
        """Returns all results in order of the boxes; each contested pixel is assigned to one of them."""
        outcomes = {
            index: _prediction_or_crop_error(outcome)
            for batch_slice in slices
            for index, outcome in zip(batch_slice.indices, batch_slice.outcomes, strict=True)
        }
        predictions = {
            index: outcome for index, outcome in sorted(outcomes.items()) if not isinstance(outcome, DeviceError)
        }
        options = request.output_options
        labels = self._predictor.finish_without_overlaps(
            [(prepared.crops[index], prediction) for index, prediction in predictions.items()],
            threshold=options.threshold,
            min_component_area_px=options.min_component_area_px,
        )
        results = {
            index: InstanceResult(prepared.crop_ids[index], error)
            for index, error in outcomes.items()
            if isinstance(error, DeviceError)
        }
        for index, label in zip(predictions, labels, strict=True):
            results[index] = _encoded(request, prepared.crop_ids[index], label)
        return [results[index] for index in sorted(results)]


def _timing(batch_slice: CropSlice, prepared: Prepared) -> Timing:
    return Timing(batch_slice.queue_s, prepared.decode_s, batch_slice.run_s, 0.0, batch_slice.batch_size)


def _prediction_or_crop_error(outcome: Prediction | Exception) -> Prediction | DeviceError:
    """Returns a prediction, or the error of one crop; raises an error that ends the request."""
    if isinstance(outcome, DeviceError) and not isinstance(outcome, DeviceLost):
        return outcome
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _encoded(request: LabelRequest, instance_id: int, label: Label) -> InstanceResult:
    options = request.output_options
    return InstanceResult(instance_id, label, encode(label.rle, options.formats, options.polygon_tolerance_px))
