"""`AsyncClient`: boxes in, masks out, over one channel to one server, inside an event loop.

It drives the same `ImageCall` as the blocking client; what stands twice is only `for` against `async for`. Jobs on
whole data sets block on files, so they exist once, on the blocking client, which runs in a thread here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, cast

import grpc
import grpc.aio
from mal.v1 import labeling_pb2_grpc, model_pb2, model_pb2_grpc

from mal_client.blocking_client import Client
from mal_client.errors import CallCancelled
from mal_client.images.image_input import encode
from mal_client.transport.client_base import ClientBase
from mal_client.transport.image_call import checked_boxes
from mal_client.types import (
    SERVER_DEFAULTS,
    BoxLabel,
    LabelOptions,
    ServerInfo,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from mal_client.types import ImageInput


Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")


def _in_thread(
    job: Callable[Concatenate[Client, Arguments], Answer],
) -> Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Answer]]:
    """A blocking client's job for the asyncio client: in a thread of its own, with a client of its own.

    What the job calls is called from that thread.
    """

    @functools.wraps(job)
    async def run(self: AsyncClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        with Client(**dataclasses.asdict(self._connection), timeout_s=self.timeout_s) as client:
            running = asyncio.ensure_future(asyncio.to_thread(job, client, *args, **kwargs))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                # A thread cannot be cancelled: closing its client ends its calls, and we wait for it to notice.
                client.close()
                with contextlib.suppress(CallCancelled):
                    await running
                raise

    return run


class AsyncClient(ClientBase):
    """asyncio client of one server; use it inside one event loop, as an async context manager.

    >>> async with AsyncClient("localhost:50051") as client:  # doctest: +SKIP
    ...     labels = await client.label_image("street.jpg", [[10, 20, 50, 80]])

    Arguments and errors as `Client`.
    """

    def _start(self) -> None:
        # No channel yet: it belongs to the loop that it is made in.
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._open_channel()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the channel and the calls under way."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close(None)

    async def server_info(self) -> ServerInfo:
        """As `Client.server_info`."""
        stub = cast("model_pb2_grpc.ModelServiceAsyncStub", model_pb2_grpc.ModelServiceStub(self._open_channel()))
        request = model_pb2.GetServerInfoRequest()
        breaks = 0
        while True:
            try:
                return self._told(await stub.GetServerInfo(request, timeout=self._info_timeout_s))
            except grpc.RpcError as error:
                breaks += 1
                self._info_broke(error, breaks)

    async def label_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        timeout_s: float | None = None,
    ) -> list[BoxLabel]:
        """As `Client.label_image`."""
        return sorted(
            [label async for label in self.stream_image(image, boxes, options, timeout_s=timeout_s)],
            key=attrgetter("index"),
        )

    async def stream_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[BoxLabel]:
        """As `Client.stream_image`; close it (`contextlib.aclosing`) to end the call early."""
        asked = checked_boxes(boxes)
        limits = self._limits or (await self.server_info()).limits
        # Encoding, reading and hashing take milliseconds to seconds; the loop has other things to do.
        encoded = await asyncio.to_thread(encode, image)
        call = await asyncio.to_thread(self._image_call, encoded, asked, options, limits, timeout_s)
        while not call.done:
            stub = cast(
                "labeling_pb2_grpc.LabelingServiceAsyncStub",
                labeling_pb2_grpc.LabelingServiceStub(self._open_channel()),
            )
            stream = stub.LabelImage(call.request(), timeout=call.time_left())
            try:
                async for response in stream:
                    for label in call.absorb(response):
                        yield label
                pause_s = call.ended()
            except grpc.RpcError as error:
                pause_s = call.broke(error)
            except asyncio.CancelledError:
                # Of ours, or gRPC's asyncio tells so that the server ended the call.
                task = asyncio.current_task()
                if self._closed or task is None or task.cancelling():
                    raise
                pause_s = call.broke(_ended_by_server())
            finally:
                stream.cancel()
            await asyncio.sleep(pause_s)

    label_dataset = _in_thread(Client.label_dataset)
    evaluate = _in_thread(Client.evaluate)

    def _open_channel(self) -> grpc.aio.Channel:
        if self._closed:
            raise self._closed_error()
        if self._channel is None:
            self._channel = self._connection.open_aio()
        return self._channel


def _ended_by_server() -> grpc.RpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, nothing, nothing, "the server ended the call", "")
