"""`Client` and `AsyncClient`: boxes in, masks out, over one channel to one server.

Both drive the same `ImageCall`; what stands here twice is only `for` against `async for`. Jobs on whole data sets block
on files, so they exist once, on the blocking client, and the asyncio client runs them in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, cast

import grpc
import grpc.aio
from mal.v1 import labeling_pb2_grpc, model_pb2, model_pb2_grpc

from mal_client import codec
from mal_client.channel import Connection
from mal_client.errors import CallCancelled, from_rpc_error, is_cut_short
from mal_client.handles import Handles
from mal_client.image_call import ImageCall, checked_boxes
from mal_client.sources import encode
from mal_client.types import (
    AS_SERVED,
    WHOLE_FILE,
    BoxLabel,
    DatasetOptions,
    DatasetResult,
    Evaluation,
    LabelOptions,
    Progress,
    ServerInfo,
    ServerLimits,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from mal_client.sources import EncodedImage
    from mal_client.types import BoxXywh, ImageInput

DEFAULT_TIMEOUT_S = 300.0
"""Deadline of one image: 300 boxes take minutes on a CPU. An address where nobody listens fails within seconds."""

INFO_TIMEOUT_S = 30.0
"""Deadline for the server's description of itself, which needs no device."""

MAX_INFO_CUTS = 3
"""How often it is asked for again after a stream that was cut short, which gRPC does not do itself."""

Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")


class _Endpoint:
    """What both clients know of their server: where it is, its limits, and which pictures it has seen."""

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
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._connection = Connection(address, tls, tls_ca, client_cert, client_key, token)
        self._limits: ServerLimits | None = None
        self._handles = Handles()
        self._start()

    def _start(self) -> None:
        """Makes what the kind of client needs besides."""

    def _image_call(
        self,
        encoded: EncodedImage,
        boxes: Sequence[BoxXywh],
        options: LabelOptions,
        limits: ServerLimits,
        timeout_s: float | None,
    ) -> ImageCall:
        return ImageCall(
            self.address,
            image=encoded,
            boxes=boxes,
            options=options,
            limits=limits,
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
            handle=self._handles.of(encoded),
        )


class Client(_Endpoint):
    """Blocking client of one server; usable from several threads and as a context manager.

    >>> with Client("localhost:50051") as client:  # doctest: +SKIP
    ...     for label in client.label_image("street.jpg", [[10, 20, 50, 80]]):
    ...         print(label.score, label.mask.sum())

    Args:
        address: HOST:PORT, or a gRPC target such as `unix:/run/mal.sock`.
        timeout_s: deadline in seconds of one image's call; for a dataset job, how long the server may stay silent.
        tls: encrypt, and trust the public authorities that gRPC knows.
        tls_ca: PEM file of the authority to trust instead; means `tls`.
        client_cert: PEM file of the certificate to show (mTLS).
        client_key: PEM file of its private key; None: it stands in `client_cert`.
        token: shown with every call; without TLS only to a server on this machine.

    Raises:
        ConfigError: an address without a port, files that cannot be read, a token that would travel in clear.
    """

    def _start(self) -> None:
        self._channel = self._connection.open()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the channel; calls under way in other threads end with `CallCancelled`."""
        self._closed.set()
        self._channel.close()

    def server_info(self) -> ServerInfo:
        """What the server serves and accepts."""
        timeout_s = min(self.timeout_s, INFO_TIMEOUT_S)
        stub = model_pb2_grpc.ModelServiceStub(self.open_channel())
        cuts = 0
        while True:
            try:
                answer = stub.GetServerInfo(model_pb2.GetServerInfoRequest(), timeout=timeout_s)
            except grpc.RpcError as error:
                cuts += 1
                if not is_cut_short(error) or cuts > MAX_INFO_CUTS:
                    raise from_rpc_error(self.address, error, timeout_s) from error
                continue
            info = codec.server_info(answer)
            self._limits = info.limits
            return info

    def label_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = AS_SERVED,
        *,
        timeout_s: float | None = None,
    ) -> list[BoxLabel]:
        """One answer for each box, in the order of the boxes.

        Args:
            image: uint8 array (H, W, 3) RGB or (H, W) grey, Pillow picture, path, or the bytes of an encoded file.
            boxes: (N, 4) x, y, width, height in px of the stored image.
            options: how boxes become masks.
            timeout_s: deadline of this call instead of the client's.

        Raises:
            BadImage, RequestRefused: the input is at fault as a whole. A bad box only fails its own answer.
            ServerUnavailable, CallTimedOut, ServerFailed, CallCancelled: no complete answer.
        """
        return sorted(self.stream_image(image, boxes, options, timeout_s=timeout_s), key=_index)

    def stream_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = AS_SERVED,
        *,
        timeout_s: float | None = None,
    ) -> Iterator[BoxLabel]:
        """As `label_image`, but answers come as their batches finish, in any order; `index` says which box."""
        call = self._image_call(encode(image), checked_boxes(boxes), options, self._known_limits(), timeout_s)
        while not call.done:
            stub = labeling_pb2_grpc.LabelingServiceStub(self.open_channel())
            stream = stub.LabelImage(call.request(), timeout=call.time_left())
            try:
                for response in stream:
                    yield from call.absorb(response)
                pause_s = call.ended()
            except grpc.RpcError as error:
                pause_s = call.broke(error)
            finally:
                stream.cancel()  # type: ignore[no-untyped-call]
            self.pause(pause_s)

    def label_dataset(
        self,
        coco_json: Path | str,
        images_dir: Path | str,
        output_json: Path | str,
        options: LabelOptions = AS_SERVED,
        how: DatasetOptions = WHOLE_FILE,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> DatasetResult:
        """Labels the annotations of a COCO file and writes the file with masks; memory holds neither pixels nor masks.

        The output appears when the job has run to its end. Until then a ledger beside it (`out.json.ledger`) keeps
        the answers: a run that was killed goes on there when the same job is started again, and ends with the same
        bytes. What failed keeps its fields, gets an `error`, and is listed in the result and in an errors file beside
        the output. When the server is lost for good after some answers came, those are written and the rest is listed
        as failed; the ledger then stays for the next run. `mal_client.dataset.label_dataset` takes several servers.

        Args:
            coco_json: the annotations.
            images_dir: the folder that `file_name` is relative to.
            output_json: where the COCO file with masks goes.
            options: how boxes become masks.
            how: which annotations are labelled and how they are written; by default every mask is made anew.
            on_progress: called after each answered image, from the calling thread.
            on_notice: told in a sentence what the user should know, for example that an unfinished run goes on.

        Raises:
            BadDataset: the file is unusable as a whole, for example by duplicate ids; nothing was sent.
            OutputError: the output cannot be written, or another run is writing it; an older output is intact.
            ConfigError: an unfinished run was another job: other input, checkpoint or options.
            ServerUnavailable, ServerFailed, RequestRefused, CallCancelled: the server was lost for good.
        """
        # Imported here: a dataset job brings OpenCV and pycocotools, which labelling single images need not wait for.
        from mal_client.dataset import label_dataset  # noqa: PLC0415

        return label_dataset(
            [self],
            Path(coco_json),
            Path(images_dir),
            Path(output_json),
            options,
            how=how,
            on_progress=on_progress,
            on_notice=on_notice,
        )

    def evaluate(
        self,
        coco_json: Path | str,
        images_dir: Path | str,
        options: LabelOptions = AS_SERVED,
        *,
        worst_count: int = 100,
        on_progress: Callable[[Progress], None] | None = None,
        resume: Path | None = None,
    ) -> Evaluation:
        """Measures the served model against the masks of a COCO file; the server does the comparing.

        Args:
            coco_json: annotations with true masks.
            images_dir: the folder that `file_name` is relative to.
            options: how boxes become masks.
            worst_count: how many of the instances with the lowest IoU to list in the report; at most 10 000.
            on_progress: called as images are done, from the calling thread.
            resume: a file that keeps what was measured, so that a run that was killed goes on; removed at the end.

        Raises:
            BadDataset: the file is unusable as a whole; nothing was sent.
            ServerUnavailable, ServerFailed, RequestRefused, CallCancelled: the server was lost for good.
        """
        # Imported here for the same reason as in label_dataset.
        from mal_client.evaluate import evaluate  # noqa: PLC0415

        return evaluate(
            self,
            Path(coco_json),
            Path(images_dir),
            options,
            worst_count=worst_count,
            on_progress=on_progress,
            resume=resume,
        )

    def evaluate_on_server(
        self,
        annotations: str,
        images: str,
        options: LabelOptions = AS_SERVED,
        *,
        worst_count: int = 100,
        on_progress: Callable[[Progress], None] | None = None,
        resume: Path | None = None,
    ) -> Evaluation:
        """As `evaluate`, for a COCO file and images in the server's `data_folders`: nothing large travels.

        Args:
            annotations: FOLDER/PATH of the COCO file on the server.
            images: FOLDER/PATH or FOLDER that its file names are relative to.
            options: how boxes become masks.
            worst_count: as in `evaluate`; the instances carry the file name in the place of an image id, and no box.
            on_progress: called as images are done, from the calling thread.
            resume: as in `evaluate`.
        """
        # Imported here for the same reason as in label_dataset.
        from mal_client.evaluate import evaluate_on_server  # noqa: PLC0415

        return evaluate_on_server(
            self, annotations, images, options, worst_count=worst_count, on_progress=on_progress, resume=resume
        )

    def open_channel(self) -> grpc.Channel:
        """The channel, for jobs that drive their own streams. Raises CallCancelled when the client is closed."""
        if self._closed.is_set():
            raise CallCancelled(f"{self.address}: this client is closed; open a new one")
        return self._channel

    def _known_limits(self) -> ServerLimits:
        return self._limits or self.server_info().limits

    def pause(self, pause_s: float) -> None:
        """Waits before something is sent again. Raises CallCancelled when the client is closed meanwhile."""
        # Not time.sleep: close() from another thread ends the wait.
        if self._closed.wait(pause_s):
            raise CallCancelled(f"{self.address}: the client was closed while its call waited to be sent again")


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


class AsyncClient(_Endpoint):
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
        timeout_s = min(self.timeout_s, INFO_TIMEOUT_S)
        stub = cast("model_pb2_grpc.ModelServiceAsyncStub", model_pb2_grpc.ModelServiceStub(self._open_channel()))
        cuts = 0
        while True:
            try:
                answer = await stub.GetServerInfo(model_pb2.GetServerInfoRequest(), timeout=timeout_s)
            except grpc.RpcError as error:
                cuts += 1
                if not is_cut_short(error) or cuts > MAX_INFO_CUTS:
                    raise from_rpc_error(self.address, error, timeout_s) from error
                continue
            info = codec.server_info(answer)
            self._limits = info.limits
            return info

    async def label_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = AS_SERVED,
        *,
        timeout_s: float | None = None,
    ) -> list[BoxLabel]:
        """As `Client.label_image`."""
        return sorted(
            [label async for label in self.stream_image(image, boxes, options, timeout_s=timeout_s)], key=_index
        )

    async def stream_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = AS_SERVED,
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
            raise CallCancelled(f"{self.address}: this client is closed; open a new one")
        if self._channel is None:
            self._channel = self._connection.open_aio()
        return self._channel


def _ended_by_server() -> grpc.RpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, nothing, nothing, "the server ended the call", "")


def _index(label: BoxLabel) -> int:
    return label.index
