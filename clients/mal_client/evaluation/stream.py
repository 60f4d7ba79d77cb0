"""Streams an evaluation to a server until a stream ends with a result.

    EvaluationSource   names the requests of one stream, and maps its results to the ids of the data set (`sources`)
    EvaluationStream   sends the requests, stores the records that come back, and opens another stream after a failure
    RetryBudget        decides how many more streams may fail; IdleTimeout ends a stream on which nothing moves

The server keeps nothing of a broken stream. It sends a sealed record of each image, which the next stream sends back
(`EvaluationCheckpoint`), so that no image is labeled twice.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

import grpc
from mal.v1 import evaluation_pb2, evaluation_pb2_grpc

from mal_client.bulk.dispatcher import OnNotice, watchdog
from mal_client.dataset.run import OnProgress
from mal_client.errors import (
    CallTimedOut,
    ServerError,
    ServerUnavailable,
    from_rpc_error,
    is_disconnect,
    rpc_details,
)
from mal_client.evaluation.checkpoint import EvaluationCheckpoint
from mal_client.transport.base import Transport
from mal_client.types import MeasuredInstance, Progress
from mal_train.core.coco.annotations import JsonId, Reason
from mal_train.core.errors import MalError
from mal_train.core.metrics.report import Skipped

RESUME_TOKEN_STALE = "RESUME_TOKEN_STALE"

RETRY_PAUSE_S = 2.0
"""Pause before another stream, where the server does not state one."""

MAX_ID_CHARS = 4096
"""Limit of the id of an image on the server, its file name."""

MAX_SKIPPED = 1000
"""Objects that were not sent and are listed with their message."""

MAX_IMAGE_MESSAGES = 10_000
"""Messages of progress on one image of a data set on the server, one for each of its parts."""

MAX_ATTEMPTS = 5
"""Consecutive streams without a new image after which the evaluation fails."""


class IdleTimeout:
    """Expires when no message is sent or received for `limit_s` seconds."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._last_reset = time.monotonic()

    def reset(self) -> None:
        """Restarts the timeout; call it for each message."""
        self._last_reset = time.monotonic()

    @property
    def is_expired(self) -> bool:
        """No message for longer than the limit."""
        return time.monotonic() - self._last_reset > self._limit_s


class RetryBudget:
    """Limits the failures of consecutive streams that bring no new image.

    MAX_ATTEMPTS failures exhaust it. A failure for which the server states when to retry does not count, since the
    server is alive; such failures exhaust the budget once there is nothing else for `limit_s` seconds, or if the server
    states a longer time.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._failures = 0
        self._busy_since: float | None = None

    def spend(self, retry_after_s: float | None, *, has_progress: bool) -> bool:
        """Counts the failure of a stream; returns False when no further stream may follow.

        Args:
            retry_after_s: pause that the server states; None where it states none.
            has_progress: the stream brought a new image.
        """
        if has_progress:
            self._failures, self._busy_since = 0, None
        if retry_after_s is None:
            self._failures, self._busy_since = self._failures + 1, None
            return self._failures < MAX_ATTEMPTS
        now = self._clock()
        if self._busy_since is None:
            self._busy_since = now
        return retry_after_s <= self._limit_s and now - self._busy_since <= self._limit_s


class EvaluationSource(ABC):
    """The images of an evaluation.

    Attributes:
        images_total: number of images; 0 where only the server knows it.
        items_sent: number of images, and of further messages on them, that the current stream has sent; None where the
            server has the images.
        images_skipped: images of the current stream that could not be read here.
        skipped: objects that were not sent, by reason.
        skipped_rows: the first MAX_SKIPPED of them that should have been measured, with the message of each.
        failure: the exception that ended the requests of the current stream; None where they are complete.
    """

    def __init__(self) -> None:
        self.images_total = 0
        self.items_sent: int | None = None
        self.images_skipped = 0
        self.skipped: Counter[str] = Counter()
        self.skipped_rows: list[Skipped] = []
        self.failure: Exception | None = None

    @abstractmethod
    def prepare(self, server: Transport) -> None:
        """Prepares the requests of the next stream for its server: the limits of servers may differ.

        Raises:
            ClientError: the server does not state its limits.
        """

    @abstractmethod
    def requests(
        self, checkpoint: EvaluationCheckpoint, idle_timeout: IdleTimeout
    ) -> Iterator[evaluation_pb2.EvaluateRequest]:
        """Yields the requests of one stream, with the records of the checkpoint; resets the counters of skipped images.

        Runs in a thread of gRPC.
        """

    def has_image(self, item_id: str) -> bool:
        """Returns False for an id that no image of the evaluation can have."""
        return len(item_id) <= MAX_ID_CHARS

    def content_sha256(self, item_id: str) -> str:
        """Returns the SHA-256 of the image's file; empty where the file is on the server."""
        return ""

    def message(self, text: str) -> str:
        """Returns a message of the server for the user."""
        return text

    def category_id(self, wire_id: int) -> JsonId:
        """Returns the category id in the data set."""
        return wire_id

    def notes(self) -> list[str]:
        """Returns messages for the user on the images of the last stream."""
        return []

    @abstractmethod
    def instance(self, row: evaluation_pb2.InstanceIou) -> MeasuredInstance:
        """Returns a row of the result with the ids of the data set. Raises LookupError: it has no such object."""


class _Failure(NamedTuple):
    """A stream that ended without a result and may be retried."""

    error: MalError
    retry_after_s: float | None


class EvaluationStream:
    """Evaluate calls for one source, one after another, until one returns a result.

    A stream that brought an image is followed by one to the same server, whose records may be valid nowhere else; one
    that brought none is followed by one to the next server.

    Args:
        client: of one or several servers.
        source: the images.
        checkpoint: gets the records; those that it has are sent again.
        on_progress: called after each image.
        on_notice: called with a message for the user.
    """

    def __init__(
        self,
        client: Transport,
        source: EvaluationSource,
        checkpoint: EvaluationCheckpoint,
        *,
        on_progress: OnProgress | None = None,
        on_notice: OnNotice | None = None,
    ) -> None:
        servers = client.servers()
        # A resolver may sort the addresses, so that the first would get every evaluation.
        first = random.randrange(len(servers))
        self._servers = cycle([*servers[first:], *servers[:first]])
        self._client = next(self._servers)
        self._source = source
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._on_notice = on_notice
        self._previous = dict(checkpoint.items())
        """Records of an earlier process, by item id."""
        self._images_done = self._images_total = self._images_resumed = 0
        self._messages = 0
        """Messages of progress on the current stream, one for each image or part of an image."""
        self._image_messages = 0
        """Those on the current image."""

    def run(self, budget: RetryBudget) -> evaluation_pb2.EvaluateResult:
        """Streams until there is a result.

        Raises:
            MalError: a failure that a retry cannot fix, or the budget is exhausted.
        """
        while True:
            known = len(self._checkpoint)
            outcome = self._stream_once()
            if isinstance(outcome, evaluation_pb2.EvaluateResult):
                return outcome
            if outcome is None:
                continue
            has_progress = len(self._checkpoint) > known
            if not budget.spend(outcome.retry_after_s, has_progress=has_progress):
                raise outcome.error
            self._client.pause(outcome.retry_after_s or RETRY_PAUSE_S)
            if not has_progress:
                self._client = next(self._servers)

    def _stream_once(self) -> evaluation_pb2.EvaluateResult | _Failure | None:
        """Runs one stream; None: it must be repeated without the records, which the server rejected."""
        idle_timeout = IdleTimeout(self._client.timeout_s)
        self._images_done = self._images_total = self._images_resumed = self._messages = self._image_messages = 0
        try:
            self._source.prepare(self._client)
        except ServerUnavailable as error:
            cause = error.__cause__
            return _Failure(error, rpc_details(cause).retry_after_s if isinstance(cause, grpc.RpcError) else None)
        stub = evaluation_pb2_grpc.EvaluationServiceStub(self._client.open_channel())
        stream = stub.Evaluate(self._source.requests(self._checkpoint, idle_timeout))
        result: evaluation_pb2.EvaluateResult | None = None
        try:
            with watchdog(lambda: idle_timeout.is_expired, stream.cancel):
                for response in stream:
                    idle_timeout.reset()
                    if response.HasField("result"):
                        result = response.result
                    else:
                        self._take_progress(response.progress)
        except grpc.RpcError as error:
            # The result is the last message: an error after it, for example of a proxy, loses nothing.
            if result is None:
                return self._failure_of(error, idle_timeout)
        finally:
            stream.cancel()  # type: ignore[no-untyped-call]
        if result is None:
            message = f"{self._client.address}: the evaluation ended without a result; see the log of the server"
            return _Failure(ServerError(message), None)
        return result

    def _failure_of(self, error: grpc.RpcError, idle_timeout: IdleTimeout) -> _Failure | None:
        """Returns a failure that may be retried, or None after discarding stale records; raises any other one."""
        if self._source.failure is not None:
            raise self._source.failure from None
        address, details = self._client.address, rpc_details(error)
        if idle_timeout.is_expired:
            raise CallTimedOut(
                f"{address}: no message of the evaluation for {self._client.timeout_s:g} s; check that the server is "
                "alive, or raise the timeout"
            ) from error
        if details.reason == RESUME_TOKEN_STALE and self._checkpoint.token:
            if self._on_notice is not None:
                self._on_notice(
                    f"{address}: rejects the earlier records, because its weights, its resume_key or the options have "
                    "changed; the evaluation starts again"
                )
            self._checkpoint.clear()
            return None
        final_error = from_rpc_error(address, error, None)
        final_error.__cause__ = error
        if not is_disconnect(error):
            raise final_error
        return _Failure(final_error, details.retry_after_s)

    def _check_progress(self, progress: evaluation_pb2.EvaluateProgress) -> None:
        """Raises ServerError for an image that is not in the evaluation, or a message too many.

        So every stream has an end. For a data set on the server, the first message fixes the number of images, and the
        messages on one image have a limit.
        """
        source = self._source
        self._images_total = self._images_total or source.images_total or progress.images_total
        self._messages += 1
        self._image_messages = 1 if progress.images_done > self._images_done else self._image_messages + 1
        if source.items_sent is not None:
            is_expected = self._messages <= source.items_sent
        else:
            is_counted = self._images_done <= progress.images_done <= self._images_total
            is_expected = is_counted and self._image_messages <= MAX_IMAGE_MESSAGES
        if not (is_expected and source.has_image(progress.item_id)):
            raise ServerError(
                f"{self._client.address}: message {self._messages} has the progress of image "
                f"{progress.item_id[:100]!r}, number {progress.images_done} of {self._images_total}, which is not in "
                "the evaluation; check that client and server have compatible versions"
            )

    def _take_progress(self, progress: evaluation_pb2.EvaluateProgress) -> None:
        item_id, source = progress.item_id, self._source
        self._check_progress(progress)
        if progress.images_done > self._images_done:  # not for a further part of an image
            self._images_resumed += bool(progress.record) and self._previous.get(item_id) == progress.record
        self._images_done = progress.images_done
        self._checkpoint.add(progress.resume_token, item_id, progress.record, source.content_sha256(item_id))
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    images_done=progress.images_done + source.images_skipped,
                    images_total=self._images_total,
                    boxes_done=progress.instances_done,
                    boxes_failed=source.skipped.total() - source.skipped[Reason.CROWD],
                    running_miou=progress.running_miou if progress.HasField("running_miou") else None,
                    images_before=self._images_resumed,
                )
            )
