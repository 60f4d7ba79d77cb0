"""Exchange with one server of a bulk job: requests within a bounded window, results, resends, and when to give up.

Knows neither COCO nor the channel. gRPC's sending thread draws the requests; responses come from the caller's thread.
State that both need is in the `WorkQueue`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import grpc
from mal.v1 import labeling_pb2

from mal_client.bulk.work_queue import Window, WorkItem, WorkQueue
from mal_client.errors import (
    RESPONSE_TOO_LARGE,
    STREAM_IDLE,
    CallTimedOut,
    ItemError,
    ModelChanged,
    ServerError,
    ServerUnavailable,
    from_rpc_error,
    is_aged,
    is_disconnect,
    item_error,
    rpc_details,
)
from mal_client.images.image_input import EncodedImage
from mal_client.transport.image_call import MAX_RESENDS
from mal_client.transport.serialization import labeling_messages
from mal_client.types import BoxLabel, LabelOptions, ModelRef
from mal_train.core.errors import BadImage

MAX_BYTES_IN_FLIGHT = 96 * 1024 * 1024
"""Encoded bytes of items without a response; a single item may exceed it."""

MAX_BREAKS = 6
"""Stream failures in a row, without a response between them, after which the server counts as lost."""

MAX_ID_CHARS = 100
"""Characters of an id from a server in a message."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0


@dataclass(frozen=True)
class ItemResult:
    """Final results of an item, or of some of its boxes.

    Attributes:
        item: the item with the boxes that have a result.
        labels: results by the keys of the boxes; empty when the item failed.
        error: failure of the item, which is that of all its boxes.
    """

    item: WorkItem
    labels: dict[int, BoxLabel] = field(default_factory=dict)
    error: ItemError | None = None


class _Outcome(NamedTuple):
    """Consequence of one response: a final result, parts to send again, or both."""

    result: ItemResult | None
    again: tuple[WorkItem, ...] = ()
    after_s: float = 0.0


class BulkStream:
    """Share of one server in a bulk job, over as many gRPC streams as it takes.

    Use: start a gRPC stream over `requests()` and pass each response to `on_response`. Call `on_end` when the stream
    closes and `on_error` when it fails; then start the next one, unless `done`.

    Args:
        address: of the server, for messages.
        queue: items of the job; shared with the streams to other servers.
        load: reads the image of an item. `BadImage` fails that item alone; any other error ends the job.
        on_failure: receives the items that fail so, in gRPC's sending thread.
        options: label options.
        max_items: limit of items in flight.
        idle_timeout_s: seconds without a response after which the server counts as lost.
    """

    def __init__(
        self,
        *,
        address: str,
        queue: WorkQueue,
        load: Callable[[WorkItem], EncodedImage],
        on_failure: Callable[[ItemResult], None],
        options: LabelOptions,
        max_items: int,
        idle_timeout_s: float,
    ) -> None:
        self._address = address
        self._queue = queue
        self._load = load
        self._on_failure = on_failure
        self._options = options
        self._max_items = max_items
        self._idle_timeout_s = idle_timeout_s
        self._window = Window()
        self._is_leaving = False
        self._sizes_wh: dict[str, tuple[int, int] | None] = {}
        """Width and height in px of images by the id of their item in flight."""
        self._load_error: Exception | None = None
        self._breaks = 0
        self._breaking_since: float | None = None

    @property
    def done(self) -> bool:
        """True when no further stream may follow: every item of the job is settled, or the server is being left."""
        return self._is_leaving or self._queue.done

    def leave(self) -> None:
        """Sends no further items to this server. The current stream ends when those in flight have results."""
        self._is_leaving = True
        self._queue.end_window(self._window)

    def is_silent(self) -> bool:
        """Returns whether items have been in flight for `idle_timeout_s` without a response."""
        return self._queue.silent_s(self._window) > self._idle_timeout_s

    def requests(self) -> Iterator[labeling_pb2.LabelImagesRequest]:
        """Returns the requests of a new stream; the iterator blocks while the window is full.

        It ends with the last item of the job, or with the stream.
        """
        self._window = self._queue.open_window(self._max_items, MAX_BYTES_IN_FLIGHT)
        if self._is_leaving:  # since the last check of `done`
            self._queue.end_window(self._window)
        self._sizes_wh = {}
        return self._requests(self._window)

    def on_response(self, response: labeling_pb2.LabelImagesResponse) -> ItemResult | None:
        """Takes one response; returns the final result in it, if any.

        Raises:
            ServerError: the response is for an item or a box that is not in flight.
            ModelChanged: other weights answered than before.
        """
        self._breaks, self._breaking_since = 0, None
        self._queue.note_response(self._window)
        item = self._queue.pop(self._window, response.item_id)
        if item is None:
            raise ServerError(
                f"{self._address}: a response for item {response.item_id[:MAX_ID_CHARS]!r}, which is not in flight; "
                "check that client and server have compatible versions"
            )
        try:
            outcome = self._outcome(item, response)
        except (ServerError, ModelChanged):
            # Another server may do better.
            self._queue.put_back(item)
            raise
        self._queue.settle(outcome.again, outcome.after_s)
        return outcome.result

    def on_end(self) -> None:
        """Notes that the stream closed without an error.

        Raises:
            ServerUnavailable: `MAX_BREAKS` streams in a row left items without a response.
        """
        unanswered = self._queue.in_flight(self._window)
        if unanswered:
            self._breaks += 1
            if self._breaks >= MAX_BREAKS:
                raise ServerUnavailable(
                    f"{self._address}: closed the stream {self._breaks} times without a response for {unanswered} "
                    "items; see the server's log"
                )
        self.close()

    def on_error(self, error: grpc.RpcError) -> float:
        """Notes that the stream failed; returns the seconds to wait before the next one.

        Raises:
            MalError: the failure is final.
        """
        if self._load_error is not None:
            raise self._load_error
        is_silent = self.is_silent()
        self.close()
        if is_silent:
            raise CallTimedOut(
                f"{self._address}: no response for {self._idle_timeout_s:g} s; check that the server is alive, or "
                "raise the timeout"
            ) from error
        details = rpc_details(error)
        if details.reason == STREAM_IDLE:  # no failure: the items of the job are at other servers, or hard to load
            return 0.0
        now = self._queue.clock()
        self._breaks += 1
        self._breaking_since = now if self._breaking_since is None else self._breaking_since
        retry_after_s = details.retry_after_s
        # A server that sends RetryInfo is alive: only the clock ends the attempts.
        is_used_up = not self._is_soon(retry_after_s) and (retry_after_s is not None or self._breaks >= MAX_BREAKS)
        if not is_disconnect(error) or is_used_up or now - self._breaking_since > self._idle_timeout_s:
            raise from_rpc_error(self._address, error, None) from error
        if is_aged(error):
            return 0.0
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._breaks - 1)) if retry_after_s is None else retry_after_s

    def close(self) -> None:
        """Ends the requests of the current stream and puts its items back into the queue."""
        self._queue.close_window(self._window)

    def _requests(self, window: Window) -> Iterator[labeling_pb2.LabelImagesRequest]:
        while (item := self._queue.take(window)) is not None:
            try:
                image = self._load(item)
            except BadImage as error:
                self._fail(window, item, error)
                continue
            except Exception as error:
                # gRPC would report it as a failure of the server; `on_error` raises it as what it is.
                self._load_error = error
                raise
            if not self._queue.set_size(window, item, len(image.content)):
                # The stream ended while the file was read; the item is in the queue again.
                return
            self._sizes_wh[item.item_id] = image.size_wh()
            yield labeling_messages.bulk_request(item.item_id, image, item.boxes, item.points, self._options)

    def _fail(self, window: Window, item: WorkItem, error: BadImage) -> None:
        if self._queue.pop(window, item.item_id) is None:
            return
        self._on_failure(ItemResult(item, error=ItemError("INVALID_ARGUMENT", error.reason, str(error))))
        self._queue.settle()

    def _outcome(self, item: WorkItem, response: labeling_pb2.LabelImagesResponse) -> _Outcome:
        error = item_error(response.status)
        if error is not None:
            return self._failed(item, error)
        self._check_model(labeling_messages.model_ref(response.response.model))
        labels = self._labels(item, response.response)
        wait_s = {
            key: label.error.retry_after_s or 0.0
            for key, label in labels.items()
            if label.error is not None and self._is_soon(label.error.retry_after_s)
        }
        if not wait_s or item.resends >= MAX_RESENDS:
            return _Outcome(ItemResult(item, labels))
        if self._options.resolve_overlaps:
            # Their masks depend on each other.
            return _Outcome(None, (replace(item, resends=item.resends + 1),), max(wait_s.values()))
        settled = {key: label for key, label in labels.items() if key not in wait_s}
        result = ItemResult(item.with_boxes(settled), settled) if settled else None
        again = replace(item.with_boxes(wait_s), resends=item.resends + 1)
        return _Outcome(result, (again,), max(wait_s.values()))

    def _labels(self, item: WorkItem, response: labeling_pb2.LabelImageResponse) -> dict[int, BoxLabel]:
        """Returns one label for each box of an item."""
        size_wh = self._sizes_wh.pop(item.item_id, None)
        try:
            labels = dict(labeling_messages.box_labels(response, item.boxes, lambda: size_wh))
        except KeyError as key:
            raise ServerError(
                f"{self._address}: a result for box {key} of item {item.item_id!r}, which has no such box"
            ) from None
        missing = ItemError("INTERNAL", "NOT_ANSWERED", "the response has no result for this box; see the server's log")
        return {key: labels.get(key) or BoxLabel(key, box, error=missing) for key, box in item.boxes.items()}

    def _failed(self, item: WorkItem, error: ItemError) -> _Outcome:
        if self._is_soon(error.retry_after_s) and item.resends < MAX_RESENDS:
            return _Outcome(None, (replace(item, resends=item.resends + 1),), error.retry_after_s or 0.0)
        if error.reason == RESPONSE_TOO_LARGE and len(item.boxes) > 1 and not self._options.resolve_overlaps:
            return _Outcome(None, item.split())
        return _Outcome(ItemResult(item, error=error))

    def _is_soon(self, retry_after_s: float | None) -> bool:
        """Returns whether to wait for a retry time: not longer than for a server without a response."""
        return retry_after_s is not None and retry_after_s <= self._idle_timeout_s

    def _check_model(self, model: ModelRef) -> None:
        expected = self._queue.expect_model(model)
        if model.checkpoint_sha256 != expected.checkpoint_sha256:
            raise ModelChanged(
                f"{self._address}: checkpoint {model.checkpoint_sha256[:12]} answers instead of "
                f"{expected.checkpoint_sha256[:12]}; the masks of one file must come from one checkpoint; start again "
                "with --restart (restart=True)"
            )
