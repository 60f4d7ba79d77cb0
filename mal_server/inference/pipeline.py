"""One request's way from bytes to labels: decode and cut, wait for a batch, finish. Knows nothing of gRPC or protos.

    job → decode, prepare (CPU pool) → batcher (device) → finish (CPU pool) → Part, Part, …

A small job is decoded and cut in one step. Others come in steps, so that a thread can go to whoever ranks first, and
hold a `MemoryLimiter` for their pixels from the decoding to the last cut. One `PartialResult` comes out for each
finished batch that held crops of the job. A job leaves no other state behind.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from mal_server.inference.image_store import FileImage, ImageStore, Picture
from mal_server.inference.worker import Predictor
from mal_server.ops.metrics import Metrics
from mal_server.scheduling.admission import BatchSlice, DeadlineExceeded
from mal_server.scheduling.background import when_done
from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.memory_limiter import MemoryLimiter
from mal_server.scheduling.priority import Priority
from mal_train.core.errors import BadBox, BadImage, DeviceError, DeviceLost
from mal_train.core.masks.encodings import EncodedMask, encode
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.images import ImageLimits, RgbImage, decode_image, stored_size
from mal_train.core.settings import MaskFormat
from mal_train.kernel.labeler.labeler import Crop, Label, Prediction, PredictOptions

Result = TypeVar("Result")
CropBatcher = Batcher[PredictOptions, Crop, Prediction]


@dataclass(frozen=True)
class OutputOptions:
    """How a probability map becomes an answer; crops may share a batch whatever these are.

    Attributes:
        threshold: in (0, 1); None = the checkpoint's by size.
        min_component_area_px: smaller connected parts are taken out, the largest excepted; 0 = none.
        formats: how masks are encoded.
        polygon_tolerance_px: of the polygons among them.
        resolve_overlaps: whether pixels that several boxes of the job claim go to one of them.
    """

    threshold: float | None = None
    min_component_area_px: int = 0
    formats: tuple[MaskFormat, ...] = (MaskFormat.RLE,)
    polygon_tolerance_px: float = 0.0
    resolve_overlaps: bool = False


AS_CHECKPOINT_SAYS = OutputOptions()

PREPARED_AT_ONCE = 8
"""Boxes that are cut, and masks that are finished, before the thread may go to somebody else."""

SMALL_PX = 2_000_000
"""Pictures up to this size with few boxes need no room: only as many as there are threads are decoded at a time."""

DECODING_BYTES = 8
"""Of a pixel while it is decoded: Pillow's four and, once converted, four or three of ours. Three are kept."""


@dataclass(frozen=True)
class LabelRequest:
    """A checked request.

    Attributes:
        picture: where the encoded image comes from.
        expected_wh: (width, height) that the boxes refer to, when stated.
        instance_ids: the caller's ids, unique.
        boxes: x, y, width, height px, in the order of the ids; any floats, NaN included.
        options: how the network runs.
        answer: how its output becomes answers.
        priority: who goes first.
        deadline: event-loop time after which nobody waits for the answer.
    """

    picture: Picture
    expected_wh: tuple[int, int] | None
    instance_ids: tuple[int, ...]
    boxes: tuple[Box, ...]
    options: PredictOptions
    answer: OutputOptions = AS_CHECKPOINT_SAYS
    priority: Priority = Priority.INTERACTIVE
    deadline: float = math.inf


@dataclass(frozen=True)
class InstanceResult:
    """What became of one instance: a label, or the error that concerns it alone; the mask in each wanted format."""

    instance_id: int
    outcome: Label | BadBox | DeviceError
    masks: tuple[EncodedMask, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds that a part took in each stage, and the crops in its device batch (0: it reached no device)."""

    queue_s: float = 0.0
    decode_s: float = 0.0
    infer_s: float = 0.0
    finish_s: float = 0.0
    batch_size: int = 0


@dataclass(frozen=True)
class PartialResult:
    """Some of a job's answers."""

    answers: tuple[InstanceResult, ...]
    timing: Timing


def merge(parts: Sequence[PartialResult]) -> PartialResult:
    """All of a job's parts as one: times of device and finish add up, the longest wait and the largest batch count."""
    times = [part.timing for part in parts]
    return PartialResult(
        tuple(answer for part in parts for answer in part.answers),
        Timing(
            queue_s=max(t.queue_s for t in times),
            decode_s=max(t.decode_s for t in times),
            infer_s=sum(t.infer_s for t in times),
            finish_s=sum(t.finish_s for t in times),
            batch_size=max(t.batch_size for t in times),
        ),
    )


class Pipeline:
    """See the module.

    Args:
        predictor: for prepare and finish; the devices' own ones predict.
        batcher: shared by all jobs.
        pool: threads for CPU work.
        pictures: gives the bytes.
        limits: what is refused before it is decoded.
        memory_limiter: for decoded images.
        crop_size: side of a crop in px.
        metrics: counts.
    """

    def __init__(
        self,
        predictor: Predictor,
        batcher: CropBatcher,
        pool: PriorityThreadPool,
        pictures: ImageStore,
        limits: ImageLimits,
        *,
        memory_limiter: MemoryLimiter,
        crop_size: int,
        metrics: Metrics,
    ) -> None:
        self._predictor = predictor
        self._batcher = batcher
        self._pool = pool
        self._memory_limiter = memory_limiter
        self._pictures = pictures
        self._limits = limits
        self._crop_bytes = 3 * crop_size**2
        self._metrics = metrics

    async def label(self, job: LabelRequest) -> AsyncGenerator[PartialResult, None]:
        """Parts that together answer every instance once; at least one part, also for a job without boxes.

        Raises:
            Overloaded: too much is waiting.
            Expired: the deadline passed.
            BadImage: the picture cannot be used.
            NotThere, RequestRefused: it is not here, or its name is none.
            DeviceLost: the device works no more.
        """
        content = None if isinstance(job.picture, FileImage) else self._pictures.held(job.picture)
        # A file on disk takes no memory while its boxes wait.
        size_bytes = len(content or b"") + len(job.boxes) * self._crop_bytes
        with self._batcher.admit(
            max(len(job.boxes), 1), size_bytes=size_bytes, priority=job.priority, deadline=job.deadline
        ) as ticket:
            entries, decode_s = await self._opened(job, content)
            self._metrics.decoded(decode_s)
            bad = tuple(
                InstanceResult(instance_id, entry)
                for instance_id, entry in zip(job.instance_ids, entries, strict=True)
                if isinstance(entry, BadBox)
            )
            good = [index for index, entry in enumerate(entries) if isinstance(entry, Crop)]
            crops = [entry for entry in entries if isinstance(entry, Crop)]
            if not crops:
                yield PartialResult(bad, Timing(decode_s=decode_s))
                return
            held: list[BatchSlice[Prediction]] = []
            async for share in ticket.submit(job.options, crops):
                if job.deadline <= asyncio.get_running_loop().time():
                    self._metrics.dropped("deadline_encoding", len(share.indices))
                    raise DeadlineExceeded("the deadline passed before the masks were encoded")
                if job.answer.resolve_overlaps:
                    # Whose a pixel is can be said once all have answered.
                    held.append(share)
                    continue
                ids = [job.instance_ids[good[index]] for index in share.indices]
                answers, finish_s = await self._finish(job, ids, crops, share)
                self._count(answers, finish_s)
                timing = Timing(share.queue_s, decode_s, share.run_s, finish_s, share.batch_size)
                self._metrics.part_done(timing)
                yield PartialResult((*bad, *answers), timing)
                bad = ()
            if held:
                ids = [job.instance_ids[index] for index in good]
                answers, finish_s = await self._cpu(job, self._finish_together, job, ids, crops, held)
                self._count(answers, finish_s)
                waits = [Timing(share.queue_s, decode_s, share.run_s, 0.0, share.batch_size) for share in held]
                timing = merge([PartialResult((), wait) for wait in waits]).timing
                yield PartialResult((*bad, *answers), replace(timing, finish_s=finish_s))

    async def label_whole(self, job: LabelRequest) -> PartialResult:
        """All parts of a job as one."""
        async with aclosing(self.label(job)) as parts:
            return merge([part async for part in parts])

    def _count(self, answers: Sequence[InstanceResult], finish_s: float) -> None:
        self._metrics.finished(finish_s)
        for answer in answers:
            if isinstance(answer.outcome, Label):
                self._metrics.labeled(answer.outcome.flags)

    async def _opened(self, job: LabelRequest, content: bytes | None) -> tuple[list[Crop | BadBox], float]:
        """Every box's crop, or what is wrong with it, and the time that threads took for it."""
        opened = await self._cpu(job, self._open, job, content)
        if isinstance(opened, _Large):
            return await self._opened_in_steps(job, opened)
        return opened

    def _open(self, job: LabelRequest, content: bytes | None) -> "tuple[list[Crop | BadBox], float] | _Large":
        started = time.perf_counter()
        if isinstance(job.picture, FileImage):
            content = self._pictures.read(job.picture)
        content = content or b""
        pixels = self._pixels(content)
        if pixels > SMALL_PX or len(job.boxes) > PREPARED_AT_ONCE:
            return _Large(content, pixels)
        image = self._decode(job, content)
        return self._predictor.prepare(image, job.boxes), time.perf_counter() - started

    def _pixels(self, content: bytes) -> int:
        """What will be decoded; 0 where nothing will."""
        try:
            width, height = stored_size(content)
        except BadImage:
            return 0
        return width * height if width * height <= self._limits.max_pixels else 0

    def _decode(self, job: LabelRequest, content: bytes) -> RgbImage:
        image = decode_image(content, expected_wh=job.expected_wh, limits=self._limits)
        self._pictures.was_read(job.picture)
        return image

    async def _opened_in_steps(self, job: LabelRequest, large: "_Large") -> tuple[list[Crop | BadBox], float]:
        held = await self._memory_limiter.acquire(large.pixels * DECODING_BYTES, job.priority)
        step: Future[Any] | None = None
        took_s = 0.0

        async def run(work: Callable[..., Result], *args: Any) -> Result:
            nonlocal step, took_s
            step = future = self._pool.submit(job.priority, _timed, work, *args)
            result: Result
            result, seconds = await asyncio.wrap_future(future)
            took_s += seconds
            return result

        try:
            image = await run(self._decode, job, large.content)
            held.shrink(image.nbytes)
            entries: list[Crop | BadBox] = []
            while len(entries) < len(job.boxes):
                done = len(entries)
                boxes = job.boxes[done : done + PREPARED_AT_ONCE]
                entries += await run(partial(self._predictor.prepare, first=done), image, boxes)
            return entries, took_s
        finally:
            # A caller may have gone while a thread is still at the picture: it takes its memory until then.
            when_done(step, held.release)

    async def _finish(
        self, job: LabelRequest, ids: Sequence[int], crops: Sequence[Crop], share: BatchSlice[Prediction]
    ) -> tuple[list[InstanceResult], float]:
        """The share's outcomes as answers, and the CPU seconds that this took."""
        work = [(id_, crops[i], x) for id_, i, x in zip(ids, share.indices, share.outcomes, strict=True)]
        size = min(-(-len(work) // self._pool.threads), PREPARED_AT_ONCE)
        pieces = [work[start : start + size] for start in range(0, len(work), size)]
        done = await asyncio.gather(*(self._cpu(job, _timed, self._finish_each, job, piece) for piece in pieces))
        return [answer for answers, _ in done for answer in answers], sum(seconds for _, seconds in done)

    def _finish_each(
        self, job: LabelRequest, work: Sequence[tuple[int, Crop, Prediction | Exception]]
    ) -> list[InstanceResult]:
        return [self._finish_one(job, *one) for one in work]

    def _finish_one(
        self, job: LabelRequest, instance_id: int, crop: Crop, outcome: Prediction | Exception
    ) -> InstanceResult:
        if isinstance(outcome, DeviceError) and not isinstance(outcome, DeviceLost):
            return InstanceResult(instance_id, outcome)
        if isinstance(outcome, Exception):
            raise outcome
        how = job.answer
        label = self._predictor.finish(
            crop, outcome, threshold=how.threshold, min_component_area_px=how.min_component_area_px
        )
        return InstanceResult(instance_id, label, encode(label.rle, how.formats, how.polygon_tolerance_px))

    def _finish_together(
        self, job: LabelRequest, ids: Sequence[int], crops: Sequence[Crop], shares: Sequence[BatchSlice[Prediction]]
    ) -> tuple[list[InstanceResult], float]:
        """All of a job's answers, in the order of its boxes: each contested pixel goes to one of them."""
        started = time.perf_counter()
        how = job.answer
        outcomes = dict(pair for share in shares for pair in zip(share.indices, share.outcomes, strict=True))
        answers: dict[int, InstanceResult] = {}
        claimed: list[tuple[int, Prediction]] = []
        for index, outcome in sorted(outcomes.items()):
            if isinstance(outcome, DeviceError) and not isinstance(outcome, DeviceLost):
                answers[index] = InstanceResult(ids[index], outcome)
            elif isinstance(outcome, Exception):
                raise outcome
            else:
                claimed.append((index, outcome))
        labels = self._predictor.finish_together(
            [(crops[index], outcome) for index, outcome in claimed],
            threshold=how.threshold,
            min_component_area_px=how.min_component_area_px,
        )
        for (index, _), label in zip(claimed, labels, strict=True):
            answers[index] = InstanceResult(ids[index], label, encode(label.rle, how.formats, how.polygon_tolerance_px))
        return [answers[index] for index in sorted(answers)], time.perf_counter() - started

    async def _cpu(self, job: LabelRequest, work: Callable[..., Result], *args: Any) -> Result:
        return await self._pool.run(job.priority, work, *args)


@dataclass(frozen=True)
class _Large:
    """A picture whose job goes in steps."""

    content: bytes
    pixels: int


def _timed(work: Callable[..., Result], *args: Any) -> tuple[Result, float]:
    started = time.perf_counter()
    result = work(*args)
    return result, time.perf_counter() - started
