"""Last stage of the pipeline: turns predictions into masks of the image and encodes them, on the CPU pool.

The work is split into steps, so that other requests run in between; a step holds the pixels of one mask at a time.
Steps of more than MAX_SMALL_BYTES, and requests with `resolve_overlaps`, hold memory of a `MemoryLimiter`.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from mal_server.inference.preparation import BOXES_PER_TASK, MAX_SMALL_BYTES, Prepared
from mal_server.inference.requests import InstanceResult, LabelRequest, ResultBudget
from mal_server.inference.worker import Predictor
from mal_server.scheduling.admission import BatchSlice
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.leased_steps import LeasedSteps
from mal_server.scheduling.memory_limiter import MemoryLimiter
from mal_train.core.errors import DeviceError, DeviceLost
from mal_train.core.masks.encodings import encode
from mal_train.core.settings import MaskFormat
from mal_train.kernel.labeler.clicks import correcting_bytes
from mal_train.kernel.labeler.overlaps import OWNER_BYTES_PER_PIXEL, PixelOwners
from mal_train.kernel.labeler.types import Crop, Prediction

CropSlice: TypeAlias = BatchSlice[Prediction]
_Outcomes: TypeAlias = Mapping[int, Prediction | DeviceError]
"""Outcomes by the index of their crop."""

MASK_BYTES_PER_PIXEL = 24
"""Peak while a mask is pasted, scored and encoded in every format, for each pixel of its region."""

OUTLINE_BYTES_PER_PIXEL = 400
"""Peak while polygons are made, for each pixel of the crop, or of the region if that has fewer: the finest mask has a
hole for every other pixel of the crop, and a ring takes 800 bytes on the way."""


class MaskFinisher:
    """Makes the results of requests from predictions.

    Args:
        predictor: pastes and scores.
        pool: threads for CPU work.
        memory_limiter: limits the memory of pasted masks; shared by all models, and with decoded images.
        crop_size: side of a crop in px.
        max_result_bytes: limit of the masks of a request whose results are collected.
    """

    def __init__(
        self,
        predictor: Predictor,
        pool: PriorityThreadPool,
        memory_limiter: MemoryLimiter,
        *,
        crop_size: int,
        max_result_bytes: int,
    ) -> None:
        self._predictor = predictor
        self._pool = pool
        self._memory_limiter = memory_limiter
        self._crop_pixels = crop_size**2
        self._max_result_bytes = max_result_bytes

    async def finish(
        self, request: LabelRequest, prepared: Prepared, batch_slice: CropSlice
    ) -> tuple[list[InstanceResult], float]:
        """Returns the results of one batch and the CPU seconds; uses all threads of the pool.

        Raises:
            Exception: the error of the whole batch, such as DeviceLost.
        """
        outcomes = _outcomes([batch_slice])
        size = min(-(-len(outcomes) // self._pool.threads), BOXES_PER_TASK)
        finished = await asyncio.gather(
            *(
                self._finish_alone(request, prepared, outcomes, step)
                for step in self._steps(request, prepared.crops, list(outcomes), size)
            )
        )
        return [result for results, _ in finished for result in results], sum(seconds for _, seconds in finished)

    async def finish_resolved(
        self, request: LabelRequest, prepared: Prepared, slices: Sequence[CropSlice]
    ) -> tuple[list[InstanceResult], float]:
        """Returns all results, in order of the boxes, and the CPU seconds, with overlaps resolved.

        Raises:
            ResponseTooLarge: the masks exceed `max_result_bytes`.
            Exception: the error of a whole batch, such as DeviceLost.
        """
        outcomes = _outcomes(slices)
        steps = list(self._steps(request, prepared.crops, sorted(outcomes), BOXES_PER_TASK))
        height, width = prepared.crops[0].image_hw
        largest = max(_mask_bytes(request, crop, self._crop_pixels) for crop in prepared.crops)
        size_bytes = OWNER_BYTES_PER_PIXEL * height * width + largest
        async with LeasedSteps(
            self._pool, self._memory_limiter, request.priority, request.caller, size_bytes
        ) as leased:
            owners = await leased.run(PixelOwners, (height, width))
            for step in steps:
                await leased.run(self._add_claims, request, prepared, outcomes, step, owners)
            results: list[InstanceResult] = []
            budget = ResultBudget(self._max_result_bytes)
            for step in steps:
                results += budget.spent_on(
                    await leased.run(self._finish_step, request, prepared, outcomes, step, owners)
                )
            return results, leased.cpu_s

    async def _finish_alone(
        self, request: LabelRequest, prepared: Prepared, outcomes: _Outcomes, step: Sequence[int]
    ) -> tuple[list[InstanceResult], float]:
        size_bytes = max(_mask_bytes(request, prepared.crops[index], self._crop_pixels) for index in step)
        # Smaller masks need no limit: each thread holds one at a time.
        size_bytes = size_bytes if size_bytes > MAX_SMALL_BYTES else 0
        async with LeasedSteps(
            self._pool, self._memory_limiter, request.priority, request.caller, size_bytes
        ) as leased:
            return await leased.run(self._finish_step, request, prepared, outcomes, step), leased.cpu_s

    def _steps(
        self, request: LabelRequest, crops: Sequence[Crop], indices: Sequence[int], size: int
    ) -> Iterator[list[int]]:
        """Splits indices of crops into steps of at most `size` boxes; of several only if they are small together."""
        step: list[int] = []
        total_bytes = 0
        for index in indices:
            size_bytes = _mask_bytes(request, crops[index], self._crop_pixels)
            if step and (len(step) == size or total_bytes + size_bytes > MAX_SMALL_BYTES):
                yield step
                step, total_bytes = [], 0
            step.append(index)
            total_bytes += size_bytes
        if step:
            yield step

    def _add_claims(
        self,
        request: LabelRequest,
        prepared: Prepared,
        outcomes: _Outcomes,
        step: Sequence[int],
        owners: PixelOwners,
    ) -> None:
        for index in step:
            outcome = outcomes[index]
            if not isinstance(outcome, DeviceError):
                threshold = request.output_options.threshold
                owners.add(index, self._predictor.claim(prepared.crops[index], outcome, threshold=threshold))

    def _finish_step(
        self,
        request: LabelRequest,
        prepared: Prepared,
        outcomes: _Outcomes,
        step: Sequence[int],
        owners: PixelOwners | None = None,
    ) -> list[InstanceResult]:
        return [self._finish_one(request, prepared, outcomes[index], index, owners) for index in step]

    def _finish_one(
        self,
        request: LabelRequest,
        prepared: Prepared,
        outcome: Prediction | DeviceError,
        index: int,
        owners: PixelOwners | None,
    ) -> InstanceResult:
        if isinstance(outcome, DeviceError):
            return InstanceResult(prepared.crop_ids[index], outcome)
        options = request.output_options
        label = self._predictor.finish(
            prepared.crops[index],
            outcome,
            threshold=options.threshold,
            min_component_area_px=options.min_component_area_px,
            owners=owners,
            index=index,
        )
        masks = encode(label.rle, options.formats, options.polygon_tolerance_px)
        return InstanceResult(prepared.crop_ids[index], label, masks)


def _outcomes(slices: Iterable[CropSlice]) -> dict[int, Prediction | DeviceError]:
    """Returns a prediction, or the error of one crop, by index; raises an error that ends the request."""
    return {
        index: _prediction_or_crop_error(outcome)
        for batch_slice in slices
        for index, outcome in zip(batch_slice.indices, batch_slice.outcomes, strict=True)
    }


def _prediction_or_crop_error(outcome: Prediction | Exception) -> Prediction | DeviceError:
    if isinstance(outcome, DeviceError) and not isinstance(outcome, DeviceLost):
        return outcome
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _mask_bytes(request: LabelRequest, crop: Crop, crop_pixels: int) -> int:
    """Returns an upper bound of the memory of finishing a mask, whose region is in the crop's window and the image."""
    window, (height, width) = crop.window, crop.image_hw
    columns = min(window.x1, width) - max(window.x0, 0)
    rows = min(window.y1, height) - max(window.y0, 0)
    pixels = max(columns, 0) * max(rows, 0)
    has_outlines = MaskFormat.POLYGONS in request.output_options.formats
    outline_bytes = has_outlines * OUTLINE_BYTES_PER_PIXEL * min(pixels, crop_pixels)
    return MASK_BYTES_PER_PIXEL * pixels + outline_bytes + correcting_bytes(len(crop.points), crop_pixels)
