"""Runs a bulk job on one or several servers: one thread a server, one shared queue, results in one thread.

The items of a server that is lost go to the others. Servers may join and leave while the job runs. Knows nothing of
COCO.
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

from mal_client.bulk.server_finder import ServerChanges, ServerDirectory, ServerFinder
from mal_client.bulk.stream import BulkStream, ItemResult
from mal_client.bulk.work_queue import WorkItem, WorkQueue
from mal_client.errors import (
    CallTimedOut,
    ModelChanged,
    ServerError,
    ServerUnavailable,
    is_aged,
    rpc_details,
    rpc_text,
)
from mal_client.images.image_input import EncodedImage
from mal_client.transport.base import Transport
from mal_client.types import LabelOptions
from mal_train.core.errors import MalError

LOST: Final = (ServerUnavailable, CallTimedOut, ServerError, ModelChanged)
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

    thread: _ServerThread
    error: Exception | None


_Event = ItemResult | _Notice | _Stopped | ServerChanges | Exception


class MultiServerDispatcher:
    """Distributes the items of a queue to several servers.

    Args:
        servers: a client for each server, and its limit of items in flight.
        work: items of the job.
        load: reads the image of an item.
        options: label options.
        on_notice: receives messages for the user in the thread that iterates over `results`: a connection is lost, a
            server is back, joins, leaves or is given up.
        directory: finds further servers while the job runs; None: there are none.
    """

    def __init__(
        self,
        servers: Sequence[tuple[Transport, int]],
        work: WorkQueue,
        load: Callable[[WorkItem], EncodedImage],
        options: LabelOptions,
        on_notice: OnNotice,
        *,
        directory: ServerDirectory | None = None,
    ) -> None:
        self._servers = servers
        self._work = work
        self._load = load
        self._options = options
        self._on_notice = on_notice
        self._directory = directory
        self._stop = threading.Event()
        # Bounded: when results are not written as fast as they arrive, the servers wait.
        self._events: queue.Queue[_Event] = queue.Queue(MAX_PENDING_EVENTS)
        self._threads: dict[str, _ServerThread] = {}
        """Running threads, by the address of their server."""
        self._finder = None if directory is None else ServerFinder(directory, self._in_use, self._deliver)
        self._last_error: MalError = ServerUnavailable("no server is left")

    def results(self) -> Generator[ItemResult, None, None]:
        """Yields each final result once, as it arrives. Closing the generator ends all streams.

        Raises:
            AllServersLost: items are left and no server is.
            MalError: the first error that other servers would share.
        """
        for client, max_items in self._servers:
            self._start(client, max_items)
        if self._finder is not None:
            self._finder.start()
        try:
            while self._threads:
                yield from self._next_results()
        finally:
            self._stop.set()
            if self._finder is not None:
                self._finder.stop()
            for thread in self._threads.values():
                thread.cancel()
            for thread in self._threads.values():
                thread.join()

    def _next_results(self) -> Iterator[ItemResult]:
        """Handles one event."""
        event = self._events.get()
        if isinstance(event, ItemResult):
            yield event
        elif isinstance(event, _Notice):
            self._on_notice(event.text)
            self._request_refresh()
        elif isinstance(event, _Stopped):
            self._on_stopped(event.thread, event.error)
        elif isinstance(event, ServerChanges):
            self._apply(event)
        else:
            raise event

    def _start(self, client: Transport, max_items: int) -> None:
        stream = BulkStream(
            address=client.address,
            queue=self._work,
            load=self._load,
            on_failure=self._deliver,
            options=self._options,
            max_items=max_items,
            idle_timeout_s=client.timeout_s,
        )
        thread = _ServerThread(client, stream, self._deliver, self._stop, has_others=lambda: len(self._threads) > 1)
        self._threads[client.address] = thread
        thread.start()

    def _in_use(self) -> frozenset[str]:
        return frozenset(self._threads.copy())

    def _apply(self, changes: ServerChanges) -> None:
        """Starts the servers that joined, and leaves those that are gone; never the last one."""
        for text in changes.notices:
            self._on_notice(text)
        for client, max_items in changes.added:
            if client.address not in self._threads and not self._work.done:
                self._start(client, max_items)
                self._on_notice(f"{client.address}: joins the job; it has {_servers(len(self._threads))} now")
        for address in sorted(changes.gone & self._threads.keys()):
            staying = [thread for thread in self._threads.values() if not thread.is_leaving]
            if not self._threads[address].is_leaving and len(staying) > 1:
                self._threads[address].leave()
                self._on_notice(
                    f"{address}: its name no longer has this address; it gets no further items, and the job has "
                    f"{_servers(len(staying) - 1)} now"
                )

    def _on_stopped(self, thread: _ServerThread, error: Exception | None) -> None:
        """Raises the error of a stopped thread, unless other servers can finish the job or it is finished."""
        del self._threads[thread.address]
        if error is not None and not isinstance(error, LOST):
            raise error
        if error is not None and not thread.is_leaving:
            self._last_error = error
            if self._directory is not None:
                self._directory.note_lost(thread.address)
        if self._work.done:
            return
        if not self._threads and self._directory is not None:
            # Perhaps the servers of the name were all replaced.
            self._apply(self._directory.refresh(frozenset()))
        if not self._threads:
            raise AllServersLost(self._last_error)
        if error is not None and not thread.is_leaving:
            self._on_notice(f"{error}; continuing with {_servers(len(self._threads))}")
            self._request_refresh()

    def _request_refresh(self) -> None:
        if self._finder is not None:
            self._finder.request()

    def _deliver(self, event: _Event) -> None:
        while not self._stop.is_set():
            try:
                self._events.put(event, timeout=POLL_S)
            except queue.Full:
                continue
            return


def _servers(count: int) -> str:
    return f"{count} {'server' if count == 1 else 'servers'}"


class _ServerThread(threading.Thread):
    """Runs the streams of one server, one after another, until the job is done or the server is lost or left.

    Attributes:
        address: of the server.
        is_leaving: `leave` was called.
    """

    def __init__(
        self,
        client: Transport,
        stream: BulkStream,
        deliver: Callable[[_Event], None],
        stop: threading.Event,
        *,
        has_others: Callable[[], bool],
    ) -> None:
        super().__init__(name=f"mal-client-bulk-{client.address}", daemon=True)
        self.address = client.address
        self.is_leaving = False
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
        self._deliver(_Stopped(self, error))

    def leave(self) -> None:
        """Ends the thread as soon as the items in flight have results."""
        self.is_leaving = True
        self._stream.leave()

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
        # A server that sends RetryInfo, or limits the age of connections, is alive.
        is_alive = rpc_details(error).retry_after_s is not None or is_aged(error)
        if not is_alive and not self._is_away and not is_done:
            self._is_away = True
            others = "; other servers take its items" if self._has_others() else ""
            text = f"{self._client.address}: {CONNECTION_LOST} ({rpc_text(error)}){others}; retrying"
            self._deliver(_Notice(text))
        return pause_s

    def _pause(self, pause_s: float) -> None:
        while pause_s > 0 and not self.is_leaving and not self._stop_event.wait(min(pause_s, POLL_S)):
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
