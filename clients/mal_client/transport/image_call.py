"""One image's call, without any transport: the next request, the new labels, and the decision on a retry.

The blocking and the asyncio client drive the same object, so that the rules of retries exist once. gRPC itself retries
a call that failed before its first response; after that it never does, and the pending boxes are sent again from here.
"""

from __future__ import annotations

import math
import reprlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import grpc
from mal.v1 import labeling_pb2

from mal_client.errors import (
    TOO_MANY_BOXES,
    InvalidRequest,
    ServerError,
    from_rpc_error,
    is_aged,
    is_disconnect,
    is_truncated,
    rpc_code,
    rpc_details,
    too_many_boxes,
)
from mal_client.images.image_input import EncodedImage, check_image_size
from mal_client.images.upload_cache import UploadedImage
from mal_client.results.labels import BoxLabel, BoxPoints, BoxXywh, LabelOptions
from mal_client.results.server_info import ServerLimits
from mal_client.transport.serialization import labeling_messages
from mal_train.core.masks.points import Point
from mal_train.core.numbers import counted

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

NOT_CACHED = "IMAGE_NOT_CACHED"
MAX_RESENDS = 5
"""Number of times that one box is sent again because its error has RetryInfo; then the error is final."""

RETRY_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses before the pending boxes of a broken call are sent again, one for each failure without a new label.

gRPC makes attempts of its own each time; a server that restarts takes some seconds."""

MAX_TRUNCATED = 3
"""Number of truncated streams (`is_truncated`) without a new label between them after which a call is given up.

Each time a server received the call and died, maybe because of it, and the next attempt would end the next server. A
refusal between them does not restart the count."""


@dataclass(frozen=True)
class Prompts:
    """Boxes of one image, and the points that correct their masks.

    Attributes:
        boxes: x, y, w, h in px.
        points: by the index of their box.
    """

    boxes: list[BoxXywh]
    points: BoxPoints = field(default_factory=dict)

    @classmethod
    def of(cls, boxes: ArrayLike | Sequence[Sequence[float]], points: Sequence[Sequence[Point]] | None = None) -> Self:
        """Checks the form of the arguments of a call. The server checks their numbers, of each box for itself.

        >>> Prompts.of([[1, 2, 3, 4]], [[Point(2, 3, is_positive=True)]])
        Prompts(boxes=[(1.0, 2.0, 3.0, 4.0)], points={0: (Point(x=2.0, y=3.0, is_positive=True),)})

        Args:
            boxes: (N, 4) x, y, w, h in px.
            points: N sequences; None: no points.

        Raises:
            InvalidRequest: `boxes` is not a list of four numbers each (reason BAD_BOXES), or `points` is not a list of
                as many sequences of `Point` (reason BAD_POINTS).
        """
        checked = _checked_boxes(boxes)
        return cls(checked, {} if points is None else _checked_points(points, len(checked)))

    def one(self, index: int) -> Prompts:
        """Returns one box with its points."""
        return Prompts([self.boxes[index]], {0: self.points[index]} if index in self.points else {})


def _checked_boxes(boxes: ArrayLike | Sequence[Sequence[float]]) -> list[BoxXywh]:
    try:
        return [_checked_box(box) for box in _rows(boxes)]
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(
            f"boxes: {reprlib.repr(boxes)}; (N, 4) x, y, width, height is needed, for example [[10, 20, 50, 80]]",
            "BAD_BOXES",
        ) from None


def _rows(boxes: Any) -> Iterable[Any]:
    """Returns the rows of a list or an array. Lists do without NumPy, whose import takes longer than a request."""
    if not hasattr(boxes, "__array__"):
        return _ordered(boxes)
    import numpy as np  # noqa: PLC0415

    table = np.asarray(boxes, dtype=np.float64)
    return table.tolist() if table.size else []


def _checked_box(box: Any) -> BoxXywh:
    x, y, w, h = (math.nan if value is None else float(value) for value in _ordered(box))
    return x, y, w, h


def _ordered(values: Any) -> Iterable[Any]:
    """Returns an iterable whose order has a meaning. Raises TypeError for sets, mappings and text."""
    if isinstance(values, str | bytes | Set | Mapping):
        raise TypeError(values)
    return values  # type: ignore[no-any-return]


def _checked_points(points: Sequence[Sequence[Point]], boxes: int) -> BoxPoints:
    try:
        rows = list(_ordered(points))
    except TypeError:
        raise InvalidRequest(
            f"points: {reprlib.repr(points)}; it must be a sequence with one sequence of points for each box",
            "BAD_POINTS",
        ) from None
    if len(rows) != boxes:
        raise InvalidRequest(
            f"points: {counted(len(rows), 'sequence')} for {counted(boxes, 'box')}; give one for each box, "
            "[] for a box without points",
            "BAD_POINTS",
        )
    checked = (_checked_row(row, index) for index, row in enumerate(rows))
    return {index: row for index, row in enumerate(checked) if row}


def _checked_row(row: Any, index: int) -> tuple[Point, ...]:
    try:
        return tuple(_checked_point(point) for point in _ordered(row))
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(
            f"points[{index}]: {reprlib.repr(row)}; it must be a sequence of mal_client.types.Point, each of two "
            "numbers and a bool",
            "BAD_POINTS",
        ) from None


def _checked_point(point: Any) -> Point:
    if not isinstance(point, Point) or point.is_positive not in (False, True):
        raise TypeError(point)
    return Point(float(point.x), float(point.y), bool(point.is_positive))


class ImageCall:
    """State of the call for one image: the pending boxes, the retries and the deadline.

    Use: until `done`, start a stream with `request()` and the deadline `time_left()`, pass each response to
    `on_response`, then wait for the seconds that `on_end` (the stream closed) or `on_error` (it failed) returns.

    Args:
        address: of the server, for messages.
        image: the file to send.
        prompts: boxes and points.
        options: label options.
        limits: of the server.
        timeout_s: deadline of the call in seconds; None for none.
        upload: entry of the image in the cache of uploads; None sends its bytes each time.
        clock: monotonic seconds.

    Raises:
        BadImage: the file exceeds the server's limit.
        InvalidRequest: more boxes than one request may have, and `resolve_overlaps` needs all in one (reason
            TOO_MANY_BOXES); or points for a server that ignores them (reason POINTS_UNSUPPORTED).
    """

    def __init__(
        self,
        address: str,
        *,
        image: EncodedImage,
        prompts: Prompts,
        options: LabelOptions,
        limits: ServerLimits,
        timeout_s: float | None,
        upload: UploadedImage | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_image_size(len(image.content), limits)
        self._address = address
        self._image = image
        self._options = options
        self._max_boxes = max(1, limits.max_boxes)
        if options.resolve_overlaps and len(prompts.boxes) > self._max_boxes:
            raise InvalidRequest(too_many_boxes("image", len(prompts.boxes), self._max_boxes), TOO_MANY_BOXES)
        if prompts.points:
            limits.check_points()
        self._points = prompts.points
        self._timeout_s = timeout_s
        self._clock = clock
        self._upload = upload if limits.image_cache_bytes > 0 else None
        self._may_send_hash = True
        self._is_sent_as_hash = False
        self._is_confirmed = False
        """The server has answered the current request, so it has the image."""
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._pending = dict(enumerate(prompts.boxes))
        self._sent: dict[int, BoxXywh] = {}
        self._resends: dict[int, int] = {}
        self._has_labels = False
        self._failures = 0
        self._truncated = 0
        self._retry_after_s = 0.0
        self._size_wh = cache(image.size_wh)

    @property
    def done(self) -> bool:
        """True when every box has its final label."""
        return not self._pending

    def time_left(self) -> float | None:
        """Returns the seconds until the deadline, at least a millisecond; None without a deadline."""
        return None if self._deadline is None else max(0.001, self._deadline - self._clock())

    def request(self) -> labeling_pb2.LabelImageRequest:
        """Returns a request for the pending boxes, at most as many as the server accepts in one call."""
        indices = list(self._pending)[: self._max_boxes]
        self._sent = {index: self._pending[index] for index in indices}
        self._retry_after_s = 0.0
        self._is_sent_as_hash = self._may_send_hash and self._upload is not None and self._upload.is_known
        self._is_confirmed = False
        sha256 = self._upload.sha256 if self._upload is not None and self._is_sent_as_hash else None
        return labeling_messages.label_request(self._image, self._sent, self._points, self._options, sha256)

    def on_response(self, response: labeling_pb2.LabelImageResponse) -> list[BoxLabel]:
        """Takes one response; returns its final labels. A box whose error has RetryInfo stays pending.

        With `resolve_overlaps`, all boxes of the response stay pending then, since their masks depend on each other.

        Raises:
            ServerError: a result for a box that was not sent, or a second one for the same box.
        """
        final = []
        is_retried = False
        try:
            for index, label in labeling_messages.box_labels(response, self._sent, self._size_wh):
                del self._sent[index]
                if self._is_retried(label):
                    is_retried = True
                    continue
                final.append(label)
        except KeyError as key:
            raise ServerError(
                f"{self._address}: a result for box {key}, which is not pending; check that client and server have "
                "compatible versions"
            ) from None
        if is_retried and self._options.resolve_overlaps:
            final = []
        for label in final:
            del self._pending[label.index]
        if final:
            self._has_labels, self._failures, self._truncated = True, 0, 0
        if self._upload is not None and not self._is_confirmed:
            self._is_confirmed = True
            self._upload.add(was_hash=self._is_sent_as_hash)
        return final

    def on_end(self) -> float:
        """Notes that the stream closed without an error; returns the seconds to wait before the next request.

        Raises:
            ServerError: the response lacks boxes that were sent.
        """
        if self._sent:
            raise ServerError(
                f"{self._address}: the response ended without results for {len(self._sent)} boxes; see the server's log"
            )
        return self._until_deadline(self._retry_after_s) if self._pending else 0.0

    def on_error(self, error: grpc.RpcError) -> float:
        """Notes that the stream failed; returns the seconds to wait before the pending boxes are sent again.

        Do not pass the error of a call that the caller cancelled.

        Raises:
            ServerError: `MAX_TRUNCATED` streams were truncated.
            MalError: the failure is final. It is no disconnect (`is_disconnect`); or it is UNAVAILABLE without a retry
                time before the first label, which gRPC itself has retried; or the pauses are used up; or the next one
                would pass the deadline.
        """
        if self._is_sent_as_hash and self._upload is not None and rpc_details(error).reason == NOT_CACHED:
            # Evicted, or the call went to another server of the address: the next request has the bytes.
            self._upload.discard()
            self._may_send_hash = False
            return 0.0
        self._truncated += is_truncated(error)
        if self._truncated >= MAX_TRUNCATED:
            raise ServerError(
                f"{self._address}: {self._truncated} truncated streams, {len(self._pending)} boxes pending; this image "
                "or its boxes may crash the servers: see their logs before you send it again"
            ) from error
        if is_disconnect(error):
            wait_s = rpc_details(error).retry_after_s
            # Before the first label gRPC itself has retried, but only after UNAVAILABLE. A server that limits the age
            # of connections is there, however often that hits a call.
            is_retried = rpc_code(error) is grpc.StatusCode.UNAVAILABLE and not is_aged(error)
            may_retry = self._has_labels or not is_retried
            if wait_s is None and may_retry and self._failures < len(RETRY_PAUSES_S):
                wait_s = RETRY_PAUSES_S[self._failures]
                self._failures += 1
            if wait_s is not None and self._is_in_time(wait_s):
                return wait_s
        raise from_rpc_error(self._address, error, self._timeout_s) from error

    def _is_retried(self, label: BoxLabel) -> bool:
        if label.error is None or label.error.retry_after_s is None:
            return False
        resends = self._resends.get(label.index, 0) + 1
        if resends > MAX_RESENDS or not self._is_in_time(label.error.retry_after_s):
            return False
        self._resends[label.index] = resends
        self._retry_after_s = max(self._retry_after_s, label.error.retry_after_s)
        return True

    def _is_in_time(self, wait_s: float) -> bool:
        return self._deadline is None or self._clock() + wait_s < self._deadline

    def _until_deadline(self, wait_s: float) -> float:
        left_s = self.time_left()
        return wait_s if left_s is None else min(wait_s, left_s)
