"""What became of an image of an evaluation, and its sealed form, which a caller may bring back to go on after a break.

The server keeps nothing of an evaluation when its stream ends: its callers do. A record holds masks and scores of one
image, and a code (HMAC-SHA-256) over it, the image's identity, its boxes and everything that decides what the network
answers. So what comes back was measured here with these weights and options, or it is refused. The key is the server's:
`resume_key` in the settings lets records outlive a restart and move between servers; else each process has its own.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from mal_server.errors import InvalidRequest, ResumeTokenStale
from mal_server.inference.image_store import CachedImage, FileImage, InlineImage, Picture
from mal_server.inference.pipeline import LabelRequest, OutputOptions
from mal_server.models.loader import ModelInfo
from mal_train.core.coco.annotations import Annotation, JsonId
from mal_train.core.masks.rle import Rle
from mal_train.kernel.labeler.labeler import PredictOptions

CODE_BYTES = 32
FORM = 2
"""Changed with the layout of records, so that older ones are stale and not misread."""


class InstanceScore(NamedTuple):
    """A mask and what its labeler claims for it."""

    rle: Rle
    score: float


class ItemFailure(NamedTuple):
    """Why there is none."""

    reason: str
    message: str


@dataclass(frozen=True)
class GroundTruth:
    """One image of an evaluation.

    Attributes:
        item_id: the caller's name for it.
        annotations: its objects, crowds included; `image_id` is the image's place in the evaluation.
        job: labels the objects that are no crowds; None when the image itself is refused.
        fault: that refusal.
        record: what an earlier evaluation measured, sealed; empty = none.
    """

    item_id: str
    annotations: tuple[Annotation, ...]
    job: LabelRequest | None
    fault: ItemFailure | None = None
    record: bytes = b""


@dataclass(frozen=True)
class SampleResult:
    """What became of an image: masks by instance id, or the fault that concerns all of it.

    `is_final`: measuring it again would end the same; not so where a device failed.
    """

    truth: GroundTruth
    answers: Mapping[JsonId | None, InstanceScore | ItemFailure]
    fault: ItemFailure | None
    is_final: bool = True


class ResumeTokens:
    """Seals and opens the records of one evaluation.

    Args:
        key: the server's.
        info: the model.
        run: how the network runs.
        answer: how its output becomes masks.
    """

    def __init__(self, key: bytes, info: ModelInfo, run: PredictOptions, answer: OutputOptions) -> None:
        decides = {
            "form": FORM,
            "sha256": info.sha256,
            "precision": info.precision,
            "run": asdict(run),
            # All of it but what is about writing masks down, which records have their own way of.
            "answer": asdict(replace(answer, formats=(), polygon_tolerance_px=0.0)),
        }
        self.token = hmac.digest(key, b"token" + _bytes_of(decides), "sha256")
        """The same for the same weights, options and key, and for nothing else."""
        self._key = hmac.digest(key, b"records" + self.token, "sha256")

    def check(self, token: bytes) -> None:
        """Raises TokenStale when an evaluation with this token cannot go on in this one."""
        if not hmac.compare_digest(token, self.token):
            raise ResumeTokenStale(
                "the evaluation cannot go on: weights, branch, options or number format are others now, or this server "
                "does not know the key of its records (resume_key keeps it over a restart); begin anew"
            )

    def seal(self, outcome: SampleResult) -> bytes:
        """The record of an image; empty where there is nothing to go on with."""
        if outcome.truth.job is None or not outcome.is_final:
            return b""
        answers = [[key, *_row(found)] for key, found in outcome.answers.items()]
        body = _bytes_of({"fault": outcome.fault, "answers": answers})
        return self._code(outcome.truth, outcome.truth.job, body) + body

    def open(self, truth: GroundTruth) -> SampleResult:
        """What was measured on an image. Raises RequestRefused for a record of something else."""
        body = truth.record[CODE_BYTES:]
        code = b"" if truth.job is None else self._code(truth, truth.job, body)
        if not hmac.compare_digest(truth.record[:CODE_BYTES], code):
            text = f"image {truth.item_id!r}: not a record of this image, its boxes and this evaluation"
            raise InvalidRequest([("image.record", text)])
        found = json.loads(body)
        answers = {row[0]: _answer(row[1:]) for row in found["answers"]}
        return SampleResult(truth, answers, ItemFailure(*found["fault"]) if found["fault"] else None)

    def _code(self, truth: GroundTruth, job: LabelRequest, body: bytes) -> bytes:
        identity = _bytes_of([truth.item_id, _identity(job.picture), job.instance_ids, job.boxes, len(body)])
        return hmac.digest(self._key, identity + b"\n" + body, "sha256")


def _identity(picture: Picture) -> str:
    """The same for the same content; a file on the server's disk is taken at its name."""
    if isinstance(picture, FileImage):
        return f"file:{picture.folder}/{picture.path}"
    if isinstance(picture, CachedImage):
        return f"sha256:{picture.sha256}"
    assert isinstance(picture, InlineImage)
    return f"sha256:{hashlib.sha256(picture.content).hexdigest()}"


def _row(found: InstanceScore | ItemFailure) -> list[Any]:
    if isinstance(found, ItemFailure):
        return [found.reason, found.message]
    return [found.rle.height, found.rle.width, found.rle.counts.decode("ascii"), found.score]


def _answer(row: list[Any]) -> InstanceScore | ItemFailure:
    if len(row) == 2:
        return ItemFailure(*row)
    height, width, counts, score = row
    return InstanceScore(Rle(height, width, counts.encode("ascii")), score)


def _bytes_of(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
