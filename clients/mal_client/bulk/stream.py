"""Bookkeeping of the bulk streams to one server: which items are on their way there, and when to give it up.

Knows nothing of COCO and nothing of the channel: it makes requests on demand, within a bounded window, and takes the
answers. Requests are drawn by gRPC's sending thread, answers come from the caller's; the pool's lock stands between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import grpc
from mal.v1 import labeling_pb2

from mal_client.bulk.work_queue import WorkItem, WorkQueue
from mal_client.errors import (
    RESPONSE_TOO_LARGE,
    CallTimedOut,
    ItemError,
    ModelChanged,
    ServerError,
    ServerUnavailable,
    from_rpc_error,
    is_disconnect,
    item_error,
    rpc_details,
)
from mal_client.images.image_input import EncodedImage
from mal_client.transport.image_call import MAX_RESENDS
from mal_client.transport.serialization import labeling_messages
from mal_client.types import BoxLabel, BoxXywh, LabelOptions, ModelRef
from mal_train.core.errors import BadImage

MAX_BYTES_IN_FLIGHT = 96 * 1024 * 1024
"""Encoded bytes of unanswered items; one item may exceed it alone."""

MAX_BREAKS = 6
"""Breaks of the stream in a row, with no answer between them, before the server counts as lost."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0


@dataclass(frozen=True)
class ItemResult:
    """What became of (some of) an item's boxes; a whole item's failure stands in `error` for all of its boxes."""

    item: WorkItem
    labels: dict[int, BoxLabel] = field(default_factory=dict)
    error: ItemError | None = None


class BulkStream:
    """State of one server's part of a job, over as many streams as it takes.

    Use: open a stream over `requests()`, pass each message to `absorb`; when the stream closes call `ended`, when it
    fails `broke`; both end the generator that `requests` returned, and the next stream takes a new one.

    Args:
        address: for messages.
        pool: what to label; shared with the calls to other servers.
        load: reads an item's image; BadImage fails that item alone.
        fail: gets the items that fail so, from gRPC's sending thread.
        options: how boxes become masks.
        max_items: unanswered items at a time.
        silence_s: without any answer for so long the server counts as lost.
    """

    def __init__(
        self,
        *,
        address: str,
        pool: WorkQueue,
        load: Callable[[WorkItem], EncodedImage],
        fail: Callable[[ItemResult], None],
        options: LabelOptions,
        max_items: int,
        silence_s: float,
    ) -> None:
        self._address = address
        self._pool = pool
        self._load = load
        self._fail = fail
        self._options = options
        self._max_items = max(1, max_items)
        self._silence_s = silence_s
        self._clock = pool.clock
        self._changed = pool.changed
        self._generation = 0
        self._in_flight: dict[str, tuple[WorkItem, int]] = {}
        self._fault: Exception | None = None
        self._breaks = 0
        self._breaking_since: float | None = None
        self._waiting_since = self._clock()

    @property
    def done(self) -> bool:
        """Everything is answered or failed for good, here and at the other servers."""
        with self._changed:
            return self._pool.done

    def is_silent(self) -> bool:
        """The server owes an answer and has given none for `silence_s`."""
        with self._changed:
            return bool(self._in_flight) and self._clock() - self._waiting_since > self._silence_s

    def requests(self) -> Iterator[labeling_pb2.LabelImagesRequest]:
        """Requests for one stream. Blocks while the window is full; ends with the items or with the stream."""
        with self._changed:
            generation = self._generation
            self._waiting_since = self._clock()
        return self._requests(generation)

    def absorb(self, response: labeling_pb2.LabelImagesResponse) -> list[ItemResult]:
        """What one message settles for good.

        Raises:
            ServerFailed: an answer to something that is not on its way.
            ModelChanged: an answer by other weights than those before.
        """
        with self._changed:
            self._breaks, self._breaking_since, self._waiting_since = 0, None, self._clock()
            taken = self._in_flight.pop(response.item_id, None)
            if taken is None:
                raise ServerError(
                    f"{self._address}: answered item {response.item_id!r} twice or unasked; client and server do not "
                    "fit each other"
                )
            try:
                answers = self._settle(taken[0], response)
            except ServerError:
                # Another server may do better.
                self._pool.give_back([taken[0]])
                raise
            self._pool.settle()
            return answers

    def ended(self) -> None:
        """The stream closed without an error.

        Raises:
            ServerUnavailable: it closed although items had no answer, and so did those before it.
        """
        with self._changed:
            if self._in_flight:
                self._breaks += 1
                if self._breaks >= MAX_BREAKS:
                    raise ServerUnavailable(
                        f"{self._address}: closed the stream {self._breaks} times with {len(self._in_flight)} items "
                        "unanswered; look into the server's log"
                    )
            self._restart()

    def broke(self, error: grpc.RpcError) -> float:
        """Seconds to wait before a new stream takes up the unanswered items.

        Raises:
            MalError: the failure is final.
        """
        if self._fault is not None:
            raise self._fault
        silent = self.is_silent()
        with self._changed:
            self._restart()
            if silent:
                raise CallTimedOut(
                    f"{self._address}: no answer for {self._silence_s:g} s; look whether the server is alive, or allow "
                    "more time"
                ) from error
            if not is_disconnect(error):
                raise from_rpc_error(self._address, error, None) from error
            self._breaks += 1
            self._breaking_since = self._clock() if self._breaking_since is None else self._breaking_since
            asked_s = rpc_details(error).retry_after_s
            # A server that says when to come back is alive: its word counts, and patience ends by the clock alone.
            waited_s = self._clock() - self._breaking_since
            if (self._breaks >= MAX_BREAKS and asked_s is None) or waited_s > self._silence_s:
                raise from_rpc_error(self._address, error, None) from error
            return asked_s if asked_s is not None else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._breaks - 1))

    def close(self) -> None:
        """Ends the generator of the current stream."""
        with self._changed:
            self._restart()

    def _requests(self, generation: int) -> Iterator[labeling_pb2.LabelImagesRequest]:
        while (item := self._next(generation)) is not None:
            try:
                image = self._load(item)
            except BadImage as fault:
                self._fail_locally(generation, item, fault)
                continue
            except Exception as fault:
                # gRPC would report it as a failure of the server; the caller's thread raises it as what it is.
                self._fault = fault
                raise
            if not self._weigh(generation, item, len(image.content)):
                return
            yield labeling_messages.bulk_request(item.item_id, image, item.boxes, self._options)

    def _next(self, generation: int) -> WorkItem | None:
        with self._changed:
            while generation == self._generation and not self._pool.done:
                pause_s: float | None = None
                if self._has_room():
                    item = self._pool.take()
                    if item is not None:
                        if not self._in_flight:
                            # Nothing was owed before; the silence begins now.
                            self._waiting_since = self._clock()
                        self._in_flight[item.item_id] = (item, 0)
                        return item
                    pause_s = self._pool.wait_s()
                    if self._pool.done:
                        return None
                self._changed.wait(pause_s)
            return None

    def _has_room(self) -> bool:
        size = sum(size for _, size in self._in_flight.values())
        return len(self._in_flight) < self._max_items and (not self._in_flight or size < MAX_BYTES_IN_FLIGHT)

    def _weigh(self, generation: int, item: WorkItem, size: int) -> bool:
        with self._changed:
            if generation != self._generation:
                # The stream broke while the file was read; the item already waits for the next one.
                return False
            self._in_flight[item.item_id] = (item, size)
            return True

    def _fail_locally(self, generation: int, item: WorkItem, fault: BadImage) -> None:
        with self._changed:
            if generation != self._generation:
                return
            del self._in_flight[item.item_id]
        # Outside the lock: whoever takes it may be busy.
        self._fail(ItemResult(item, error=ItemError("INVALID_ARGUMENT", fault.reason, str(fault))))
        with self._changed:
            self._pool.settle()

    def _settle(self, item: WorkItem, response: labeling_pb2.LabelImagesResponse) -> list[ItemResult]:
        error = item_error(response.status)
        if error is not None:
            if self._send_again(item, item.boxes, error.retry_after_s) or self._send_halves(item, error):
                return []
            return [ItemResult(item, error=error)]
        self._check_model(labeling_messages.model_ref(response.response.model))
        try:
            labels = dict(labeling_messages.box_labels(response.response, item.boxes))
        except KeyError as unasked:
            raise ServerError(
                f"{self._address}: item {item.item_id!r} came with an answer to box {unasked}, which was not asked"
            ) from None
        left_out = ItemError("INTERNAL", "NOT_ANSWERED", "the server left this box out of its answer; see its log")
        for key, box in item.boxes.items():
            labels.setdefault(key, BoxLabel(key, box, error=left_out))
        again = {key: label for key, label in labels.items() if _retry_after(label) is not None}
        wait_s = max((_retry_after(label) or 0.0 for label in again.values()), default=0.0)
        if again and self._send_again(item, {key: item.boxes[key] for key in again}, wait_s):
            for key in again:
                del labels[key]
        settled = replace(item, boxes={key: item.boxes[key] for key in labels})
        return [ItemResult(settled, labels)] if labels else []

    def _send_again(self, item: WorkItem, boxes: dict[int, BoxXywh], wait_s: float | None) -> bool:
        if wait_s is None or item.resends >= MAX_RESENDS:
            return False
        self._pool.send_again([replace(item, boxes=boxes, resends=item.resends + 1)], wait_s)
        return True

    def _send_halves(self, item: WorkItem, error: ItemError) -> bool:
        """An item whose masks do not fit into one message goes in two parts."""
        if error.reason != RESPONSE_TOO_LARGE or len(item.boxes) < 2:
            return False
        self._pool.send_again(item.split())
        return True

    def _check_model(self, model: ModelRef) -> None:
        known = self._pool.model
        if known is not None and model.checkpoint_sha256 != known.checkpoint_sha256:
            raise ModelChanged(
                f"{self._address}: changed from checkpoint {known.checkpoint_sha256[:12]} to "
                f"{model.checkpoint_sha256[:12]} during the job, so its masks would not belong together; start again, "
                "without the answers so far"
            )
        self._pool.model = model

    def _restart(self) -> None:
        self._generation += 1
        self._pool.give_back(item for item, _ in self._in_flight.values())
        self._in_flight.clear()


def _retry_after(label: BoxLabel) -> float | None:
    return None if label.error is None else label.error.retry_after_s
