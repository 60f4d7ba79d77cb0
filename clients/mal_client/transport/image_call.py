"""One image's call without any transport: what to send next, which answers are new, whether to try again.

The blocking and the asyncio client drive this same object, so that the rules of re-sending exist once. gRPC itself
retries a call that failed before its first message; after that it never does, and what is unanswered is sent again
from here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import grpc
import numpy as np
from mal.v1 import labeling_pb2
from numpy.typing import ArrayLike

from mal_client.errors import (
    InvalidRequest,
    ServerError,
    from_rpc_error,
    is_disconnect,
    is_truncated,
    rpc_code,
    rpc_details,
)
from mal_client.images.image_input import EncodedImage
from mal_client.images.upload_cache import UploadedImage
from mal_client.transport.serialization import labeling_messages
from mal_client.types import BoxLabel, BoxXywh, LabelOptions, ServerLimits
from mal_train.core.errors import BadImage

NOT_CACHED = "IMAGE_NOT_CACHED"
MAX_RESENDS = 5
"""How often one box is sent again on the server's word before its last error stands."""

PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Before the unanswered boxes of a call that broke in the middle are sent again, each time that brings nothing new.
gRPC makes attempts of its own each time; a server that is started anew takes some seconds."""

MOST_CUT_SHORT = 3
"""How often a call may be cut short behind a proxy (`is_truncated`) with nothing new in between before it is given up:
each time a server got it and died, maybe of it, and the next try would take the next one down. A refusal in between is
nothing new."""


def checked_boxes(boxes: ArrayLike | Sequence[Sequence[float]]) -> list[BoxXywh]:
    """Boxes x, y, w, h as floats; NaN and empty ones pass, since the server answers each for itself.

    Raises:
        RequestRefused: not a list of four numbers each.
    """
    try:
        table = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.full((1, 1), np.nan)
    if table.size == 0:
        return []
    if table.ndim != 2 or table.shape[1] != 4:
        raise InvalidRequest(
            f"boxes: shape {table.shape}; a list of x, y, width, height is needed, for example [[10, 20, 50, 80]]",
            "BAD_BOXES",
        )
    return [(float(x), float(y), float(w), float(h)) for x, y, w, h in table]


def check_image_size(size_bytes: int, limits: ServerLimits, name: str = "image") -> None:
    """Raises BadImage, reason IMAGE_TOO_LARGE, for a file that the server would not accept."""
    if size_bytes > limits.max_image_bytes:
        raise BadImage(
            f"{name}: {size_bytes} bytes; the server's limit is {limits.max_image_bytes}; compress or shrink it, or "
            "raise the server's limit",
            "IMAGE_TOO_LARGE",
        )


class ImageCall:
    """What is still unanswered of one image, and until when.

    Use: while not `done`: send `request()` with deadline `time_left()`, pass each message to `absorb`, then wait as
    long as `ended()` (the stream closed) or `broke(error)` (it failed) says.
    """

    def __init__(
        self,
        address: str,
        *,
        image: EncodedImage,
        boxes: Sequence[BoxXywh],
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
        self._timeout_s = timeout_s
        self._clock = clock
        self._upload = upload if limits.image_cache_bytes > 0 else None
        self._is_sent_as_hash = False
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._pending = dict(enumerate(boxes))
        self._sent: dict[int, BoxXywh] = {}
        self._resends: dict[int, int] = {}
        self._has_answers = False
        self._breaks = 0
        self._cuts = 0
        self._asked_wait_s = 0.0

    @property
    def done(self) -> bool:
        """Every box has its answer."""
        return not self._pending

    def time_left(self) -> float | None:
        """Seconds until the deadline, at least a millisecond; None without one."""
        return None if self._deadline is None else max(0.001, self._deadline - self._clock())

    def request(self) -> labeling_pb2.LabelImageRequest:
        """The unanswered boxes, at most as many as the server takes in one call."""
        first = list(self._pending)[: self._max_boxes]
        self._sent = {index: self._pending[index] for index in first}
        self._asked_wait_s = 0.0
        self._is_sent_as_hash = self._upload is not None and self._upload.is_known
        sha256 = self._upload.sha256 if self._upload is not None and self._is_sent_as_hash else None
        return labeling_messages.label_request(self._image, self._sent, self._options, sha256)

    def absorb(self, response: labeling_pb2.LabelImageResponse) -> list[BoxLabel]:
        """The final answers of one message; a box that the server wants again stays pending.

        Raises:
            ServerFailed: an answer to something that was not asked, or a second one to the same box.
        """
        final = []
        try:
            for index, label in labeling_messages.box_labels(response, self._sent):
                del self._sent[index]
                if self._wanted_again(label):
                    continue
                del self._pending[index]
                final.append(label)
        except KeyError as error:
            raise ServerError(
                f"{self._address}: answered box {error} twice or unasked; client and server do not fit each other"
            ) from None
        if final:
            self._has_answers, self._breaks, self._cuts = True, 0, 0
        if self._upload is not None:
            self._upload.add()
        return final

    def ended(self) -> float:
        """Seconds to wait before the next request, after a stream that closed without an error.

        Raises:
            ServerFailed: it closed although boxes that were sent had no answer.
        """
        if self._sent:
            raise ServerError(
                f"{self._address}: the answer ended with {len(self._sent)} boxes unanswered; look into the server's log"
            )
        return self._allowed(self._asked_wait_s) if self._pending else 0.0

    def broke(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the unanswered boxes are sent again, after a call that failed, uncancelled here.

        Raises:
            ServerFailed: cut short too often.
            MalError: the failure is final: the call was not broken off (`is_disconnect`), or it was UNAVAILABLE before
                any answer and the server did not say when to come back, or the pauses are used up, or the deadline
                would pass.
        """
        if self._is_sent_as_hash and self._upload is not None and rpc_details(error).reason == NOT_CACHED:
            # Evicted, or another server behind the same address: the next request carries the picture itself.
            self._upload.discard()
            return 0.0
        self._cuts += is_truncated(error)
        if self._cuts >= MOST_CUT_SHORT:
            raise ServerError(
                f"{self._address}: {self._cuts} times the call ended without a word of the server's, with "
                f"{len(self._pending)} boxes unanswered; servers may have died of this picture or these boxes: look "
                "into their logs before it is sent again"
            ) from error
        if is_disconnect(error):
            wait_s = rpc_details(error).retry_after_s
            # Before the first answer gRPC itself has tried again, but only after UNAVAILABLE.
            may_again = self._has_answers or rpc_code(error) is not grpc.StatusCode.UNAVAILABLE
            if wait_s is None and may_again and self._breaks < len(PAUSES_S):
                wait_s = PAUSES_S[self._breaks]
                self._breaks += 1
            if wait_s is not None and self._in_time(wait_s):
                return wait_s
        raise from_rpc_error(self._address, error, self._timeout_s) from error

    def _wanted_again(self, label: BoxLabel) -> bool:
        if label.error is None or label.error.retry_after_s is None:
            return False
        resends = self._resends.get(label.index, 0) + 1
        if resends > MAX_RESENDS or not self._in_time(label.error.retry_after_s):
            return False
        self._resends[label.index] = resends
        self._asked_wait_s = max(self._asked_wait_s, label.error.retry_after_s)
        return True

    def _in_time(self, wait_s: float) -> bool:
        return self._deadline is None or self._clock() + wait_s < self._deadline

    def _allowed(self, wait_s: float) -> float:
        left = self.time_left()
        return wait_s if left is None else min(wait_s, left)
