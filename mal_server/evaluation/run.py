"""One Evaluate call: labels images and holds the masks against their ground truth. Knows nothing of gRPC.

Images are labeled side by side but counted in order of arrival, so that the same stream always gives the same report.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TypeVar

from mal_server.errors import ImageNotCached, InvalidRequest, NotFound
from mal_server.evaluation.resume_tokens import GroundTruth, InstanceScore, ItemFailure, ResumeTokens, SampleResult
from mal_server.inference.pipeline import InstanceResult, Pipeline
from mal_server.scheduling.admission import QueueFull
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.priority import Priority
from mal_train.core.coco.annotations import Annotation, JsonId, Reason
from mal_train.core.errors import BadBox, BadImage, DeviceError, OutOfDeviceMemory
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.core.metrics.report import EvaluationReport
from mal_train.kernel.labeler.labeler import Label

Result = TypeVar("Result")

REFUSED = "REQUEST_REFUSED"
"""Reason under which the objects of an image are counted whose message breaks the contract."""

MEMORY_OF_AN_IMAGE = 400
"""Bytes that an image takes beside its name: in the list of names, among those seen, and its frame."""


class Evaluation:
    """Collects one call's figures.

    Args:
        pipeline: labels.
        pool: threads for comparing masks.
        category_names: by id, in the order of the report.
        records: seals what was measured, and opens what an earlier evaluation measured.
        take: told how many bytes more are held; raises where there is no room for them.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        pool: PriorityThreadPool,
        category_names: Mapping[JsonId, str],
        records: ResumeTokens,
        take: Callable[[int], None],
    ) -> None:
        self.records = records
        self._take = take
        self._pipeline = pipeline
        self._pool = pool
        self._evaluator = Evaluator(category_names)
        self.item_ids: list[str] = []
        """Names of the images so far, in order of arrival; an annotation's image_id is a place in this list."""
        self.skipped_images = 0
        self._seen: set[str] = set()

    @property
    def instances(self) -> int:
        """Objects measured so far."""
        return self._evaluator.count

    @property
    def running_miou(self) -> float | None:
        """Mean IoU so far; None before the first object."""
        return self._evaluator.running_miou

    async def label(self, truth: GroundTruth) -> SampleResult:
        """Labels one image; waits its turn while the queue is full, since the evaluation's window bounds what waits."""
        if truth.record:
            return self.records.open(truth)
        if truth.job is None:
            return SampleResult(truth, {}, truth.fault)
        while True:
            try:
                part = await self._pipeline.label_whole(truth.job)
            except QueueFull as error:
                await asyncio.sleep(error.retry_after_s)
            except ImageNotCached:  # its sender can mend that, and must know
                raise
            except (BadImage, NotFound) as error:
                return SampleResult(truth, {}, ItemFailure(error.reason, str(error)))
            except InvalidRequest as error:  # a path that leads out of its folder
                return SampleResult(truth, {}, ItemFailure(REFUSED, str(error)))
            else:
                answers: dict[JsonId | None, InstanceScore | ItemFailure] = {
                    a.instance_id: _measured(a) for a in part.answers
                }
                is_final = not any(isinstance(answer.outcome, DeviceError) for answer in part.answers)
                return SampleResult(truth, answers, None, is_final)

    async def count(self, outcome: SampleResult) -> None:
        """Adds one image's answers to the figures; to be called in order of arrival, one at a time.

        Raises:
            MemoryFull: other evaluations hold the memory that this one needs to go on.
        """
        before = self._evaluator.memory
        await self._in_pool(self._count, outcome)
        self._take(self._evaluator.memory - before + MEMORY_OF_AN_IMAGE + len(outcome.truth.item_id))

    async def record_of(self, outcome: SampleResult) -> bytes:
        """The sealed record of an image; empty where there is none."""
        return outcome.truth.record or await self._in_pool(self.records.seal, outcome)

    def report(self) -> "Future[EvaluationReport]":
        """All figures, once a thread has made them; it goes on at them though nobody may wait any more."""
        return self._pool.submit(Priority.BATCH, self._evaluator.report)

    async def _in_pool(self, work: Callable[..., Result], *args: object) -> Result:
        return await self._pool.run(Priority.BATCH, work, *args)

    def _count(self, outcome: SampleResult) -> None:
        truth, fault = outcome.truth, outcome.fault
        if truth.item_id in self._seen:
            fault = ItemFailure(Reason.REPEATED, f"image {truth.item_id!r}: given before; the first one counts")
        self._seen.add(truth.item_id)
        self.item_ids.append(truth.item_id)
        self.skipped_images += fault is not None
        answered: set[JsonId | None] = set()
        for annotation in truth.annotations:
            if fault is not None:
                self._evaluator.skip(annotation, *fault)
            elif annotation.id in answered:
                message = f"annotation {annotation.id!r}: given before; the first one counts"
                self._evaluator.skip(annotation, Reason.REPEATED, message)
            else:
                self._add(annotation, outcome.answers.get(annotation.id))
            answered.add(annotation.id)

    def _add(self, annotation: Annotation, answer: InstanceScore | ItemFailure | None) -> None:
        if isinstance(answer, InstanceScore):
            self._evaluator.add(annotation, answer.rle, answer.score)
        elif isinstance(answer, ItemFailure):
            self._evaluator.skip(annotation, *answer)
        elif annotation.reason is None and not annotation.iscrowd and not annotation.raw.get("segmentation"):
            message = f"annotation {annotation.id!r}: has no segmentation"
            self._evaluator.skip(annotation, Reason.NO_GROUND_TRUTH, message)
        else:
            self._evaluator.add(annotation, None, 0.0)


def _measured(answer: InstanceResult) -> InstanceScore | ItemFailure:
    label = answer.outcome
    return (
        InstanceScore(label.rle, label.score) if isinstance(label, Label) else ItemFailure(_reason(label), str(label))
    )


def _reason(error: BadBox | DeviceError) -> str:
    if isinstance(error, BadBox):
        return Reason.BAD_BOX
    return "OUT_OF_MEMORY" if isinstance(error, OutOfDeviceMemory) else "DEVICE_FAILED"
