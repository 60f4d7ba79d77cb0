"""One Evaluate call: labels streamed images and holds the masks against their ground truth. Knows nothing of gRPC.

Images are labelled side by side but counted in order of arrival, so that the same stream always gives the same report.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from mal_server.batcher import Overloaded
from mal_server.errors import NotThere, RequestRefused
from mal_server.pipeline import Answer, Job, Pipeline
from mal_train.errors import BadBox, BadImage, DeviceError, OutOfDeviceMemory
from mal_train.labeling.coco import Annotation, JsonId, Reason
from mal_train.labeling.evaluation import Evaluator
from mal_train.labeling.evaluation_report import EvaluationReport
from mal_train.labeling.labeler import Label

REFUSED = "REQUEST_REFUSED"
"""Reason under which the objects of an image are counted whose message breaks the contract."""


@dataclass(frozen=True)
class Truth:
    """One streamed image.

    Attributes:
        item_id: the caller's name for it.
        annotations: its objects, crowds included; `image_id` is the image's place in the stream.
        job: labels the objects that are no crowds; None when the image itself is refused.
        fault: (reason, message) of that refusal.
    """

    item_id: str
    annotations: tuple[Annotation, ...]
    job: Job | None
    fault: tuple[str, str] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of an image: answers by instance id, or the fault that concerns all of it."""

    truth: Truth
    answers: Mapping[JsonId | None, Answer]
    fault: tuple[str, str] | None


class Evaluation:
    """Collects one call's figures.

    Args:
        pipeline: labels.
        pool: threads for comparing masks.
        category_names: by id, in the order of the report.
    """

    def __init__(self, pipeline: Pipeline, pool: Executor, category_names: Mapping[JsonId, str]) -> None:
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

    async def label(self, truth: Truth) -> Outcome:
        """Labels one image; waits its turn while the queue is full, since the stream's window bounds what waits."""
        if truth.job is None:
            return Outcome(truth, {}, truth.fault)
        while True:
            try:
                part = await self._pipeline.label_whole(truth.job)
                return Outcome(truth, {answer.instance_id: answer for answer in part.answers}, None)
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_s)
            except (BadImage, NotThere) as error:
                return Outcome(truth, {}, (error.reason, str(error)))
            except RequestRefused as error:  # a path that leads out of its folder
                return Outcome(truth, {}, (REFUSED, str(error)))

    async def count(self, outcome: Outcome) -> None:
        """Adds one image's answers to the figures; to be called in order of arrival, one at a time."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self._count, outcome)

    async def report(self) -> EvaluationReport:
        """All figures."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._evaluator.report)

    def _count(self, outcome: Outcome) -> None:
        truth, fault = outcome.truth, outcome.fault
        if truth.item_id in self._seen:
            fault = (Reason.REPEATED, f"image {truth.item_id!r}: given before; the first one counts")
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

    def _add(self, annotation: Annotation, answer: Answer | None) -> None:
        label = answer.outcome if answer is not None else None
        if isinstance(label, Label):
            self._evaluator.add(annotation, label.rle, label.score)
        elif label is None:
            self._evaluator.add(annotation, None, 0.0)
        else:
            self._evaluator.skip(annotation, _reason(label), str(label))


def _reason(error: BadBox | DeviceError) -> str:
    if isinstance(error, BadBox):
        return Reason.BAD_BOX
    return "OUT_OF_MEMORY" if isinstance(error, OutOfDeviceMemory) else "DEVICE_FAILED"
