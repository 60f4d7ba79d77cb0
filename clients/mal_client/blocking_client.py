"""`Client`: masks from boxes, by blocking calls over one channel to one server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc
import grpc.aio
from mal.v1 import labeling_pb2_grpc, model_pb2, model_pb2_grpc

from mal_client.errors import CallCancelled
from mal_client.images.image_input import encode
from mal_client.transport.client_base import ClientBase
from mal_client.transport.image_call import checked_boxes
from mal_client.types import (
    DEFAULT_DATASET_OPTIONS,
    SERVER_DEFAULTS,
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

    from mal_client.types import ImageInput


class Client(ClientBase):
    """Blocking client of one server, for use in several threads. A context manager that closes the channel.

    The channel connects with the first call and reconnects by itself. Keep one client for many calls: it reuses the
    connection, and sends the SHA-256 of an image in place of its bytes where the server has it already.

    >>> with Client("localhost:50051") as client:  # doctest: +SKIP
    ...     for label in client.label_image("street.jpg", [[10, 20, 50, 80], [70, 20, 40, 40]]):
    ...         print(label.index, label.score, label.mask.sum())
    0 0.91 2214
    1 0.87 1039

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
        ConfigError: the address has no port, a file cannot be read, or the token would be sent unencrypted.
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

    def __repr__(self) -> str:
        return f"<Client {self.address}{' (closed)' if self.is_closed else ''}>"

    @property
    def is_closed(self) -> bool:
        """True after `close`; every call raises `CallCancelled` then."""
        return self._closed.is_set()

    def close(self) -> None:
        """Closes the channel; calls that run in other threads end with `CallCancelled`. May be called again."""
        self._closed.set()
        self._channel.close()

    def server_info(self) -> ServerInfo:
        """Returns version, models and limits of the server.

        >>> client.server_info().model  # doctest: +SKIP
        ModelRef(name='default', checkpoint_sha256='3b1f…', branch=<Branch.TEACHER: 'teacher'>)

        Raises:
            ServerUnavailable, CallTimedOut, CallCancelled, ServerError: no answer.
            InvalidRequest: the token is missing or unknown, or the address is not that of a mal-server.
        """
        stub = model_pb2_grpc.ModelServiceStub(self.open_channel())
        failures = 0
        while True:
            try:
                response = stub.GetServerInfo(model_pb2.GetServerInfoRequest(), timeout=self._info_timeout_s)
                return self._keep_info(response)
            except grpc.RpcError as error:
                failures += 1
                self._check_info_retry(error, failures)

    def label_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        timeout_s: float | None = None,
    ) -> list[BoxLabel]:
        """Labels the boxes of one image.

        >>> labels = client.label_image("street.jpg", [[10, 20, 50, 80]])  # doctest: +SKIP
        >>> labels[0].mask.shape, labels[0].mask.dtype  # doctest: +SKIP
        ((480, 640), dtype('bool'))

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
        return sorted(self.stream_image(image, boxes, options, timeout_s=timeout_s), key=attrgetter("index"))

    def stream_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        timeout_s: float | None = None,
    ) -> Iterator[BoxLabel]:
        """Labels the boxes of one image; yields each label as its batch finishes.

        >>> for label in client.stream_image("street.jpg", boxes):  # doctest: +SKIP
        ...     print(label.index, label.ok)

        Args and errors are those of `label_image`; errors are raised by the iterator.

        Yields:
            N labels in any order; `label.index` is the index of the box. Close the iterator to cancel the call.
        """
        call = self._image_call(encode(image), checked_boxes(boxes), options, self._known_limits(), timeout_s)
        while not call.done:
            stub = labeling_pb2_grpc.LabelingServiceStub(self.open_channel())
            stream = stub.LabelImage(call.request(), timeout=call.time_left())
            try:
                for response in stream:
                    yield from call.on_response(response)
                pause_s = call.on_end()
            except grpc.RpcError as error:
                pause_s = call.on_error(error)
            finally:
                stream.cancel()  # type: ignore[no-untyped-call]
            self.pause(pause_s)

    def label_dataset(
        self,
        coco_json: Path | str,
        images_dir: Path | str,
        output_json: Path | str,
        options: LabelOptions = SERVER_DEFAULTS,
        dataset_options: DatasetOptions = DEFAULT_DATASET_OPTIONS,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> DatasetResult:
        """Labels the annotations of a COCO file and writes the file with masks.

        >>> result = client.label_dataset("boxes.json", "images", "masks.json")  # doctest: +SKIP
        >>> result.labeled, result.failed_count  # doctest: +SKIP
        (8003, 0)

        Memory holds neither pixels nor masks. The output appears when the job is finished. Until then a journal beside
        it, `masks.json.ledger`, keeps the results: a killed run resumes when the same job is started again, and ends
        with the same bytes. A failed annotation keeps its fields, gets an `error`, and is listed in the result and in
        `masks.errors.jsonl`. When the server is lost after some results arrived, those are written, the rest is listed
        as failed, and the journal stays for the next run.

        `mal_client.dataset.run.label_dataset` does the same with several servers.

        Args:
            coco_json: the annotations; `bbox` is x, y, width, height in px.
            images_dir: the folder that `file_name` is relative to, or a glob pattern such as `photos/**/*.jpg`.
            output_json: the COCO file with masks.
            options: label options; by default those of the server.
            dataset_options: which annotations are labeled, and how they are written. By default all are labeled, and
                existing masks are replaced.
            on_progress: called after each result, in the calling thread.
            on_notice: receives messages for the user in the calling thread, for example that the run resumes.

        Raises:
            BadDataset: the file as a whole is unusable, for example because an id is used twice; nothing was sent.
            OutputError: the output cannot be written, or another run is writing it; an older output is intact.
            ConfigError: the unfinished run was another job: other input, checkpoint or options.
            InvalidRequest: the server refuses the options.
            ServerUnavailable, CallTimedOut, ServerError: the server was lost before any result arrived.
            ModelChanged: the server switched to other weights; start again with `restart=True`.
            CallCancelled: the client was closed.
        """
        # Imported here: a dataset job loads OpenCV and pycocotools, which callers with single images need not wait for.
        from mal_client.dataset.run import label_dataset  # noqa: PLC0415

        return label_dataset(
            [self],
            Path(coco_json),
            Path(images_dir),
            Path(output_json),
            options,
            dataset_options=dataset_options,
            on_progress=on_progress,
            on_notice=on_notice,
        )

    def evaluate(
        self,
        coco_json: Path | str,
        images_dir: Path | str,
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        worst_count: int = 100,
        on_progress: Callable[[Progress], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
        resume: Path | None = None,
    ) -> Evaluation:
        """Evaluates the served model on a COCO file with masks; the server labels the boxes and compares.

        >>> evaluation = client.evaluate("val.json", "images")  # doctest: +SKIP
        >>> evaluation.overall.miou  # doctest: +SKIP
        0.813

        Args:
            coco_json: annotations with ground-truth masks.
            images_dir: the folder that `file_name` is relative to.
            options: label options; by default those of the server.
            worst_count: number of instances with the lowest IoU in the result, from 0 to 10 000.
            on_progress: called as images finish, in the calling thread.
            on_notice: receives messages for the user in the calling thread, for example that the run resumes.
            resume: file that keeps the measurements of an unfinished run for the next one, which deletes it at the end;
                None keeps them in memory.

        Raises:
            BadDataset: the file as a whole is unusable; nothing was sent.
            ConfigError: `resume` belongs to another evaluation.
            OutputError: `resume` cannot be written, or another run holds it.
            InvalidRequest: the server refuses the options.
            ServerUnavailable, CallTimedOut, CallCancelled, ServerError: the server was lost.
        """
        # Imported here for the same reason as in label_dataset.
        from mal_client.evaluation.run import evaluate  # noqa: PLC0415

        return evaluate(
            self,
            Path(coco_json),
            Path(images_dir),
            options,
            worst_count=worst_count,
            on_progress=on_progress,
            on_notice=on_notice,
            resume=resume,
        )

    def evaluate_on_server(
        self,
        annotations: str,
        images: str,
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        worst_count: int = 100,
        on_progress: Callable[[Progress], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
        resume: Path | None = None,
    ) -> Evaluation:
        """Evaluates as `evaluate` does, on a COCO file and images in the server's `data_folders`; sends no image.

        Args:
            annotations: FOLDER/PATH of the COCO file on the server.
            images: FOLDER or FOLDER/PATH that its file names are relative to.
            options: label options; by default those of the server.
            worst_count: as in `evaluate`; the instances have the file name for an image id, and no box.
            on_progress: called as images finish, in the calling thread.
            on_notice: receives messages for the user in the calling thread.
            resume: as in `evaluate`.

        Raises:
            ConfigError, OutputError: as in `evaluate`.
            InvalidRequest: a folder or file does not exist, or the server refuses the options.
            ServerUnavailable, CallTimedOut, CallCancelled, ServerError: the server was lost.
        """
        # Imported here for the same reason as in label_dataset.
        from mal_client.evaluation.run import evaluate_on_server  # noqa: PLC0415

        return evaluate_on_server(
            self,
            annotations,
            images,
            options,
            worst_count=worst_count,
            on_progress=on_progress,
            on_notice=on_notice,
            resume=resume,
        )

    def open_channel(self) -> grpc.Channel:
        """Returns the channel, for jobs that run their own streams. Raises CallCancelled when the client is closed."""
        if self.is_closed:
            raise self._closed_error()
        return self._channel

    def pause(self, pause_s: float) -> None:
        """Waits before a retry. Raises CallCancelled when the client is closed meanwhile."""
        # Not time.sleep: close() in another thread ends the wait.
        if self._closed.wait(pause_s):
            raise CallCancelled(f"{self.address}: the client was closed while its call waited for a retry")

    def _known_limits(self) -> ServerLimits:
        return self._limits or self.server_info().limits
