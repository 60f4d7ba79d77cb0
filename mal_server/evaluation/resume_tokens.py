"""Records of measured images, sealed by the server and kept by the client, so that a broken evaluation can be resumed.

The server keeps nothing of an evaluation after its stream ends. A record has the masks and scores of one image and an
HMAC-SHA-256 over them, the identity of the image, its boxes, and the weights, engine, number format and options. So the
server accepts only records of the same inputs that a server with its key measured. By default each process has its own
key; with the setting `resume_key`, records survive a restart and can move between servers, where masks of the same
engine and number format may differ in single pixels.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from mal_server.errors import InvalidRequest, ResumeTokenStale
from mal_server.inference.image_store import CachedImage, FileImage
from mal_server.inference.requests import LabelRequest, OutputOptions
from mal_server.models.loader import ModelInfo
from mal_train.core.coco.annotations import Annotation, JsonId
from mal_train.core.masks.rle import Rle
from mal_train.kernel.labeler.types import PredictOptions

MAC_BYTES = 32
LAYOUT = 3
"""Version of records, of their layout and of the program's rules for masks. It is part of the token, so that records of
another version are stale. The names of keys below are part of it as well."""


class InstanceScore(NamedTuple):
    """The mask of one object and its score."""

    rle: Rle
    score: float


class ItemFailure(NamedTuple):
    """Reason and message of an image or an object that has no mask."""

    reason: str
    message: str


@dataclass(frozen=True)
class GroundTruth:
    """One image of an evaluation.

    Attributes:
        item_id: the client's name for it.
        annotations: its objects, crowd regions included; `image_id` is the index of the image in the evaluation.
        request: labels the objects that are not crowd regions; None when the image is refused.
        failure: why the image is refused.
        record: sealed record of an earlier evaluation; empty = none.
        unread: number of further objects of a refused image; there were too many to read them.
        continues: these are more objects of the image before.
        not_exhaustive: LVIS: categories of which not every object of the image is annotated.
    """

    item_id: str
    annotations: tuple[Annotation, ...]
    request: LabelRequest | None
    failure: ItemFailure | None = None
    record: bytes = b""
    unread: int = 0
    continues: bool = False
    not_exhaustive: frozenset[JsonId] = frozenset()


@dataclass(frozen=True)
class SampleResult:
    """The result of one image.

    Attributes:
        truth: the image.
        scores: mask and score, or failure, by instance id.
        failure: the failure of the image itself; None where it was labeled.
        is_final: labeling the image again would give the same result; False where a device failed.
        memory: bytes that its call holds for it until it is counted.
    """

    truth: GroundTruth
    scores: Mapping[JsonId | None, InstanceScore | ItemFailure]
    failure: ItemFailure | None
    is_final: bool = True
    memory: int = 0


class ResumeTokens:
    """Seals and opens the records of one evaluation.

    Args:
        key: secret of the server.
        info: the evaluated model.
        predict: options of the network.
        output: options by which probabilities become masks.

    Attributes:
        token: equal for equal weights, options and keys, and only for those.
    """

    def __init__(self, key: bytes, info: ModelInfo, predict: PredictOptions, output: OutputOptions) -> None:
        inputs = {
            "form": LAYOUT,
            "sha256": info.sha256,
            "precision": info.precision,
            "network_engine": info.network_engine,
            # Without the option that changes only pixels on which no mask depends.
            "run": {name: value for name, value in asdict(predict).items() if name != "whole_map"},
            # Without the options of encoding: records always store run-length codes.
            "answer": asdict(replace(output, formats=(), polygon_tolerance_px=0.0)),
        }
        self.token = hmac.digest(key, b"token" + _to_json(inputs), "sha256")
        self._key = hmac.digest(key, b"records" + self.token, "sha256")

    def check(self, token: bytes) -> None:
        """Raises ResumeTokenStale when this evaluation cannot resume the one that the token belongs to."""
        if not hmac.compare_digest(token, self.token):
            raise ResumeTokenStale(
                "resume_token: weights, branch, options, engine or number format have changed, or the server was "
                "restarted without resume_key; start the evaluation again without a token"
            )

    def seal(self, sample: SampleResult) -> bytes:
        """Returns the record of an image; empty where labeling it again may give another result."""
        if sample.truth.request is None or not sample.is_final:
            return b""
        scores = [[key, *_to_row(score)] for key, score in sample.scores.items()]
        body = _to_json({"fault": sample.failure, "answers": scores})
        return self._mac(sample.truth, sample.truth.request, body) + body

    def open(self, truth: GroundTruth) -> SampleResult:
        """Reads the record of an image. Raises InvalidRequest for a record of another image or evaluation."""
        body = memoryview(truth.record)[MAC_BYTES:]  # without a copy: a record has up to half a response
        mac = b"" if truth.request is None else self._mac(truth, truth.request, body)
        if not hmac.compare_digest(truth.record[:MAC_BYTES], mac):
            problem = f"image {truth.item_id!r}: the record belongs to another image, other boxes or another evaluation"
            raise InvalidRequest([("image.record", problem)])
        content = json.loads(bytes(body))
        scores = {row[0]: _from_row(row[1:]) for row in content["answers"]}
        return SampleResult(truth, scores, ItemFailure(*content["fault"]) if content["fault"] else None)

    def _mac(self, truth: GroundTruth, request: LabelRequest, body: bytes | memoryview) -> bytes:
        identity = _to_json([truth.item_id, _image_identity(request), request.instance_ids, request.boxes, len(body)])
        mac = hmac.new(self._key, identity + b"\n", "sha256")
        mac.update(body)
        return mac.digest()


def _image_identity(request: LabelRequest) -> str:
    """Returns the hash of the content, with the place of a part in its image.

    For a file on the server it is the path, since the content is not read.
    """
    image, region = request.image, request.region
    place = "" if region is None else f" at {region.x0},{region.y0} in {region.image_wh[0]}x{region.image_wh[1]}"
    if isinstance(image, FileImage):
        return f"file:{image.folder}/{image.path}{place}"
    sha256 = image.sha256 if isinstance(image, CachedImage) else hashlib.sha256(image.content).hexdigest()
    return f"sha256:{sha256}{place}"


def _to_row(score: InstanceScore | ItemFailure) -> list[Any]:
    if isinstance(score, ItemFailure):
        return [score.reason, score.message]
    return [score.rle.height, score.rle.width, score.rle.counts.decode("ascii"), score.score]


def _from_row(row: list[Any]) -> InstanceScore | ItemFailure:
    if len(row) == 2:
        return ItemFailure(*row)
    height, width, counts, score = row
    return InstanceScore(Rle(height, width, counts.encode("ascii")), score)


def _to_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
