"""Runs a bulk job on one or several servers: one thread a server, one shared queue, results in one thread.

The items of a server that is lost go to the others. Knows nothing of COCO.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import grpc
from mal.v1 import labeling_pb2_grpc

from mal_client.bulk.stream import BulkStream, ItemResult
from mal_client.bulk.work_queue import WorkItem, WorkQueue
from mal_client.errors import CallTimedOut, ServerError, ServerUnavailable, rpc_details, rpc_text
from mal_client.images.image_input import EncodedImage
from mal_client.transport.base import Transport
from mal_client.types import LabelOptions
from mal_train.core.errors import MalError

LOST: Final = (ServerUnavailable, CallTimedOut, ServerError)
"""Errors that end the share of one server and leave its items to the others."""

CONNECTION_LOST: Final = "connection lost"
CONNECTED_AGAIN: Final = "connected again"

MAX_PENDING_EVENTS: Final = 64
POLL_S: Final = 0.25

OnNotice = Callable[[str], None]


class AllServersLost(Exception):
    """Items are left and no server is; the caller decides what becomes of the results so far.

    Attributes:
        error: that of the last server.
    """

    def __init__(self, error: MalError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class _Notice:
    """Message for the user."""

    text: str


@dataclass(frozen=True)
class _Stopped:
    """End of a server's thread; with the error that ended it, if any."""

    error: Exception | None


_Event = ItemResult | _Notice | _Stopped


class MultiServerDispatcher:
    """Distributes the items of a queue to several servers.

    Args:
        servers: a client for each server, and its limit of items in flight.
        work: items of the job.
        load: reads the image of an item.
        options: label options.
        on_notice: receives messages for the user in the thread that iterates over `results`: a connection is lost, a
            server is back, a server is given up.
    """

    def __init__(
        self,
        servers: Sequence[tuple[Transport, int]],
        work: WorkQueue,
        load: Callable[[WorkItem], EncodedImage],
        options: LabelOptions,
        on_notice: OnNotice,
    ) -> None:
        self._work = work
        self._on_notice = on_notice
        self._stop = threading.Event()
        # Bounded: when results are not written as fast as they arrive, the servers wait.
        self._events: queue.Queue[_Event] = queue.Queue(MAX_PENDING_EVENTS)
        self._threads = [
            _ServerThread(
                client,
                BulkStream(
                    address=client.address,
                    queue=work,
                    load=load,
                    on_failure=self._deliver,
                    options=options,
                    max_items=max_items,
                    idle_timeout_s=client.timeout_s,
                ),
                self._deliver,
                self._stop,
                has_others=len(servers) > 1,
            )
            for client, max_items in servers
        ]

    def results(self) -> Generator[ItemResult, None, None]:
        """Yields each final result once, as it arrives. Closing the generator ends all streams.

        Raises:
            AllServersLost: items are left and no server is.
            MalError: the first error that other servers would share.
        """
        for thread in self._threads:
            thread.start()
        try:
            yield from self._results()
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.cancel()
            for thread in self._threads:
                thread.join()

    def _results(self) -> Iterator[ItemResult]:
        running = len(self._threads)
        while running:
            event = self._events.get()
            if isinstance(event, ItemResult):
                yield event
            elif isinstance(event, _Notice):
                self._on_notice(event.text)
            else:
                running -= 1
                self._check(event.error, running)

    def _check(self, error: Exception | None, running: int) -> None:
        """Raises the error of a stopped thread, unless other servers can finish the job or it is finished."""
        if error is None:
            return
        if not isinstance(error, LOST):
            raise error
        if self._work.done:
            return
        if not running:
            raise AllServersLost(error)
        self._on_notice(f"{error}; continuing with {running} of {len(self._threads)} servers")

    def _deliver(self, event: _Event) -> None:
        while not self._stop.is_set():
            try:
                self._events.put(event, timeout=POLL_S)
            except queue.Full:
                continue
            return


class _ServerThread(threading.Thread):
    """Runs the streams of one server, one after another, until the job is done or the server is lost."""

    def __init__(
        self,
        client: Transport,
        stream: BulkStream,
        deliver: Callable[[_Event], None],
        stop: threading.Event,
        *,
        has_others: bool,
    ) -> None:
        super().__init__(name=f"mal-client-bulk-{client.address}", daemon=True)
        self._client = client
        self._stream = stream
        self._deliver = deliver
        self._stop_event = stop  # threading.Thread has a `_stop` of its own
        self._has_others = has_others
        self._call: grpc.Call | None = None
        self._is_away = False
        """The notice of a lost connection was delivered, and no response has arrived since."""

    def run(self) -> None:
        """Runs streams until the work is done or the thread is stopped; then delivers its end and any error."""
        error: Exception | None = None
        try:
            while not self._stream.done and not self._stop_event.is_set():
                self._pause(self._run_stream())
        except Exception as caught:
            # Any error is raised again in the thread that iterates over `results`.
            error = caught
        self._stream.close()
        self._deliver(_Stopped(error))

    def cancel(self) -> None:
        """Ends the current stream, if one runs."""
        self._stream.close()
        if self._call is not None:
            self._call.cancel()  # type: ignore[no-untyped-call]

    def _run_stream(self) -> float:
        """Runs one stream to its end; returns the seconds to wait before the next one."""
        stub = labeling_pb2_grpc.LabelingServiceStub(self._client.open_channel())
        call = self._call = stub.LabelImages(self._stream.requests())
        if self._stop_event.is_set():  # after the last `cancel`, perhaps
            call.cancel()  # type: ignore[no-untyped-call]
        try:
            with watchdog(self._stream.is_silent, call.cancel):
                for response in call:
                    self._on_response(self._stream.on_response(response))
            self._stream.on_end()
        except grpc.RpcError as error:
            return self._on_error(error)
        finally:
            self.cancel()
        return 0.0

    def _on_response(self, result: ItemResult | None) -> None:
        if self._is_away:
            self._is_away = False
            self._deliver(_Notice(f"{self._client.address}: {CONNECTED_AGAIN}"))
        if result is not None:
            self._deliver(result)

    def _on_error(self, error: grpc.RpcError) -> float:
        # Read first: `on_error` hands the items to other servers, which may settle them at once.
        is_done = self._stream.done
        pause_s = self._stream.on_error(error)
        # A server that sends RetryInfo is alive.
        if rpc_details(error).retry_after_s is None and not self._is_away and not is_done:
            self._is_away = True
            others = "; other servers take its items" if self._has_others else ""
            text = f"{self._client.address}: {CONNECTION_LOST} ({rpc_text(error)}){others}; retrying"
            self._deliver(_Notice(text))
        return pause_s

    def _pause(self, pause_s: float) -> None:
        while pause_s > 0 and not self._stop_event.wait(min(pause_s, POLL_S)):
            pause_s -= POLL_S
            # Raises CallCancelled when the client was closed meanwhile.
            self._client.pause(0)


@contextmanager
def watchdog(is_silent: Callable[[], bool], cancel: Callable[[], object], every_s: float = 0.5) -> Iterator[None]:
    """Cancels a stream that is silent, because gRPC waits for the next message without a limit.

    Args:
        is_silent: called every `every_s` seconds in a thread of its own.
        cancel: ends the stream.
        every_s: seconds between two checks.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            if is_silent():
                cancel()

    thread = threading.Thread(target=watch, name="mal-client-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
