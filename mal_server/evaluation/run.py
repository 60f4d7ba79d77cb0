"""One Evaluate call: labels images and compares the masks with their ground truth. Knows nothing of gRPC.

Images are labeled concurrently but counted in order of arrival, so that the same stream always gives the same report.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from mal_server.config.limits import MAX_CATEGORIES
from mal_server.errors import ImageNotCached, InvalidRequest, NotFound
from mal_server.evaluation.resume_tokens import GroundTruth, InstanceScore, ItemFailure, ResumeTokens, SampleResult
from mal_server.inference.pipeline import Pipeline
from mal_server.inference.requests import InstanceResult, LabelRequest
from mal_server.scheduling.admission import QueueFull
from mal_server.scheduling.background import collector_paused, when_all_done
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.memory_quota import Reservation
from mal_server.scheduling.priority import Priority
from mal_train.core.coco.annotations import Annotation, JsonId, Reason, row_name
from mal_train.core.coco.left_out import LeftOut
from mal_train.core.errors import BadBox, BadImage, DeviceError, OutOfDeviceMemory
from mal_train.core.metrics.evaluator import Evaluator, memory_of
from mal_train.core.metrics.lvis import Federation
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.threads import clear_in_parts
from mal_train.kernel.labeler.types import Label

Result = TypeVar("Result")

REQUEST_REFUSED = "REQUEST_REFUSED"
"""Reason under which the objects of an image are counted if its message breaks the contract."""

MEMORY_OF_AN_IMAGE = 500
"""Bytes of an image beside its name: in the list of names, in the set and the map of names, and for its size."""

MEMORY_OF_A_PARTIAL_CATEGORY = 100
"""Bytes of a category that is not exhaustive in an image."""

MEMORY_OF_AN_OBJECT = 2000
"""Bytes of an object with its ground truth as Python objects, beside the content of its mask."""


@dataclass(frozen=True)
class UnreadImage:
    """An image of an evaluation whose objects are counted but not read.

    Attributes:
        item_id: the client's name for it.
        objects: number of its objects, crowd regions included.
        content_bytes: bytes of image and objects in their encoded form.
        read: reads the objects; runs in a thread.
    """

    item_id: str
    objects: int
    content_bytes: int
    read: Callable[[], GroundTruth]

    @property
    def memory(self) -> int:
        """Bytes of memory that the image takes until it is counted: encoded, and its objects."""
        return 2 * self.content_bytes + self.objects * MEMORY_OF_AN_OBJECT


def refused_image(item_id: str, objects: int, rule: str) -> UnreadImage:
    """Returns an image that has too many objects to be read; they are counted under REQUEST_REFUSED.

    `rule` says how many there may be, and why.
    """
    failure = ItemFailure(REQUEST_REFUSED, f"{objects} objects; {rule}")
    refused = GroundTruth(item_id, (), None, failure, unread=objects)
    return UnreadImage(item_id, 0, 0, lambda: refused)


class EvaluationRun:
    """Collects the metrics of one call.

    Args:
        pipeline: labels the images.
        pool: threads for comparing masks.
        category_names: names by id, in the order of the report.
        tokens: seals the records of this evaluation and opens those of the evaluation that it resumes.
        memory: bytes that the call holds; grows before they are allocated.
        caller: who takes turns with others for the threads.
        federation: what is judged in which image, for LVIS's metrics; grows with the images. None: no such metrics.
        left_out: objects that belong to no image, which are counted as not measured.

    Attributes:
        item_ids: names of the items so far, in order of arrival: images, and further objects of them.
        images: number of images so far.
        skipped_images: images of which no part could be measured.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        pool: PriorityThreadPool,
        category_names: Mapping[JsonId, str],
        tokens: ResumeTokens,
        memory: Reservation,
        *,
        caller: str,
        federation: Federation | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        self.tokens = tokens
        self.item_ids: list[str] = []
        self.images = 0
        self.skipped_images = 0
        self._memory = memory
        self._pipeline = pipeline
        self._pool = pool
        self._caller = caller
        self._evaluator = Evaluator(category_names, federation)
        self._names: dict[JsonId | None, str] = {}
        """Name of each image by the image_id of its annotations."""
        self._known_ids: set[str] = set()
        self._is_skipped = False
        """No part of the last image was measured."""
        left_out = left_out or LeftOut()
        self._unread = Counter(left_out.counts)
        self._messages = left_out.first_messages()
        self._categories: set[JsonId | None] = set()
        self._running: set[Future[Any]] = set()
        """Work that threads do or will do for this call, also after its cancellation."""

    @property
    def instances(self) -> int:
        """Number of objects measured so far."""
        return self._evaluator.count

    @property
    def running_miou(self) -> float | None:
        """Mean IoU so far; None before the first object."""
        return self._evaluator.running_miou

    async def label(self, image: UnreadImage) -> SampleResult:
        """Reads and labels one image, or opens its record. Waits while the queue is full.

        The window of the evaluation bounds how many images wait. An image that cannot be labeled is a failure of the
        sample.

        Raises:
            MemoryFull, CallTooLarge: there is no memory for the image.
            ImageNotCached: the client must send the image itself.
            DeviceLost: no image can be labeled any more.
            InvalidRequest: the record belongs to another image or evaluation.
        """
        self._memory.grow(image.memory)
        truth = await self.run_in_pool(image.read)
        if truth.record:
            sample = await self.run_in_pool(self.tokens.open, truth)
        elif truth.request is None:
            sample = SampleResult(truth, {}, truth.failure)
        else:
            sample = await self._labeled(truth, truth.request)
        masks_bytes = _masks_bytes(sample)
        self._memory.grow(masks_bytes)
        return replace(sample, memory=image.memory + masks_bytes)

    async def count(self, sample: SampleResult) -> None:
        """Adds one image to the metrics. Call it in order of arrival, one image at a time.

        Raises:
            InvalidRequest: the images so far have more than MAX_CATEGORIES categories.
            MemoryFull, CallTooLarge: there is no memory for the results of the image.
        """
        self._check_categories(sample)
        expected = self._memory_of_results(sample)
        self._memory.grow(expected)
        before = self._evaluator.memory
        await self.run_in_pool(self._count, sample)
        kept = self._evaluator.memory - before + _memory_of_image(sample)
        self._memory.adjust(kept - expected - sample.memory)
        self._categories |= _categories(sample)

    async def record_of(self, sample: SampleResult) -> bytes:
        """Returns the sealed record of an image; empty where it has none."""
        return sample.truth.record or await self.run_in_pool(self.tokens.seal, sample)

    def skipped(self, report: EvaluationReport) -> dict[str, int]:
        """Returns the numbers of objects that were not measured, by reason, most frequent first."""
        return dict((Counter(report.skipped) + self._unread).most_common())

    def messages(self) -> dict[str, str]:
        """Returns the message of the first object or image that was not measured, by reason."""
        return {**self._evaluator.first_messages, **self._messages}

    def name_of(self, image_id: JsonId) -> str:
        """Returns the client's name for the image of an annotation."""
        return self._names[image_id]

    async def report(self, listed: int) -> EvaluationReport:
        """Returns the report, which a thread computes.

        Args:
            listed: number of instances to list, lowest IoU first.
        """
        return await self.run_in_pool(self._report, listed)

    async def run_in_pool(self, function: Callable[..., Result], *args: object) -> Result:
        """Runs work on what the call holds, in a thread. A cancellation ends the wait, but not work that has begun."""
        work = self._pool.submit(Priority.BATCH, function, *args, caller=self._caller)
        self._running.add(work)
        work.add_done_callback(self._running.discard)
        return await asyncio.wrap_future(work)

    def _report(self, listed: int) -> EvaluationReport:
        with collector_paused():
            return self._evaluator.report(listed=listed)

    def free(self, *others: list[Any] | dict[Any, Any]) -> "Future[None]":
        """Frees the compared masks and other collections in a thread, once no thread uses them; ends the run.

        In the event loop, where the call ends, they would stop all other calls while they are freed. The future cannot
        be cancelled: a call that ends while it waits for it must not seem to have freed its memory.
        """
        freed: Future[None] = Future()
        freed.set_running_or_notify_cancel()
        start = partial(self._start_freeing, freed, (self.item_ids, self._names, self._known_ids, *others))
        when_all_done(list(self._running), start)
        return freed

    def _start_freeing(self, freed: "Future[None]", held: Iterable[list[Any] | dict[Any, Any] | set[Any]]) -> None:
        try:
            work = self._pool.submit(Priority.BATCH, self._free, held, caller=self._caller)
        except RuntimeError:  # the pool is shut down, and the process ends
            freed.set_result(None)
        else:
            work.add_done_callback(lambda _: freed.set_result(None))

    def _free(self, held: Iterable[list[Any] | dict[Any, Any] | set[Any]]) -> None:
        self._evaluator.clear()
        for values in held:
            clear_in_parts(values)

    async def _labeled(self, truth: GroundTruth, request: LabelRequest) -> SampleResult:
        while True:
            try:
                result = await self._pipeline.label_merged(request)
            except QueueFull as error:
                await asyncio.sleep(error.retry_after_s)
            except ImageNotCached:  # a failure of the call: the client can send the image again
                raise
            except (BadImage, NotFound) as error:
                return SampleResult(truth, {}, ItemFailure(error.reason, str(error)))
            except InvalidRequest as error:  # a path that leads out of its folder
                return SampleResult(truth, {}, ItemFailure(REQUEST_REFUSED, str(error)))
            else:
                scores: dict[JsonId | None, InstanceScore | ItemFailure] = {
                    one.instance_id: _score_of(one) for one in result.results
                }
                is_final = not any(isinstance(one.outcome, DeviceError) for one in result.results)
                return SampleResult(truth, scores, None, is_final)

    def _check_categories(self, sample: SampleResult) -> None:
        count = len(self._categories | _categories(sample))
        if count > MAX_CATEGORIES:
            problem = f"{count} categories, up to image {_shown(sample.truth.item_id)}; at most {MAX_CATEGORIES}"
            raise InvalidRequest([("image.ground_truth", problem)])

    def _memory_of_results(self, sample: SampleResult) -> int:
        """Returns an upper bound of the bytes that the evaluator keeps of an image and needs for its report."""
        annotations = sample.truth.annotations
        crowds = sum(annotation.iscrowd for annotation in annotations)
        code_bytes = _masks_bytes(sample) + sum(map(_code_bytes, annotations))
        new_categories = len(_categories(sample) - self._categories)
        return memory_of(len(annotations) - crowds, crowds, code_bytes, new_categories) + _memory_of_image(sample)

    def _count(self, sample: SampleResult) -> None:
        truth, failure = sample.truth, sample.failure
        if truth.item_id in self._known_ids:
            failure = ItemFailure(Reason.REPEATED, "used more than once; the first one counts")
        self._known_ids.add(truth.item_id)
        self.item_ids.append(truth.item_id)
        self._count_image(is_measured=failure is None, continues=truth.continues)
        if failure is not None:
            self._unread[failure.reason] += truth.unread
            self._messages.setdefault(failure.reason, f"image {_shown(truth.item_id)}: {failure.message}")
        if truth.annotations:
            image_id = truth.annotations[0].image_id
            self._names.setdefault(image_id, truth.item_id)
            if self._evaluator.federation is not None and truth.not_exhaustive and image_id is not None:
                known = self._evaluator.federation.not_exhaustive
                known[image_id] = known.get(image_id, frozenset()) | truth.not_exhaustive
        counted: set[JsonId | None] = set()
        for annotation in truth.annotations:
            if failure is not None:
                self._evaluator.skip(annotation, *failure)
            elif annotation.id in counted:
                message = f"annotation {annotation.id!r}: used more than once; the first one counts"
                self._evaluator.skip(annotation, Reason.REPEATED, message)
            else:
                self._add(annotation, sample.scores.get(annotation.id))
            counted.add(annotation.id)

    def _count_image(self, *, is_measured: bool, continues: bool) -> None:
        """Counts a message: an image, or further objects of the last one."""
        if not continues:
            self.images += 1
            self.skipped_images += 1
            self._is_skipped = True
        if is_measured and self._is_skipped:
            self.skipped_images -= 1
            self._is_skipped = False

    def _add(self, annotation: Annotation, score: InstanceScore | ItemFailure | None) -> None:
        if isinstance(score, InstanceScore):
            self._evaluator.add(annotation, score.rle, score.score)
        elif isinstance(score, ItemFailure):
            self._evaluator.skip(annotation, score.reason, f"{row_name(annotation.id)}: {score.message}")
        else:
            self._evaluator.add(annotation, None, 0.0)


def _shown(item_id: str) -> str:
    """Returns the name of an item for a message; that of a part of an image has a NUL character."""
    return repr(item_id.replace("\0", ", part "))


def _categories(sample: SampleResult) -> set[JsonId | None]:
    return {annotation.category_id for annotation in sample.truth.annotations}


def _masks_bytes(sample: SampleResult) -> int:
    return sum(len(score.rle.counts) for score in sample.scores.values() if isinstance(score, InstanceScore))


def _code_bytes(annotation: Annotation) -> int:
    """Returns the length of the run-length code of a ground truth; 0 for polygons, whose code is not known yet."""
    segmentation = annotation.raw.get("segmentation")
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    return len(counts) if isinstance(counts, bytes | str) else 0


def _memory_of_image(sample: SampleResult) -> int:
    return (
        MEMORY_OF_AN_IMAGE
        + 4 * len(sample.truth.item_id)
        + MEMORY_OF_A_PARTIAL_CATEGORY * len(sample.truth.not_exhaustive)
    )


def _score_of(result: InstanceResult) -> InstanceScore | ItemFailure:
    match result.outcome:
        case Label() as label:
            return InstanceScore(label.rle, label.score)
        case BadBox() as error:
            return ItemFailure(Reason.BAD_BOX, error.problem)
        case OutOfDeviceMemory() as error:
            return ItemFailure("OUT_OF_MEMORY", str(error))
        case error:
            return ItemFailure("DEVICE_FAILED", str(error))
