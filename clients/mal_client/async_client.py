"""`AsyncClient`: masks from boxes, by asyncio calls over one channel to one or several servers.

`ImageCall` holds the rules of retries, which both clients share. Jobs on datasets read and write files, so only the
blocking client implements them; `AsyncClient` runs such a job in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, cast

import grpc
import grpc.aio
from mal.v1 import labeling_pb2_grpc, model_pb2, model_pb2_grpc

from mal_client.blocking_client import Client, client_of
from mal_client.errors import CallCancelled, ItemError
from mal_client.images.image_input import EncodedImage, encode
from mal_client.results.labels import SERVER_DEFAULTS, BoxLabel, LabelOptions
from mal_client.results.server_info import ServerInfo, ServerLimits
from mal_client.transport.channel import Connection
from mal_client.transport.client_base import DEFAULT_TIMEOUT_S, ClientBase, open_large_image
from mal_client.transport.image_call import Prompts

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from mal_client.results.labels import ImageInput
    from mal_train.core.masks.points import Point


Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def _in_thread(
    job: Callable[Concatenate[Client, Arguments], Result],
) -> Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Result]]:
    """Returns a method of `AsyncClient` that runs a job of `Client` in a thread, with a client of its own."""

    @functools.wraps(job)
    async def run(self: AsyncClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with client_of(self._connection, self.timeout_s) as client:
            running = asyncio.ensure_future(asyncio.to_thread(job, client, *args, **kwargs))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                # A thread cannot be cancelled. Closing its client ends its calls, and then the job.
                client.close()
                with contextlib.suppress(CallCancelled):
                    await running
                raise

    return run


class AsyncClient(ClientBase):
    """asyncio client of a server, for one event loop; an async context manager that closes the connection.

    >>> async with AsyncClient("localhost:50051") as client:  # doctest: +SKIP
    ...     labels = await client.label_image("street.jpg", [[10, 20, 50, 80]])

    Run concurrent calls with `asyncio.gather`; the server batches the boxes of all of them.

    The jobs `label_dataset`, `evaluate` and `evaluate_on_server` are those of `Client`, awaited. Each runs in a thread
    with a connection of its own, and calls `on_progress` and `on_notice` in that thread. Cancelling the awaiting task
    closes that connection and waits until the job has ended.

    Args:
        address: HOST:PORT, or a gRPC target such as `unix:/run/mal.sock`. Several servers share the calls: those behind
            a name with several IP addresses, best as `dns:///mal-server:50051`, or `10.0.0.1:50051,10.0.0.2:50051`.
        timeout_s: deadline of one image in seconds. In a job on a dataset: the seconds without a response after which
            the server counts as lost.
        tls: encrypt the connection, and trust the public certificate authorities that gRPC includes.
        tls_ca: PEM file of the certificate authority to trust instead; implies `tls`.
        client_cert: PEM file of the client's certificate and its chain, for mTLS; needs `tls` or `tls_ca`.
        client_key: PEM file of the private key of `client_cert`; None reads it from the file of `client_cert`.
        token: bearer token sent with every call; needs TLS, except with a server on this machine.
        authority: name or NAME:PORT for which the certificates of the servers must be valid, if it is not that of the
            address.

    Raises:
        ConfigError: the address has no port, or options contradict each other. A file that cannot be read raises it
            later: in `async with` or the first call.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: bool = False,
        tls_ca: Path | str | None = None,
        client_cert: Path | str | None = None,
        client_key: Path | str | None = None,
        token: str | None = None,
        authority: str | None = None,
    ) -> None:
        super().__init__(Connection(address, tls, tls_ca, client_cert, client_key, token, authority), timeout_s)
        # Created later: a channel belongs to the event loop that runs when it is created.
        self._channel: grpc.aio.Channel | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        self._open_channel()
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncClient {self.address}{' (closed)' if self.is_closed else ''}>"

    @property
    def is_closed(self) -> bool:
        """True after `close`; every call raises `CallCancelled` then."""
        return self._is_closed

    async def close(self) -> None:
        """Closes the connection and cancels running calls. May be called again."""
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close(None)

    async def server_info(self) -> ServerInfo:
        """Returns the version, models and limits of the server.

        Raises:
            ServerUnavailable, CallTimedOut, CallCancelled, ServerError: the server did not answer.
            InvalidRequest: the token is missing or unknown, or the server is not a mal-server.
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
        points: Sequence[Sequence[Point]] | None = None,
        timeout_s: float | None = None,
    ) -> list[BoxLabel]:
        """Labels the boxes of one image.

        Args:
            image: array (H, W, 3) RGB or (H, W) gray, Pillow image, path of an image file, or its bytes. Arrays
                and Pillow images are sent as PNG, files and bytes unchanged; EXIF orientation is not applied. A path
                of a TIFF that exceeds the server's limits is read by windows, and each box is a call of its own.
            boxes: (N, 4) x, y, width, height in px of the stored image; x, y is the upper left corner. N may be 0.
            options: label options; the default leaves every choice to the server.
            points: corrections, one sequence of `mal_client.types.Point` for each box: its mask contains the pixels of
                the positive ones and none of the negative ones, and no other mask changes. None: no corrections.
            timeout_s: deadline of this call in seconds; None uses the client's.

        Returns:
            N labels in the order of the boxes. A box that fails does not fail the call: its label has `error` set and
            no mask.

        Raises:
            BadImage: the image cannot be read, or exceeds the server's limit and cannot be read by windows; nothing was
                sent.
            InvalidRequest: `boxes` does not have the shape (N, 4), `points` are not N sequences, or the server refuses
                the image or the options, or is of a version that ignores points.
            ServerUnavailable, CallTimedOut, CallCancelled, ServerError: the call ended before all labels arrived.
        """
        stream = self.stream_image(image, boxes, options, points=points, timeout_s=timeout_s)
        return sorted([label async for label in stream], key=attrgetter("index"))

    async def stream_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        points: Sequence[Sequence[Point]] | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[BoxLabel]:
        """Labels the boxes of one image; yields each label when it arrives.

        >>> async with contextlib.aclosing(client.stream_image("street.jpg", boxes)) as labels:  # doctest: +SKIP
        ...     async for label in labels:
        ...         print(label.index, label.ok)

        Arguments and errors are those of `label_image`; the generator raises all errors.

        Yields:
            N labels in any order; `label.index` is the index of the box. Closing the generator cancels the call.
        """
        prompts = Prompts.of(boxes, points)
        limits = self._limits or (await self.server_info()).limits
        # In threads: reading, encoding and hashing take milliseconds to seconds, which would block the loop.
        large = await asyncio.to_thread(open_large_image, image, limits)
        if large is None:
            encoded = await asyncio.to_thread(encode, image)
            stream = self._stream(encoded, prompts, options, limits, timeout_s)
            async with contextlib.aclosing(stream) as labels:
                async for label in labels:
                    yield label
            return
        if options.resolve_overlaps:
            large.refuse_overlaps()
        parts = large.parts(prompts.boxes, (await self.server_info()).of_model(options.model).margin_rate)
        while (found := await asyncio.to_thread(next, parts, None)) is not None:
            index, box, part = found
            if isinstance(part, ItemError):
                yield BoxLabel(index, box, error=part)
                continue
            stream = self._stream(part, prompts.one(index), options, limits, timeout_s)
            async with contextlib.aclosing(stream) as labels:
                async for label in labels:
                    yield replace(label, index=index)

    async def _stream(
        self,
        encoded: EncodedImage,
        prompts: Prompts,
        options: LabelOptions,
        limits: ServerLimits,
        timeout_s: float | None,
    ) -> AsyncGenerator[BoxLabel]:
        """Labels the boxes of an encoded image."""
        call = await asyncio.to_thread(self._image_call, encoded, prompts, options, limits, timeout_s)
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
                # The task was cancelled, or the server ended the call, which grpc.aio reports in the same way.
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
