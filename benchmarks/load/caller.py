"""One process of load clients: calls a server as its plan says, checks every answer, writes a report. Needs no torch.

    python -m benchmarks.load.caller PLAN.json DECK_FOLDER REPORT.json

With `starts_by` in the plan it says that it is ready (REPORT.ready) and waits for that file, which holds the moment.
A plan's calls are closed (each client sends when it has its answer) or open (sent by a schedule, whatever becomes of
them).
Requests leave serialized, and nothing is drawn or encoded meanwhile.
"""

import asyncio
import gc
import json
import resource
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from mal.v1 import labeling_pb2, types_pb2
from mal_client.errors import is_disconnect

from benchmarks.load.deck import DeckImage, load_deck
from benchmarks.load.summary import ClientReport, Sample

LABEL_IMAGE = "/mal.v1.LabelingService/LabelImage"
LABEL_IMAGES = "/mal.v1.LabelingService/LabelImages"
DETAILS_KEY = "grpc-status-details-bin"
ID_KEY = "x-request-id"
MAX_BACKOFF_S = 2.0
CONNECT_S = 30.0


@dataclass(frozen=True)
class Plan:
    """What one client process does.

    Attributes:
        address: of the server; several, with commas: client i calls the i-th, and after a lost connection the next.
        number: of this process; makes ids unique.
        clients: connections, each used by one client.
        seconds: for how long calls are begun.
        calls: how many to begin at most in this process; 0: no bound.
        rate: calls a second of an open loop; 0: a closed loop.
        boxes: of each call.
        kind: interactive, or batch (asked for in the options; with `streams` by the method).
        streams: bulk streams (LabelImages) in the place of calls.
        deadline_s: of a call; 0: none.
        retries: come back after a refusal when the server says so, and after a lost connection, until answered.
        stops_at_failure: each client ends with its first call that is not answered.
        seed: of the choice of pictures and boxes, and of an open loop's gaps.
        starts_by: a file that will hold the moment to begin, monotonic clock; "": at once.
        token: shown with each call.
    """

    address: str
    number: int = 0
    clients: int = 1
    seconds: float = 10.0
    calls: int = 0
    rate: float = 0.0
    boxes: int = 1
    kind: str = "interactive"
    streams: bool = False
    deadline_s: float = 0.0
    retries: bool = False
    stops_at_failure: bool = False
    seed: int = 1
    starts_by: str = ""
    token: str = ""


@dataclass
class Ask:
    """One request under way: the boxes that still have no answer, by id."""

    name: str
    picture: DeckImage
    places: dict[int, int]
    boxes: int
    due: float
    first: float = 0.0
    right: int = 0
    wrong: int = 0
    tries: int = 0

    def request(self, options: types_pb2.LabelOptions) -> bytes:
        """The unanswered boxes."""
        return self.picture.request(list(self.places.values()), list(self.places), options)

    def absorb(self, response: labeling_pb2.LabelImageResponse) -> float:
        """Checks what came; seconds after which boxes that the server could not do may be asked for again, else 0."""
        self.first = self.first or time.monotonic()
        again_s = 0.0
        for result in response.results:
            place = self.places.get(result.instance_id)
            retry_s = retry_of(result.status) if result.status.code else None
            if place is not None and retry_s is not None:
                again_s = max(again_s, retry_s)
            elif place is None or not self.picture.is_right(place, result):
                self.wrong += 1
            else:
                self.right += 1
                del self.places[result.instance_id]
        return again_s

    def sample(self, code: str, kind: str, reason: str = "", has_retry: bool = False) -> Sample:
        """How it ended."""
        now = time.monotonic()
        return Sample(
            self.due, self.first, now, self.boxes, self.right, self.wrong, code, reason, has_retry, self.tries, kind
        )


def retry_of(status: status_pb2.Status) -> float | None:
    """Seconds after which the server wants to be asked again, if it says so."""
    info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds()) / 1000
    return None


def reason_of(status: status_pb2.Status) -> str:
    """The reason that a status carries."""
    info = error_details_pb2.ErrorInfo()
    return next((str(info.reason) for detail in status.details if detail.Unpack(info)), "")


def trailers_of(error: grpc.aio.AioRpcError) -> list[tuple[str, Any]]:
    """Keys and values; grpc-stubs' type for them is not iterable."""
    found: Any = error.trailing_metadata()
    return list(found or ())


class Caller:
    """The clients of one plan."""

    def __init__(self, plan: Plan, deck: Sequence[DeckImage], ready_file: Path) -> None:
        self._plan = plan
        self._ready_file = ready_file
        self._deck = deck
        self._rng = np.random.default_rng((plan.seed, plan.number))
        self._made = 0
        self.samples: list[Sample] = []
        is_batch = plan.kind == "batch" and not plan.streams
        self._options = types_pb2.LabelOptions(
            priority=types_pb2.PRIORITY_BATCH if is_batch else types_pb2.PRIORITY_UNSPECIFIED
        )
        self._metadata = (("authorization", f"Bearer {plan.token}"),) if plan.token else ()

    def _new(self, due: float) -> Ask:
        picture = self._deck[int(self._rng.integers(len(self._deck)))]
        chosen = self._rng.permutation(len(picture.boxes))[: self._plan.boxes]
        base = (self._plan.number << 40) + self._made * 1024
        self._made += 1
        places = {base + at: int(place) for at, place in enumerate(chosen)}
        return Ask(f"load-{self._plan.number}-{self._made}", picture, places, len(places), due)

    def _is_over(self, until: float) -> bool:
        return time.monotonic() >= until or 0 < self._plan.calls <= self._made

    def _channel(self, client: int) -> grpc.aio.Channel:
        addresses = self._plan.address.split(",")
        options = [
            # Every client has a connection of its own, as clients on other machines have.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        return grpc.aio.insecure_channel(addresses[client % len(addresses)], options=options)

    async def run(self) -> tuple[float, float]:
        """Calls until the plan's end; when the first call was begun and the last one ended."""
        plan = self._plan
        channels = [self._channel(client) for client in range(plan.clients * (len(plan.address.split(","))))]
        # What connecting and first calls cost is no part of the load.
        connecting = [asyncio.ensure_future(channel.channel_ready()) for channel in channels]
        _, late = await asyncio.wait(connecting, timeout=CONNECT_S)
        for task in late:  # nobody there: its calls will say so
            task.cancel()
        await self._start()
        began = time.monotonic()
        until = began + plan.seconds
        if plan.streams:
            await asyncio.gather(*(self._stream(channel, until) for channel in channels))
        elif plan.rate > 0:
            await self._open_loop(channels, began, until)
        else:
            await asyncio.gather(*(self._closed_loop(channels, client, until) for client in range(plan.clients)))
        ended = time.monotonic()
        for channel in channels:
            await channel.close(None)
        return began, ended

    async def _start(self) -> None:
        """Says that all is ready, and waits for the common start."""
        if not self._plan.starts_by:
            return
        self._ready_file.touch()
        while not Path(self._plan.starts_by).exists():
            await asyncio.sleep(0.005)
        await asyncio.sleep(max(float(Path(self._plan.starts_by).read_text()) - time.monotonic(), 0))

    async def _closed_loop(self, channels: Sequence[grpc.aio.Channel], client: int, until: float) -> None:
        while not self._is_over(until):
            sample = await self._call(channels, client, self._new(time.monotonic()))
            self.samples.append(sample)
            if self._plan.stops_at_failure and sample.code != "OK":
                return

    async def _open_loop(self, channels: Sequence[grpc.aio.Channel], began: float, until: float) -> None:
        due, running, number = began, set[asyncio.Task[Sample]](), 0
        while not self._is_over(until) and due < until:
            await asyncio.sleep(max(due - time.monotonic(), 0))
            task = asyncio.create_task(self._call(channels, number, self._new(due)))
            running.add(task)
            task.add_done_callback(lambda done: self.samples.append(done.result()))
            task.add_done_callback(running.discard)
            number += 1
            due += float(self._rng.exponential(1 / self._plan.rate))
        await asyncio.gather(*running)

    async def _call(self, channels: Sequence[grpc.aio.Channel], client: int, ask: Ask) -> Sample:
        """One request to its end: with retries until it is answered, else whatever the first call brings."""
        plan = self._plan
        backoff_s = 0.05
        while True:
            channel = channels[(client + ask.tries * (plan.retries and len(channels) > plan.clients)) % len(channels)]
            ask.tries += 1
            stub: Any = channel.unary_stream(
                LABEL_IMAGE, None, response_deserializer=labeling_pb2.LabelImageResponse.FromString
            )
            call = stub(
                ask.request(self._options),
                timeout=plan.deadline_s or None,
                metadata=(*self._metadata, (ID_KEY, ask.name)),
            )
            again_s, is_broken = 0.0, False
            try:
                async for response in call:
                    again_s = max(again_s, ask.absorb(response))
                code, status = "OK", status_pb2.Status()
                if dict(await call.trailing_metadata()).get(ID_KEY) != ask.name:
                    ask.wrong += 1
            except grpc.aio.AioRpcError as error:
                details: Any = dict(trailers_of(error))
                code, status = error.code().name, status_pb2.Status.FromString(details.get(DETAILS_KEY, b""))
                is_broken = is_disconnect(error)
            retry_s = retry_of(status)
            if code == "OK" and not (again_s and plan.retries):
                return ask.sample(code, plan.kind)
            if not plan.retries or not (code == "OK" or is_broken):
                return ask.sample(code, plan.kind, reason_of(status), retry_s is not None)
            # A refusal says when to come back; a lost connection says nothing.
            wait_s = again_s or retry_s or backoff_s
            if retry_s is None:
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
            await asyncio.sleep(wait_s * float(self._rng.uniform(1.0, 1.3)))

    async def _stream(self, channel: grpc.aio.Channel, until: float) -> None:
        """A bulk stream that always has the next item ready; refused items are sent again."""
        waiting: dict[str, Ask] = {}
        again: asyncio.Queue[Ask] = asyncio.Queue()

        async def items() -> AsyncIterator[bytes]:
            while not self._is_over(until) or waiting:
                if self._is_over(until) or not again.empty():
                    try:
                        ask = await asyncio.wait_for(again.get(), 0.05)
                    except TimeoutError:
                        continue
                else:
                    ask = self._new(time.monotonic())
                waiting[ask.name] = ask
                ask.tries += 1
                request = labeling_pb2.LabelImageRequest.FromString(ask.request(self._options))
                yield labeling_pb2.LabelImagesRequest(item_id=ask.name, request=request).SerializeToString()

        stub: Any = channel.stream_stream(
            LABEL_IMAGES, None, response_deserializer=labeling_pb2.LabelImagesResponse.FromString
        )
        loop = asyncio.get_running_loop()
        async for response in stub(items(), metadata=self._metadata):
            ask = waiting[response.item_id]
            retry_s = retry_of(response.status)
            if response.status.code and retry_s is not None:
                loop.call_later(retry_s, again.put_nowait, ask)
                continue
            del waiting[response.item_id]
            if response.status.code:
                code = grpc_code(response.status.code)
                self.samples.append(ask.sample(code, self._plan.kind, reason_of(response.status)))
                continue
            ask.absorb(response.response)
            self.samples.append(ask.sample("OK", self._plan.kind))


def grpc_code(number: int) -> str:
    """The name of a status code."""
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)


def main(argv: Sequence[str]) -> int:
    plan_file, deck_folder, report_file = (Path(text) for text in argv)
    plan = Plan(**json.loads(plan_file.read_text()))
    caller = Caller(plan, load_deck(deck_folder), report_file.with_suffix(".ready"))
    gc.freeze()
    before = resource.getrusage(resource.RUSAGE_SELF)
    began, ended = asyncio.run(caller.run())
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ClientReport(caller.samples, cpu_s, began, ended).save(report_file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
