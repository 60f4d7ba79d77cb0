"""Runs the load clients of one process: calls a server, checks every result, writes a report. Imports no torch.

    python -m benchmarks.load.client PLAN.json IMAGE_FOLDER REPORT.json

With `start_file` in the plan, it creates REPORT.ready and waits for that file, which contains the start time. The loop
is closed (a client sends its next call after a result) or open (calls follow a schedule, independent of results).
Requests are serialized, and images encoded, before the calls.
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

from benchmarks.load.images import LoadImage, load_images
from benchmarks.load.summary import ClientReport, Sample

LABEL_IMAGE = "/mal.v1.LabelingService/LabelImage"
LABEL_IMAGES = "/mal.v1.LabelingService/LabelImages"
DETAILS_KEY = "grpc-status-details-bin"
ID_KEY = "x-request-id"
MAX_BACKOFF_S = 2.0
CONNECT_S = 30.0


@dataclass(frozen=True)
class Plan:
    """Load of one client process.

    Attributes:
        address: address of the server, or several with commas: client i calls the i-th, and the next one after a lost
            connection.
        number: number of this process; makes ids unique.
        clients: number of clients, each with its own connection.
        seconds: duration in which calls are started.
        calls: maximum number of calls of this process; 0 for no limit.
        rate: calls per second of an open loop; 0 for a closed loop.
        boxes: boxes per call.
        group: name of the group in the summary; "batch" also requests batch priority.
        streams: use bulk streams (LabelImages) instead of single calls.
        deadline_s: deadline of a call; 0 for none.
        retries: retry according to RetryInfo, and after a lost connection, until there is a result.
        stops_at_failure: a client ends with its first failed call.
        seed: seed of the images, the boxes and the intervals of an open loop.
        start_file: file that will contain the start time (monotonic clock); "" to start at once.
        token: bearer token of each call.
    """

    address: str
    number: int = 0
    clients: int = 1
    seconds: float = 10.0
    calls: int = 0
    rate: float = 0.0
    boxes: int = 1
    group: str = "interactive"
    streams: bool = False
    deadline_s: float = 0.0
    retries: bool = False
    stops_at_failure: bool = False
    seed: int = 1
    start_file: str = ""
    token: str = ""


@dataclass
class PendingRequest:
    """Request in flight; `box_indices` maps the instance ids without a result to box indices."""

    name: str
    image: LoadImage
    box_indices: dict[int, int]
    boxes: int
    due: float
    first: float = 0.0
    right: int = 0
    wrong: int = 0
    tries: int = 0

    def request(self, options: types_pb2.LabelOptions) -> bytes:
        """Returns a serialized request for the boxes without a result."""
        return self.image.request(list(self.box_indices.values()), list(self.box_indices), options)

    def add_response(self, response: labeling_pb2.LabelImageResponse) -> float:
        """Checks the results; returns the seconds after which failed boxes may be retried, 0 if there are none."""
        self.first = self.first or time.monotonic()
        retry_after_s = 0.0
        for result in response.results:
            index = self.box_indices.get(result.instance_id)
            retry_s = retry_of(result.status) if result.status.code else None
            if index is not None and retry_s is not None:
                retry_after_s = max(retry_after_s, retry_s)
            elif index is None or not self.image.is_right(index, result):
                self.wrong += 1
            else:
                self.right += 1
                del self.box_indices[result.instance_id]
        return retry_after_s

    def sample(self, code: str, group: str, reason: str = "", has_retry: bool = False) -> Sample:
        """Returns the sample of the finished request."""
        now = time.monotonic()
        return Sample(
            self.due, self.first, now, self.boxes, self.right, self.wrong, code, reason, has_retry, self.tries, group
        )


def retry_of(status: status_pb2.Status) -> float | None:
    """Returns the delay in the RetryInfo of a status; None without one."""
    info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds()) / 1000
    return None


def reason_of(status: status_pb2.Status) -> str:
    """Returns the reason in the ErrorInfo of a status."""
    info = error_details_pb2.ErrorInfo()
    return next((str(info.reason) for detail in status.details if detail.Unpack(info)), "")


def trailers_of(error: grpc.aio.AioRpcError) -> list[tuple[str, Any]]:
    """Returns the trailing metadata; its type in grpc-stubs is not iterable."""
    trailers: Any = error.trailing_metadata()
    return list(trailers or ())


class LoadClients:
    """Clients of one plan."""

    def __init__(self, plan: Plan, images: Sequence[LoadImage], ready_file: Path) -> None:
        self._plan = plan
        self._ready_file = ready_file
        self._images = images
        self._rng = np.random.default_rng((plan.seed, plan.number))
        self._n_requests = 0
        self.samples: list[Sample] = []
        is_batch = plan.group == "batch" and not plan.streams
        self._options = types_pb2.LabelOptions(
            priority=types_pb2.PRIORITY_BATCH if is_batch else types_pb2.PRIORITY_UNSPECIFIED
        )
        self._metadata = (("authorization", f"Bearer {plan.token}"),) if plan.token else ()

    def _new_request(self, due: float) -> PendingRequest:
        image = self._images[int(self._rng.integers(len(self._images)))]
        chosen = self._rng.permutation(len(image.boxes))[: self._plan.boxes]
        base = (self._plan.number << 40) + self._n_requests * 1024
        self._n_requests += 1
        box_indices = {base + n: int(index) for n, index in enumerate(chosen)}
        return PendingRequest(f"load-{self._plan.number}-{self._n_requests}", image, box_indices, len(box_indices), due)

    def _is_over(self, until: float) -> bool:
        return time.monotonic() >= until or 0 < self._plan.calls <= self._n_requests

    def _channel(self, client: int) -> grpc.aio.Channel:
        addresses = self._plan.address.split(",")
        options = [
            # One connection per client, as for clients on different machines.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        return grpc.aio.insecure_channel(addresses[client % len(addresses)], options=options)

    async def run(self) -> tuple[float, float]:
        """Runs the plan; returns the start of the first call and the end of the last call."""
        plan = self._plan
        channels = [self._channel(client) for client in range(plan.clients * (len(plan.address.split(","))))]
        # Connecting is not part of the load.
        connecting = [asyncio.ensure_future(channel.channel_ready()) for channel in channels]
        _, late = await asyncio.wait(connecting, timeout=CONNECT_S)
        for task in late:  # no server: the calls will fail
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
        """Reports that this process is ready and waits for the common start."""
        if not self._plan.start_file:
            return
        self._ready_file.touch()
        while not Path(self._plan.start_file).exists():
            await asyncio.sleep(0.005)
        await asyncio.sleep(max(float(Path(self._plan.start_file).read_text()) - time.monotonic(), 0))

    async def _closed_loop(self, channels: Sequence[grpc.aio.Channel], client: int, until: float) -> None:
        while not self._is_over(until):
            sample = await self._call(channels, client, self._new_request(time.monotonic()))
            self.samples.append(sample)
            if self._plan.stops_at_failure and sample.code != "OK":
                return

    async def _open_loop(self, channels: Sequence[grpc.aio.Channel], began: float, until: float) -> None:
        due, running, number = began, set[asyncio.Task[Sample]](), 0
        while not self._is_over(until) and due < until:
            await asyncio.sleep(max(due - time.monotonic(), 0))
            task = asyncio.create_task(self._call(channels, number, self._new_request(due)))
            running.add(task)
            task.add_done_callback(lambda done: self.samples.append(done.result()))
            task.add_done_callback(running.discard)
            number += 1
            due += float(self._rng.exponential(1 / self._plan.rate))
        await asyncio.gather(*running)

    async def _call(self, channels: Sequence[grpc.aio.Channel], client: int, pending: PendingRequest) -> Sample:
        """Runs one request: with retries until there is a result, otherwise one call."""
        plan = self._plan
        backoff_s = 0.05
        while True:
            channel = channels[
                (client + pending.tries * (plan.retries and len(channels) > plan.clients)) % len(channels)
            ]
            pending.tries += 1
            stub: Any = channel.unary_stream(
                LABEL_IMAGE, None, response_deserializer=labeling_pb2.LabelImageResponse.FromString
            )
            call = stub(
                pending.request(self._options),
                timeout=plan.deadline_s or None,
                metadata=(*self._metadata, (ID_KEY, pending.name)),
            )
            retry_after_s, is_lost = 0.0, False
            try:
                async for response in call:
                    retry_after_s = max(retry_after_s, pending.add_response(response))
                code, status = "OK", status_pb2.Status()
                if dict(await call.trailing_metadata()).get(ID_KEY) != pending.name:
                    pending.wrong += 1
            except grpc.aio.AioRpcError as error:
                details: Any = dict(trailers_of(error))
                code, status = error.code().name, status_pb2.Status.FromString(details.get(DETAILS_KEY, b""))
                is_lost = is_disconnect(error)
            retry_s = retry_of(status)
            if code == "OK" and not (retry_after_s and plan.retries):
                return pending.sample(code, plan.group)
            if not plan.retries or not (code == "OK" or is_lost):
                return pending.sample(code, plan.group, reason_of(status), retry_s is not None)
            # A refusal has RetryInfo; a lost connection does not.
            wait_s = retry_after_s or retry_s or backoff_s
            if retry_s is None:
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
            await asyncio.sleep(wait_s * float(self._rng.uniform(1.0, 1.3)))

    async def _stream(self, channel: grpc.aio.Channel, until: float) -> None:
        """Runs a bulk stream that always has a next item; sends refused items again."""
        waiting: dict[str, PendingRequest] = {}
        retries: asyncio.Queue[PendingRequest] = asyncio.Queue()

        async def items() -> AsyncIterator[bytes]:
            while not self._is_over(until) or waiting:
                if self._is_over(until) or not retries.empty():
                    try:
                        pending = await asyncio.wait_for(retries.get(), 0.05)
                    except TimeoutError:
                        continue
                else:
                    pending = self._new_request(time.monotonic())
                waiting[pending.name] = pending
                pending.tries += 1
                request = labeling_pb2.LabelImageRequest.FromString(pending.request(self._options))
                yield labeling_pb2.LabelImagesRequest(item_id=pending.name, request=request).SerializeToString()

        stub: Any = channel.stream_stream(
            LABEL_IMAGES, None, response_deserializer=labeling_pb2.LabelImagesResponse.FromString
        )
        loop = asyncio.get_running_loop()
        async for response in stub(items(), metadata=self._metadata):
            pending = waiting[response.item_id]
            retry_s = retry_of(response.status)
            if response.status.code and retry_s is not None:
                loop.call_later(retry_s, retries.put_nowait, pending)
                continue
            del waiting[response.item_id]
            if response.status.code:
                code = grpc_code(response.status.code)
                self.samples.append(pending.sample(code, self._plan.group, reason_of(response.status)))
                continue
            pending.add_response(response.response)
            self.samples.append(pending.sample("OK", self._plan.group))


def grpc_code(number: int) -> str:
    """Returns the name of a status code."""
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)


def main(argv: Sequence[str]) -> int:
    plan_file, image_folder, report_file = (Path(text) for text in argv)
    plan = Plan(**json.loads(plan_file.read_text()))
    clients = LoadClients(plan, load_images(image_folder), report_file.with_suffix(".ready"))
    gc.freeze()
    before = resource.getrusage(resource.RUSAGE_SELF)
    began, ended = asyncio.run(clients.run())
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ClientReport(clients.samples, cpu_s, began, ended).save(report_file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
