"""`AsyncClient`: masks from boxes, by asyncio calls over one channel to one server.

It shares `ImageCall`, the rules of retries, with the blocking client. Jobs on datasets block on files, so only the
blocking client implements them; `AsyncClient` runs one in a thread.
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
from mal_client.types import SERVER_DEFAULTS, BoxLabel, LabelOptions, ServerInfo

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from mal_client.types import ImageInput


Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def _in_thread(
    method: Callable[Concatenate[Client, Arguments], Result],
) -> Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Result]]:
    """Makes a coroutine of a job of the blocking client, which runs in a thread, on a client of its own.

    The callbacks of the job are called in that thread.
    """

    @functools.wraps(method)
    async def run(self: AsyncClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with Client(**dataclasses.asdict(self._connection), timeout_s=self.timeout_s) as client:
            running = asyncio.ensure_future(asyncio.to_thread(method, client, *args, **kwargs))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                # A thread cannot be cancelled: closing its client ends its calls, and the job ends soon after.
                client.close()
                with contextlib.suppress(CallCancelled):
                    await running
                raise

    return run


class AsyncClient(ClientBase):
    """asyncio client of one server, for one event loop. An asynchronous context manager that closes the channel.

    >>> async with AsyncClient("localhost:50051") as client:  # doctest: +SKIP
    ...     labels = await client.label_image("street.jpg", [[10, 20, 50, 80]])

    Run calls side by side with `asyncio.gather`; the server batches the boxes of all of them.

    Args:
        address: HOST:PORT, or a gRPC target such as `unix:/run/mal.sock`.
        timeout_s: deadline of one image in seconds, 300 by default. For a job on a dataset: seconds without a response
            after which the server counts as lost.
        tls: encrypt the connection and trust the public authorities that gRPC knows.
        tls_ca: PEM file of the authority to trust instead; implies `tls`.
        client_cert: PEM file of the client's certificate and its chain (mTLS).
        client_key: PEM file of the private key; None reads it from `client_cert`.
        token: bearer token of every call. Without TLS it is sent to a server on this machine only.

    Raises:
        ConfigError: the address has no port, or the token would be sent unencrypted. A file that cannot be read raises
            it when the channel opens, with the first call or `async with`.
    """

    def _start(self) -> None:
        # No channel yet: it belongs to the loop in which it is created.
        self._channel: grpc.aio.Channel | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        self._open_channel()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncClient {self.address}{' (closed)' if self.is_closed else ''}>"

    @property
    def is_closed(self) -> bool:
        """True after `close`; every call raises `CallCancelled` then."""
        return self._is_closed

    async def close(self) -> None:
        """Closes the channel and cancels running calls. May be called again."""
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close(None)

    async def server_info(self) -> ServerInfo:
        """Returns version, models and limits of the server.

        Raises:
            ServerUnavailable, CallTimedOut, CallCancelled, ServerError: no answer.
            InvalidRequest: the token is missing or unknown, or the address is not that of a mal-server.
        """
        stub = cast("model_pb2_grpc.ModelServiceAsyncStub", model_pb2_grpc.ModelServiceStub(self._open_channel()))
        request = model_pb2.GetServerInfoRequest()
        failures = 0
        while True:
            try:
                return self._keep_info(await stub.GetServerInfo(request, timeout=self._info_timeout_s))
            except grpc.RpcError as error:
                failures += 1
                self._check_info_retry(error, failures)

    async def label_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        timeout_s: float | None = None,
    ) -> list[BoxLabel]:
        """Labels the boxes of one image.

        Args:
            image: uint8 array (H, W, 3) RGB or (H, W) gray, Pillow image, path of an image file, or its bytes. Arrays
                and Pillow images are sent as PNG, files and bytes unchanged; EXIF orientation is not applied.
            boxes: (N, 4) x, y, width, height in px of the stored image; x, y is the upper left corner. N may be 0.
            options: label options; by default those of the server.
            timeout_s: deadline of this call in seconds, instead of the client's.

        Returns:
            N labels in the order of the boxes. A box that fails has `error` set and no mask; it does not fail others.

        Raises:
            BadImage: the image cannot be read, or exceeds the server's limit; nothing was sent.
            InvalidRequest: `boxes` has another shape, or the server refuses image or options.
            ServerUnavailable, CallTimedOut, CallCancelled, ServerError: no complete result.
        """
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
        """Labels the boxes of one image; yields each label as its batch finishes.

        >>> async with contextlib.aclosing(client.stream_image("street.jpg", boxes)) as labels:  # doctest: +SKIP
        ...     async for label in labels:
        ...         print(label.index, label.ok)

        Args and errors are those of `label_image`; errors are raised by the iterator.

        Yields:
            N labels in any order; `label.index` is the index of the box. Close the generator to cancel the call.
        """
        checked = checked_boxes(boxes)
        limits = self._limits or (await self.server_info()).limits
        # Reading, encoding and hashing take milliseconds to seconds, which would block the loop.
        encoded = await asyncio.to_thread(encode, image)
        call = await asyncio.to_thread(self._image_call, encoded, checked, options, limits, timeout_s)
        while not call.done:
            stub = cast(
                "labeling_pb2_grpc.LabelingServiceAsyncStub",
                labeling_pb2_grpc.LabelingServiceStub(self._open_channel()),
            )
            stream = stub.LabelImage(call.request(), timeout=call.time_left())
            try:
                async for response in stream:
                    for label in call.on_response(response):
                        yield label
                pause_s = call.on_end()
            except grpc.RpcError as error:
                pause_s = call.on_error(error)
            except asyncio.CancelledError:
                # Either our task was cancelled, or gRPC reports in this way that the server ended the call.
                task = asyncio.current_task()
                if self._is_closed or task is None or task.cancelling():
                    raise
                pause_s = call.on_error(_ended_by_server())
            finally:
                stream.cancel()
            await asyncio.sleep(pause_s)

    label_dataset = _in_thread(Client.label_dataset)
    evaluate = _in_thread(Client.evaluate)
    evaluate_on_server = _in_thread(Client.evaluate_on_server)

    def _open_channel(self) -> grpc.aio.Channel:
        if self._is_closed:
            raise self._closed_error()
        if self._channel is None:
            self._channel = self._connection.open_aio()
        return self._channel


def _ended_by_server() -> grpc.RpcError:
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, metadata, metadata, "the server ended the call", "")
