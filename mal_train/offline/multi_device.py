"""Labels the boxes of many images on several devices, with one process for each: one interpreter cannot keep two busy.

Images are distributed round-robin, and results are yielded in the order of the rows, so that the output does not depend
on the number of devices. In float32 on CPUs it is identical byte for byte.

Each process is connected by an anonymous pipe, which only it and this process can use. Messages are JSON
(`worker_messages`), weights are safetensors bytes; nothing is unpickled.
"""

import contextlib
import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch
from safetensors.torch import load, save

from mal_train.core.coco.annotations import Annotation
from mal_train.core.errors import LostProcess, MalError
from mal_train.core.images.files import Images, ImageSource, NewFindings, add_findings, images_of
from mal_train.core.settings import NetworkEngine
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import labeler_of
from mal_train.kernel.labeler.types import Label
from mal_train.kernel.networks.network import MalNetwork
from mal_train.kernel.networks.quantization import Int8Calibration
from mal_train.offline.dataset_labeler import LabelFailure, Row
from mal_train.offline.tta import TtaOptions, label_images
from mal_train.offline.worker_messages import (
    ROW_REQUEST,
    Result,
    WorkerJob,
    decode_job,
    decode_results,
    decode_rows,
    encode_error,
    encode_job,
    encode_results,
    encode_rows,
)

RESULTS_PER_MESSAGE = 16
IMAGES_PER_MESSAGE = 32
MAX_WAITING_RESULTS = 2048
"""Results of a process before their turn with which it gets no more rows: the memory for results is bounded."""


def label_on_devices(
    devices: Sequence[torch.device],
    labeler: Labeler,
    rows: Sequence[Row],
    image_dir: ImageSource,
    *,
    precision: str,
    network_engine: str = NetworkEngine.TORCH,
    int8: Int8Calibration | None = None,
    tta: TtaOptions | None = None,
    batch_size: int = 8,
    threads: int = 2,
) -> Generator[tuple[Annotation, Label | LabelFailure], None, None]:
    """Yields every annotation that is not a crowd, in the order of `rows`, with its label or the reason of its failure.

    Args:
        devices: a single device is used in this process, with `labeler`. Several are used by one process each; a device
            may be listed more than once.
        labeler: network and settings.
        rows: images with their annotations, from `annotations.by_image`.
        image_dir: folder that file names are relative to; learns what the processes find about images.
        precision: precision of the network; see `Labeler`.
        network_engine: what runs the network in the processes.
        int8: its calibration; for precision int8 alone.
        tta: test-time augmentation and post-processing; None: a single pass of the student.
        batch_size: crops in a batch on one device, ≥ 1.
        threads: threads for decoding and encoding, on all devices together.

    Raises:
        LostProcess: a process was killed.
        MalError: a process failed with this error.
    """
    tta = tta or TtaOptions()
    if len(devices) == 1:
        yield from label_images(labeler, rows, image_dir, tta, batch_size=batch_size, threads=threads)
        return
    images = images_of(image_dir)
    jobs = [
        WorkerJob(
            model=labeler.network.config,
            labeler=labeler.config,
            device=str(device),
            precision=precision,
            network_engine=network_engine,
            int8=int8,
            image_dir=images,
            tta=tta,
            batch_size=batch_size,
            threads=max(1, threads // len(devices)),
            torch_threads=max(1, torch.get_num_threads() // len(devices)),
        )
        for device in devices
    ]
    shares = [rows[index :: len(devices)] for index in range(len(devices))]
    weights = save({name: value.contiguous() for name, value in labeler.network.weights().items()})
    with _start_workers(jobs, shares, weights) as workers:
        inbox = _Inbox(workers, images)
        for row_index, (_, annotations) in enumerate(rows):
            for annotation in annotations:
                if not annotation.iscrowd:
                    annotation_id, result = inbox.next_result(row_index % len(devices))
                    assert annotation_id == annotation.id, "results arrive in the order of the rows"
                    yield annotation, result


@dataclass(frozen=True)
class _Worker:
    process: multiprocessing.context.SpawnProcess
    connection: Connection
    device: str
    rows: Iterator[Row]
    """Rows that were not sent."""


class _Inbox:
    """Sends rows to the workers at their request, and buffers results that arrive before their turn."""

    def __init__(self, workers: Sequence[_Worker], images: Images) -> None:
        self._workers = workers
        self._images = images
        self._results: list[deque[Result]] = [deque() for _ in workers]
        self._needs_rows = [False] * len(workers)

    def next_result(self, worker_index: int) -> Result:
        """Returns the next result of a worker, and buffers those of the other workers meanwhile."""
        while not self._results[worker_index]:
            self._send_rows()
            ready = wait([worker.connection for worker in self._workers])
            for index, worker in enumerate(self._workers):
                if worker.connection in ready:
                    self._receive(index)
        return self._results[worker_index].popleft()

    def _send_rows(self) -> None:
        """Answers the requests for rows. A worker whose turn it is has no results here, and so always gets rows."""
        for index, worker in enumerate(self._workers):
            if self._needs_rows[index] and len(self._results[index]) < MAX_WAITING_RESULTS:
                self._needs_rows[index] = False
                # `_receive` reports a worker that has ended.
                with contextlib.suppress(ConnectionError):
                    worker.connection.send_bytes(encode_rows(itertools.islice(worker.rows, IMAGES_PER_MESSAGE)))

    def _receive(self, index: int) -> None:
        worker = self._workers[index]
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, ConnectionError):
            worker.process.join()
            raise LostProcess(
                f"the process on {worker.device} ended with exit code {worker.process.exitcode}; run the same command "
                "again"
            ) from None
        if message == ROW_REQUEST:
            self._needs_rows[index] = True
        else:
            results, findings = decode_results(message)
            self._results[index].extend(results)
            add_findings(self._images, findings)


@contextlib.contextmanager
def _start_workers(
    jobs: Sequence[WorkerJob], shares: Sequence[Sequence[Row]], weights: bytes
) -> Iterator[list[_Worker]]:
    """Starts a process for each job and its share of the rows; kills them all when the block ends."""
    # Not fork: it would copy locks held by other threads, and CUDA does not survive it.
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for job, rows in zip(jobs, shares, strict=True):
            connection, worker_connection = context.Pipe()
            process = context.Process(target=_run_worker, args=(worker_connection,), daemon=True)
            process.start()
            worker_connection.close()
            workers.append(_Worker(process, connection, job.device, iter(rows)))
        for job, worker in zip(jobs, workers, strict=True):
            # After all have started: a process takes seconds before it reads. `_Inbox` reports one that has ended.
            with contextlib.suppress(BrokenPipeError):
                worker.connection.send_bytes(encode_job(job))
                worker.connection.send_bytes(weights)
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


def _run_worker(connection: Connection) -> None:
    """Main function of a worker process: receives a job, sends its results, then waits to be killed."""
    # Ctrl-C, and SIGTERM of a job scheduler, reach the whole process group; the parent process ends this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # A closed pipe means that the parent process has ended.
    with contextlib.suppress(BrokenPipeError, EOFError, ConnectionError):
        job = decode_job(connection.recv_bytes())
        weights = connection.recv_bytes()
        try:
            findings = NewFindings(job.image_dir)
            for chunk in _chunks(_label(job, weights, _requested_rows(connection))):
                connection.send_bytes(encode_results(chunk, findings.take()))
        except MalError as error:
            connection.send_bytes(encode_error(error))
        connection.recv_bytes()


def _requested_rows(connection: Connection) -> Iterator[Row]:
    while True:
        connection.send_bytes(ROW_REQUEST)
        rows = decode_rows(connection.recv_bytes())
        if not rows:
            return
        yield from rows


def _label(job: WorkerJob, weights: bytes, rows: Iterable[Row]) -> Iterator[Result]:
    torch.set_num_threads(job.torch_threads)
    network = MalNetwork(job.model)
    network.load(load(weights))
    labeler = labeler_of(
        network,
        job.labeler,
        job.int8,
        device=job.device,
        precision=job.precision,
        network_engine=job.network_engine,
    )
    for annotation, result in label_images(
        labeler, rows, job.image_dir, job.tta, batch_size=job.batch_size, threads=job.threads
    ):
        yield annotation.id, result


def _chunks(results: Iterable[Result]) -> Iterator[list[Result]]:
    iterator = iter(results)
    while chunk := list(itertools.islice(iterator, RESULTS_PER_MESSAGE)):
        yield chunk
