"""`Client`: masks from boxes, by blocking calls over one channel to one or several servers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from weakref import WeakValueDictionary

import grpc
from mal.v1 import labeling_pb2_grpc, model_pb2, model_pb2_grpc

from mal_client.errors import CallCancelled, ItemError
from mal_client.images.image_input import EncodedImage, encode
from mal_client.results.dataset import DEFAULT_DATASET_OPTIONS, DatasetOptions, DatasetResult, Progress
from mal_client.results.labels import SERVER_DEFAULTS, BoxLabel, LabelOptions
from mal_client.results.server_info import ServerInfo, ServerLimits
from mal_client.transport.channel import Connection
from mal_client.transport.client_base import DEFAULT_TIMEOUT_S, ClientBase, open_large_image
from mal_client.transport.image_call import Prompts
from mal_client.transport.resolver import Lookup, ResolvedAddress, resolve, system_lookup
from mal_train.core.addresses import split_addresses
from mal_train.core.errors import ConfigError
from mal_train.core.settings import COCO_RULES, RowRules
from mal_train.core.storage.addresses import parse_location, redact

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from mal_client.images.image_files import ImageFiles
    from mal_client.results.evaluation import Evaluation
    from mal_client.results.labels import ImageInput
    from mal_train.core.masks.points import Point


class Client(ClientBase):
    """Blocking, thread-safe client of a server; a context manager that closes the connection.

    It connects on the first call and reconnects by itself. Use one client for many calls: they share the connection,
    and an image that the server still has in its cache is not sent again.

    >>> with Client("localhost:50051") as client:  # doctest: +SKIP
    ...     for label in client.label_image("street.jpg", [[10, 20, 50, 80], [70, 20, 40, 40]]):
    ...         print(label.index, label.score, label.mask.sum())
    0 0.91 2214
    1 0.87 1039

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
        ConfigError: the address has no port, a file cannot be read, or options contradict each other.
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
        self._connect(Connection(address, tls, tls_ca, client_cert, client_key, token, authority), timeout_s)

    def _connect(self, connection: Connection, timeout_s: float) -> None:
        super().__init__(connection, timeout_s)
        self._channel = connection.open()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._servers: WeakValueDictionary[str, Client] = WeakValueDictionary()
        """Clients of single servers behind the address, by their address; gone, with their connections, once nobody
        uses them: the addresses of a name may change for as long as this client is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.address}{' (closed)' if self.is_closed else ''}>"

    @property
    def is_closed(self) -> bool:
        """True after `close`; every call raises `CallCancelled` then."""
        return self._closed.is_set()

    def close(self) -> None:
        """Closes the connection; running calls in other threads raise `CallCancelled`. May be called again."""
        with self._lock:
            self._closed.set()
            servers = list(self._servers.values())
        for server in servers:
            server.close()
        self._channel.close()

    def servers(self, lookup: Lookup = system_lookup) -> list[Client]:
        """Returns a client for each server behind the address now; this client if it is an IP address or a socket.

        They have the credentials of this client and are closed with it, or when nothing refers to them any more. The
        same server has the same client again, until that is closed.

        Args:
            lookup: resolves the name in the address.

        Raises:
            ServerUnavailable: the name has no IP address.
            CallCancelled: the client is closed.
        """
        found = [server for part in split_addresses(self.address) for server in resolve(part, lookup)]
        if len(found) == 1 and found[0].authority is None:
            return [self]
        return list(dict.fromkeys(map(self._server, found)))

    def server_info(self) -> ServerInfo:
        """Returns the version, models and limits of the server.

        >>> client.server_info().model  # doctest: +SKIP
        ModelRef(name='default', checkpoint_sha256='3b1f…', branch=<Branch.TEACHER: 'teacher'>)

        Raises:
            ServerUnavailable, CallTimedOut, CallCancelled, ServerError: the server did not answer.
            InvalidRequest: the token is missing or unknown, or the server is not a mal-server.
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
        points: Sequence[Sequence[Point]] | None = None,
        timeout_s: float | None = None,
    ) -> list[BoxLabel]:
        """Labels the boxes of one image.

        >>> labels = client.label_image("street.jpg", [[10, 20, 50, 80]])  # doctest: +SKIP
        >>> labels[0].mask.shape, labels[0].mask.dtype  # doctest: +SKIP
        ((480, 640), dtype('bool'))

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
        labels = self.stream_image(image, boxes, options, points=points, timeout_s=timeout_s)
        return sorted(labels, key=attrgetter("index"))

    def stream_image(
        self,
        image: ImageInput,
        boxes: ArrayLike | Sequence[Sequence[float]],
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        points: Sequence[Sequence[Point]] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[BoxLabel]:
        """Labels the boxes of one image; yields each label when it arrives.

        >>> for label in client.stream_image("street.jpg", boxes):  # doctest: +SKIP
        ...     print(label.index, label.ok)

        Arguments and errors are those of `label_image`; the iterator raises all errors.

        Yields:
            N labels in any order; `label.index` is the index of the box. Closing the iterator cancels the call.
        """
        prompts, large = Prompts.of(boxes, points), open_large_image(image, self._known_limits())
        if large is None:
            yield from self._stream(encode(image), prompts, options, timeout_s)
            return
        if options.resolve_overlaps:
            large.refuse_overlaps()
        for index, box, part in large.parts(prompts.boxes, self.server_info().of_model(options.model).margin_rate):
            if isinstance(part, ItemError):
                yield BoxLabel(index, box, error=part)
                continue
            for label in self._stream(part, prompts.one(index), options, timeout_s):
                yield replace(label, index=index)

    def _stream(
        self, encoded: EncodedImage, prompts: Prompts, options: LabelOptions, timeout_s: float | None
    ) -> Iterator[BoxLabel]:
        """Labels the boxes of an encoded image."""
        call = self._image_call(encoded, prompts, options, self._known_limits(), timeout_s)
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
        images_dir: ImageFiles | Path | str,
        output_json: Path | str,
        options: LabelOptions = SERVER_DEFAULTS,
        dataset_options: DatasetOptions = DEFAULT_DATASET_OPTIONS,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> DatasetResult:
        """Labels the annotations of a COCO file and writes a copy of the file with masks.

        >>> result = client.label_dataset("boxes.json", "images", "masks.json")  # doctest: +SKIP
        >>> result.labeled, result.failed_count  # doctest: +SKIP
        (8003, 0)

        The output file appears when the job is finished. Until then a journal beside it, `masks.json.ledger`, keeps the
        results: the same call after an interruption resumes the job, and its output is identical to that of a job
        without interruption. Memory use does not grow with the pixels and masks of the dataset.

        A failed annotation keeps its fields and gets an `error`; it is listed in the result and in
        `masks.errors.jsonl`. If the server is lost after some results arrived, these are written, all other annotations
        are listed as failed, and the journal is kept for the next run.

        `mal_client.dataset.run.label_dataset` does the same with several servers.

        Args:
            coco_json: COCO file, or its address; `bbox` is x, y, width, height in px.
            images_dir: folder that `file_name` is relative to, a glob pattern such as `photos/**/*.jpg`, or an address
                such as s3://bucket/images; `ImageFiles(folder, allow_outside=True)` for files outside the folder.
            output_json: COCO file to write.
            options: label options; the default leaves every choice to the server.
            dataset_options: annotations to label, and format of the masks. The default labels all annotations and
                replaces existing masks.
            on_progress: called after each result, in the thread that runs the job.
            on_notice: called with messages for users, for example that the job resumes, in the same thread.

        Raises:
            BadDataset: the COCO file is unusable as a whole, for example because an id is used twice; nothing was sent.
            OutputError: the output cannot be written, or another run is writing it; an older output is unchanged.
            ConfigError: the journal belongs to a job with other input, checkpoint or options.
            InvalidRequest: the server refuses the options.
            ServerUnavailable, CallTimedOut, ServerError: the server was lost before any result arrived.
            ModelChanged: the server switched to other weights; start again with `DatasetOptions(restart=True)`.
            CallCancelled: the client was closed.
        """
        # Imported here: jobs load OpenCV and pycocotools, which would delay the first import for callers without jobs.
        from mal_client.dataset.run import label_dataset  # noqa: PLC0415
        from mal_train.core.coco.members import annotation_file  # noqa: PLC0415

        output = parse_location(str(output_json))
        if not isinstance(output, Path):
            raise ConfigError(
                f"output {redact(output)}: a local path is needed, beside which the journal lies; upload the file by "
                "mal_train.core.storage.writing.upload, or use mal-client label"
            )
        with annotation_file(parse_location(str(coco_json))) as annotations:
            return label_dataset(
                [self],
                annotations,
                images_dir,
                output,
                options,
                dataset_options=dataset_options,
                on_progress=on_progress,
                on_notice=on_notice,
            )

    def evaluate(
        self,
        coco_json: Path | str,
        images_dir: ImageFiles | Path | str,
        options: LabelOptions = SERVER_DEFAULTS,
        *,
        worst_count: int = 100,
        on_progress: Callable[[Progress], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
        resume: Path | None = None,
        rules: RowRules = COCO_RULES,
    ) -> Evaluation:
        """Evaluates the served model on a COCO file with masks: the server labels the boxes and compares the masks.

        >>> evaluation = client.evaluate("val.json", "images")  # doctest: +SKIP
        >>> evaluation.overall.miou  # doctest: +SKIP
        0.813

        Args:
            coco_json: COCO file with ground-truth masks, or its address.
            images_dir: as in `label_dataset`.
            options: label options; the default leaves every choice to the server.
            worst_count: number of instances to list in the result, those with the lowest IoU; 0 to 10 000.
            on_progress: called when images finish, in the thread that runs the evaluation.
            on_notice: called with messages for users, for example that the evaluation resumes, in the same thread.
            resume: file that stores the measurements of an interrupted evaluation, so that the same call resumes it;
                deleted at the end. None keeps them in memory, for this call only.
            rules: how crowd regions and rotated boxes are read.

        Raises:
            BadDataset: the COCO file is unusable as a whole; nothing was sent.
            ConfigError: the file `resume` belongs to another evaluation.
            OutputError: the file `resume` cannot be written, or another run uses it.
            InvalidRequest: the server refuses the options.
            ServerUnavailable, CallTimedOut, CallCancelled, ServerError: the server was lost.
        """
        # Imported here for the same reason as in label_dataset.
        from mal_client.evaluation.run import evaluate  # noqa: PLC0415
        from mal_train.core.coco.members import annotation_file  # noqa: PLC0415

        with annotation_file(parse_location(str(coco_json))) as annotations:
            return evaluate(
                self,
                annotations,
                images_dir,
                options,
                worst_count=worst_count,
                on_progress=on_progress,
                on_notice=on_notice,
                resume=resume,
                rules=rules,
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
        rules: RowRules = COCO_RULES,
    ) -> Evaluation:
        """Evaluates the served model as `evaluate` does, on files in the server's `data_folders`; sends no image.

        Args:
            annotations: FOLDER/PATH of the COCO file on the server; FOLDER is a name in `data_folders`.
            images: FOLDER or FOLDER/PATH that its file names are relative to.
            options: label options; the default leaves every choice to the server.
            worst_count: as in `evaluate`; the image id of an instance is its file name, and its box is missing.
            on_progress: as in `evaluate`.
            on_notice: as in `evaluate`.
            resume: as in `evaluate`.
            rules: as in `evaluate`.

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
            rules=rules,
        )

    def open_channel(self) -> grpc.Channel:
        """Returns the gRPC channel, for jobs and `ModelAdmin`. Raises CallCancelled after `close`."""
        if self.is_closed:
            raise self._closed_error()
        return self._channel

    def pause(self, pause_s: float) -> None:
        """Sleeps for `pause_s` before a retry, for jobs. Raises CallCancelled if the client is closed meanwhile."""
        # Not time.sleep: close() in another thread ends the wait.
        if self._closed.wait(pause_s):
            raise CallCancelled(f"{self.address}: the client was closed while its call waited for a retry")

    def _known_limits(self) -> ServerLimits:
        return self._limits or self.server_info().limits

    def _server(self, server: ResolvedAddress) -> Client:
        with self._lock:
            if self.is_closed:
                raise self._closed_error()
            known = self._servers.get(server.address)
            if known is None or known.is_closed:
                known = self._servers[server.address] = client_of(self._connection.at(server), self.timeout_s)
            return known


def client_of(connection: Connection, timeout_s: float) -> Client:
    """Returns a client with a connection that is described already. Raises ConfigError, as `Client` does."""
    client = Client.__new__(Client)
    client._connect(connection, timeout_s)
    return client
