"""Runs a bulk job on one or several servers at once: a thread each, one shared pool of work, answers on one thread.

A server that is lost gives back what it had not answered and the others take it up. Knows nothing of COCO.
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

LOST = (ServerUnavailable, CallTimedOut, ServerError)
"""What ends one server's part of a job and leaves the rest to the others."""

_WAITING_ANSWERS: Final = 64
_LOOK_EVERY_S: Final = 0.25

OnNotice = Callable[[str], None]


class AllServersLost(Exception):
    """No server is left; carries the last one's error. For the job that runs the fleet, which knows what it has."""

    def __init__(self, fault: MalError) -> None:
        super().__init__(str(fault))
        self.fault = fault


class MultiServerDispatcher:
    """Several servers at work on one pool.

    Args:
        servers: a client for each, and how many unanswered items it takes.
        pool: the work.
        load: reads an item's image.
        options: how boxes become masks.
        on_notice: told, from the thread of `answers`, when a connection is lost and when the server is back, and when
            it is given up and others go on.
    """

    def __init__(
        self,
        servers: Sequence[tuple[Transport, int]],
        pool: WorkQueue,
        load: Callable[[WorkItem], EncodedImage],
        options: LabelOptions,
        on_notice: OnNotice,
    ) -> None:
        self._pool = pool
        self._on_notice = on_notice
        self._over = threading.Event()
        # Bounded: when answers cannot be written as fast as they come, servers wait.
        self._arrived: queue.Queue[ItemResult | _Ended | _Notice] = queue.Queue(_WAITING_ANSWERS)
        self._lines = [
            _ServerThread(
                client,
                BulkStream(
                    address=client.address,
                    pool=pool,
                    load=load,
                    fail=self._deliver,
                    options=options,
                    max_items=max_items,
                    silence_s=client.timeout_s,
                ),
            )
            for client, max_items in servers
        ]

    def answers(self) -> Generator[ItemResult, None, None]:
        """Every item's answer once, as they come. Closing the generator ends all streams.

        Raises:
            ServersLost: work is left and no server.
            MalError: a fault that other servers would share; the first one counts.
        """
        threads = [threading.Thread(target=self._serve, args=(line,), daemon=True) for line in self._lines]
        for thread in threads:
            thread.start()
        try:
            yield from self._collect(len(threads))
        finally:
            self._over.set()
            for line in self._lines:
                line.cancel()
            for thread in threads:
                thread.join()

    def _collect(self, running: int) -> Iterator[ItemResult]:
        while running:
            got = self._arrived.get()
            if isinstance(got, ItemResult):
                yield got
                continue
            if isinstance(got, _Notice):
                self._on_notice(got.text)
                continue
            running -= 1
            if got.fault is None:
                continue
            if not isinstance(got.fault, LOST):
                raise got.fault
            with self._pool.changed:
                is_work_left = not self._pool.done
            if is_work_left and not running:
                raise AllServersLost(got.fault)
            if is_work_left:
                self._on_notice(f"{got.fault}; {running} of {len(self._lines)} servers go on")

    def _serve(self, line: _ServerThread) -> None:
        fault: Exception | None = None
        try:
            while not line.call.done and not self._over.is_set():
                self._pause(line.client, line.stream(self._deliver, has_others=len(self._lines) > 1))
        except Exception as caught:
            # Whatever it is, the thread of `answers` raises it.
            fault = caught
        line.call.close()
        self._deliver(_Ended(fault))

    def _pause(self, client: Transport, pause_s: float) -> None:
        while pause_s > 0 and not self._over.wait(min(pause_s, _LOOK_EVERY_S)):
            pause_s -= _LOOK_EVERY_S
            # Tells whether the client was closed meanwhile.
            client.pause(0)

    def _deliver(self, got: ItemResult | _Ended | _Notice) -> None:
        while not self._over.is_set():
            try:
                self._arrived.put(got, timeout=_LOOK_EVERY_S)
            except queue.Full:
                continue
            return


class _Ended:
    """A server's thread is over, for good reason or bad."""

    def __init__(self, fault: Exception | None) -> None:
        self.fault = fault


@dataclass(frozen=True)
class _Notice:
    """What the user should know."""

    text: str


class _ServerThread:
    """One server with the state of its streams."""

    def __init__(self, client: Transport, call: BulkStream) -> None:
        self.client = client
        self.call = call
        self._stream: grpc.Call | None = None
        self._is_missed = False
        """Its connection was lost, which was said, and it has not answered since."""

    def stream(self, deliver: Callable[[ItemResult | _Notice], None], *, has_others: bool) -> float:
        """Runs one stream to its end; seconds to wait before the next, if one is needed."""
        stub = labeling_pb2_grpc.LabelingServiceStub(self.client.open_channel())
        stream = self._stream = stub.LabelImages(self.call.requests())
        try:
            with watchdog(self.call.is_silent, stream.cancel):
                for response in stream:
                    if self._is_missed:
                        self._is_missed = False
                        deliver(_Notice(f"{self.client.address}: is back"))
                    for answer in self.call.absorb(response):
                        deliver(answer)
            self.call.ended()
        except grpc.RpcError as error:
            # Asked first: what it owes is the others' as soon as `broke` is called, and they may be quick.
            is_all_done = self.call.done
            pause_s = self.call.broke(error)
            # One that says when to come back is there.
            if rpc_details(error).retry_after_s is None and not self._is_missed and not is_all_done:
                self._is_missed = True
                others = "; what it owes goes to the others" if has_others else ""
                deliver(
                    _Notice(f"{self.client.address}: connection lost ({rpc_text(error)}){others}; it is tried again")
                )
            return pause_s
        finally:
            self.cancel()
        return 0.0

    def cancel(self) -> None:
        """Ends the stream that runs, if one does."""
        self.call.close()
        if self._stream is not None:
            self._stream.cancel()  # type: ignore[no-untyped-call]


@contextmanager
def watchdog(is_silent: Callable[[], bool], cancel: Callable[[], object], every_s: float = 0.5) -> Iterator[None]:
    """Cancels a stream that has gone silent: waiting for a message knows no time limit of its own."""
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
