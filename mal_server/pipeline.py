"""One request's way from bytes to labels: decode and cut, wait for a batch, finish. Knows nothing of gRPC or protos.

    job → decode, prepare (thread pool) → batcher (device) → finish (thread pool) → Part, Part, …

One `Part` comes out for each finished batch that held crops of the job. A job leaves no other state behind.
"""

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mal_server.batcher import Batcher, Expired, Priority, Share
from mal_server.metrics import Metrics
from mal_server.pictures import OnDisk, Picture, Pictures
from mal_server.worker import Predictor
from mal_train.errors import BadBox, DeviceError, DeviceLost
from mal_train.labeling.encodings import EncodedMask, encode
from mal_train.labeling.geometry import Box
from mal_train.labeling.images import ImageLimits, decode_image
from mal_train.labeling.labeler import Crop, Label, Probability, RunOptions
from mal_train.labeling.settings import MaskFormat

Result = TypeVar("Result")
CropBatcher = Batcher[RunOptions, Crop, Probability]


@dataclass(frozen=True)
class AnswerOptions:
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


AS_CHECKPOINT_SAYS = AnswerOptions()

PREPARED_AT_ONCE = 8
"""Boxes that are cut before a thread looks whether somebody still waits for them."""


@dataclass(frozen=True)
class Job:
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
    options: RunOptions
    answer: AnswerOptions = AS_CHECKPOINT_SAYS
    priority: Priority = Priority.INTERACTIVE
    deadline: float = math.inf


@dataclass(frozen=True)
class Answer:
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
class Part:
    """Some of a job's answers."""

    answers: tuple[Answer, ...]
    timing: Timing


def joined(parts: Sequence[Part]) -> Part:
    """All of a job's parts as one: times of device and finish add up, the longest wait and the largest batch count."""
    times = [part.timing for part in parts]
    return Part(
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
        crop_size: side of a crop in px.
        metrics: counts.
    """

    def __init__(
        self,
        predictor: Predictor,
        batcher: CropBatcher,
        pool: Executor,
        pictures: Pictures,
        limits: ImageLimits,
        *,
        crop_size: int,
        metrics: Metrics,
    ) -> None:
        self._predictor = predictor
        self._batcher = batcher
        self._pool = pool
        self._pictures = pictures
        self._limits = limits
        self._crop_bytes = 3 * crop_size**2
        self._metrics = metrics

    async def label(self, job: Job) -> AsyncGenerator[Part, None]:
        """Parts that together answer every instance once; at least one part, also for a job without boxes.

        Raises:
            Overloaded: too much is waiting.
            Expired: the deadline passed.
            BadImage: the picture cannot be used.
            NotThere, RequestRefused: it is not here, or its name is none.
            DeviceLost: the device works no more.
        """
        content = None if isinstance(job.picture, OnDisk) else self._pictures.held(job.picture)
        # A file on disk takes no memory while its boxes wait.
        size_bytes = len(content or b"") + len(job.boxes) * self._crop_bytes
        with self._batcher.admit(
            max(len(job.boxes), 1), size_bytes=size_bytes, priority=job.priority, deadline=job.deadline
        ) as ticket:
            entries, decode_s = await self._opened(job, content)
            self._metrics.decoded(decode_s)
            bad = tuple(
                Answer(instance_id, entry)
                for instance_id, entry in zip(job.instance_ids, entries, strict=True)
                if isinstance(entry, BadBox)
            )
            good = [index for index, entry in enumerate(entries) if isinstance(entry, Crop)]
            crops = [entry for entry in entries if isinstance(entry, Crop)]
            if not crops:
                yield Part(bad, Timing(decode_s=decode_s))
                return
            held: list[Share[Probability]] = []
            async for share in ticket.submit(job.options, crops):
                if job.deadline <= asyncio.get_running_loop().time():
                    self._metrics.dropped("deadline_encoding", len(share.indices))
                    raise Expired("the deadline passed before the masks were encoded")
                if job.answer.resolve_overlaps:
                    # Whose a pixel is can be said once all have answered.
                    held.append(share)
                    continue
                ids = [job.instance_ids[good[index]] for index in share.indices]
                answers, finish_s = await self._finish(job, ids, crops, share)
                self._count(answers, finish_s)
                timing = Timing(share.queue_s, decode_s, share.run_s, finish_s, share.batch_size)
                self._metrics.part_done(timing)
                yield Part((*bad, *answers), timing)
                bad = ()
            if held:
                ids = [job.instance_ids[index] for index in good]
                answers, finish_s = await self._cpu(self._finish_together, job, ids, crops, held)
                self._count(answers, finish_s)
                waits = [Timing(share.queue_s, decode_s, share.run_s, 0.0, share.batch_size) for share in held]
                timing = joined([Part((), wait) for wait in waits]).timing
                yield Part((*bad, *answers), replace(timing, finish_s=finish_s))

    async def label_whole(self, job: Job) -> Part:
        """All parts of a job as one."""
        async with aclosing(self.label(job)) as parts:
            return joined([part async for part in parts])

    def _count(self, answers: Sequence[Answer], finish_s: float) -> None:
        self._metrics.finished(finish_s)
        for answer in answers:
            if isinstance(answer.outcome, Label):
                self._metrics.labelled(answer.outcome.flags)

    async def _opened(self, job: Job, content: bytes | None) -> tuple[list[Crop | BadBox], float]:
        # A thread cannot be cancelled, and a thousand crops of a large picture keep it for many minutes.
        given_up = threading.Event()
        try:
            return await self._cpu(self._open, job, content, given_up)
        except asyncio.CancelledError:
            given_up.set()
            raise

    def _open(self, job: Job, content: bytes | None, given_up: threading.Event) -> tuple[list[Crop | BadBox], float]:
        started = time.perf_counter()
        if isinstance(job.picture, OnDisk):
            content = self._pictures.read(job.picture)
        image = decode_image(content or b"", expected_wh=job.expected_wh, limits=self._limits)
        self._pictures.was_read(job.picture)
        entries: list[Crop | BadBox] = []
        while len(entries) < len(job.boxes) and not given_up.is_set():
            done = len(entries)
            entries += self._predictor.prepare(image, job.boxes[done : done + PREPARED_AT_ONCE], first=done)
        return entries, time.perf_counter() - started

    async def _finish(
        self, job: Job, ids: Sequence[int], crops: Sequence[Crop], share: Share[Probability]
    ) -> tuple[list[Answer], float]:
        """The share's outcomes as answers, and the CPU seconds that this took."""
        work = zip(ids, share.indices, share.outcomes, strict=True)
        done = await asyncio.gather(*(self._cpu(self._finish_one, job, id_, crops[i], x) for id_, i, x in work))
        return [answer for answer, _ in done], sum(seconds for _, seconds in done)

    def _finish_one(
        self, job: Job, instance_id: int, crop: Crop, outcome: Probability | Exception
    ) -> tuple[Answer, float]:
        if isinstance(outcome, DeviceError) and not isinstance(outcome, DeviceLost):
            return Answer(instance_id, outcome), 0.0
        if isinstance(outcome, Exception):
            raise outcome
        started = time.perf_counter()
        how = job.answer
        label = self._predictor.finish(
            crop, outcome, threshold=how.threshold, min_component_area_px=how.min_component_area_px
        )
        masks = encode(label.rle, how.formats, how.polygon_tolerance_px)
        return Answer(instance_id, label, masks), time.perf_counter() - started

    def _finish_together(
        self, job: Job, ids: Sequence[int], crops: Sequence[Crop], shares: Sequence[Share[Probability]]
    ) -> tuple[list[Answer], float]:
        """All of a job's answers, in the order of its boxes: each contested pixel goes to one of them."""
        started = time.perf_counter()
        how = job.answer
        outcomes = dict(pair for share in shares for pair in zip(share.indices, share.outcomes, strict=True))
        answers: dict[int, Answer] = {}
        claimed: list[tuple[int, Probability]] = []
        for index, outcome in sorted(outcomes.items()):
            if isinstance(outcome, DeviceError) and not isinstance(outcome, DeviceLost):
                answers[index] = Answer(ids[index], outcome)
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
            answers[index] = Answer(ids[index], label, encode(label.rle, how.formats, how.polygon_tolerance_px))
        return [answers[index] for index in sorted(answers)], time.perf_counter() - started

    async def _cpu(self, work: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
