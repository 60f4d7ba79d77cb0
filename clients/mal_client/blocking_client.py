"""`Client`: boxes in, masks out, over one channel to one server, for callers who wait."""

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
        stub = model_pb2_grpc.ModelServiceStub(self.open_channel())
        breaks = 0
        while True:
            try:
                return self._told(stub.GetServerInfo(model_pb2.GetServerInfoRequest(), timeout=self._info_timeout_s))
            except grpc.RpcError as error:
                breaks += 1
                self._info_broke(error, breaks)

    def label_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        timeout_s: float | None = None,
    ) -> list[BoxLabel]:
        """One answer for each box, in the order of the boxes.

        Args:
            image: uint8 array (H, W, 3) RGB or (H, W) gray, Pillow picture, path, or the bytes of an encoded file.
            boxes: (N, 4) x, y, width, height in px of the stored image.
            options: how boxes become masks.
            timeout_s: deadline of this call instead of the client's.

        Raises:
            BadImage, RequestRefused: the input is at fault as a whole. A bad box only fails its own answer.
            ServerUnavailable, CallTimedOut, ServerFailed, CallCancelled: no complete answer.
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
        options: LabelOptions = SERVER_DEFAULTS,
        how: DatasetOptions = DEFAULT_DATASET_OPTIONS,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> DatasetResult:
        """Labels the annotations of a COCO file and writes the file with masks; memory holds neither pixels nor masks.

        The output appears when the job has run to its end. Until then a ledger beside it (`out.json.ledger`) keeps
        the answers: a run that was killed goes on there when the same job is started again, and ends with the same
        bytes. What failed keeps its fields, gets an `error`, and is listed in the result and in an errors file beside
        the output. When the server is lost for good after some answers came, those are written and the rest is listed
        as failed; the ledger then stays for the next run. `mal_client.dataset.run.label_dataset` takes several servers.

        Args:
            coco_json: the annotations.
            images_dir: the folder that `file_name` is relative to.
            output_json: where the COCO file with masks goes.
            options: how boxes become masks.
            how: which annotations are labeled and how they are written; by default every mask is made anew.
            on_progress: called after each answered image, from the calling thread.
            on_notice: told in a sentence what the user should know, for example that an unfinished run goes on.

        Raises:
            BadDataset: the file is unusable as a whole, for example by duplicate ids; nothing was sent.
            OutputError: the output cannot be written, or another run is writing it; an older output is intact.
            ConfigError: an unfinished run was another job: other input, checkpoint or options.
            ServerUnavailable, ServerFailed, RequestRefused, CallCancelled: the server was lost for good.
        """
        # Imported here: a dataset job brings OpenCV and pycocotools, which labeling single images need not wait for.
        from mal_client.dataset.run import label_dataset  # noqa: PLC0415

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
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        worst_count: int = 100,
        on_progress: Callable[[Progress], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
        resume: Path | None = None,
    ) -> Evaluation:
        """Measures the served model against the masks of a COCO file; the server does the comparing.

        Args:
            coco_json: annotations with true masks.
            images_dir: the folder that `file_name` is relative to.
            options: how boxes become masks.
            worst_count: how many of the instances with the lowest IoU to list in the report; at most 10 000.
            on_progress: called as images are done, from the calling thread.
            on_notice: told, likewise, that an unfinished run goes on, or that the server takes nothing of it back.
            resume: a file that keeps what was measured, so that a run that was killed goes on; removed at the end.

        Raises:
            BadDataset: the file is unusable as a whole; nothing was sent.
            ServerUnavailable, ServerFailed, RequestRefused, CallCancelled: the server was lost for good.
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
        """As `evaluate`, for a COCO file and images in the server's `data_folders`: nothing large travels.

        Args:
            annotations: FOLDER/PATH of the COCO file on the server.
            images: FOLDER/PATH or FOLDER that its file names are relative to.
            options: how boxes become masks.
            worst_count: as in `evaluate`; the instances carry the file name in the place of an image id, and no box.
            on_progress: called as images are done, from the calling thread.
            on_notice: told, likewise, that an unfinished run goes on, or that the server takes nothing of it back.
            resume: as in `evaluate`.
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
        """The channel, for jobs that drive their own streams. Raises CallCancelled when the client is closed."""
        if self._closed.is_set():
            raise self._closed_error()
        return self._channel

    def _known_limits(self) -> ServerLimits:
        return self._limits or self.server_info().limits

    def pause(self, pause_s: float) -> None:
        """Waits before something is sent again. Raises CallCancelled when the client is closed meanwhile."""
        # Not time.sleep: close() from another thread ends the wait.
        if self._closed.wait(pause_s):
            raise CallCancelled(f"{self.address}: the client was closed while its call waited to be sent again")
