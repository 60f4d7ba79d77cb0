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
from pathlib import Path

import torch
from safetensors.torch import load, save

from mal_train.core.coco.annotations import Annotation
from mal_train.core.errors import LostProcess, MalError
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Label
from mal_train.kernel.networks.network import MalNetwork
from mal_train.offline.dataset_labeler import LabelFailure, Row
from mal_train.offline.tta import TtaOptions, label_images
from mal_train.offline.worker_messages import (
    Result,
    WorkerJob,
    decode_job,
    decode_results,
    encode_error,
    encode_job,
    encode_results,
)

RESULTS_PER_MESSAGE = 16


def label_on_devices(
    devices: Sequence[torch.device],
    labeler: Labeler,
    rows: Sequence[Row],
    image_dir: Path,
    *,
    precision: str,
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
        image_dir: folder that file names are relative to.
        precision: precision of the network; see `Labeler`.
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
    jobs = [
        WorkerJob(
            model=labeler.network.config,
            labeler=labeler.config,
            device=str(device),
            precision=precision,
            rows=rows[index :: len(devices)],
            image_dir=image_dir,
            tta=tta,
            batch_size=batch_size,
            threads=max(1, threads // len(devices)),
            torch_threads=torch.get_num_threads(),
        )
        for index, device in enumerate(devices)
    ]
    weights = save({name: value.contiguous() for name, value in labeler.network.weights().items()})
    with _start_workers(jobs, weights) as workers:
        inbox = _Inbox(workers)
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


class _Inbox:
    """Buffers results that arrive before their turn. Results are small, and processes run at about the same speed."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers
        self._results: list[deque[Result]] = [deque() for _ in workers]

    def next_result(self, worker_index: int) -> Result:
        """Returns the next result of a worker, and buffers those of the other workers meanwhile."""
        while not self._results[worker_index]:
            ready = wait([worker.connection for worker in self._workers])
            for worker, results in zip(self._workers, self._results, strict=True):
                if worker.connection in ready:
                    results.extend(self._receive(worker))
        return self._results[worker_index].popleft()

    def _receive(self, worker: _Worker) -> list[Result]:
        try:
            message = worker.connection.recv_bytes()
        except (EOFError, ConnectionError):
            worker.process.join()
            raise LostProcess(
                f"the process on {worker.device} ended with exit code {worker.process.exitcode}; nothing was written, "
                "run the same command again"
            ) from None
        return decode_results(message)


@contextlib.contextmanager
def _start_workers(jobs: Sequence[WorkerJob], weights: bytes) -> Iterator[list[_Worker]]:
    """Starts a process for each job; kills them all when the block ends."""
    # Not fork: it would copy locks held by other threads, and CUDA does not survive it.
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for job in jobs:
            connection, worker_connection = context.Pipe()
            process = context.Process(target=_run_worker, args=(worker_connection,), daemon=True)
            process.start()
            worker_connection.close()
            workers.append(_Worker(process, connection, job.device))
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
    # Ctrl-C reaches the whole process group; the parent process ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A closed pipe means that the parent process has ended.
    with contextlib.suppress(BrokenPipeError, EOFError, ConnectionError):
        job = decode_job(connection.recv_bytes())
        weights = connection.recv_bytes()
        try:
            for chunk in _chunks(_label(job, weights)):
                connection.send_bytes(encode_results(chunk))
        except MalError as error:
            connection.send_bytes(encode_error(error))
        connection.recv_bytes()


def _label(job: WorkerJob, weights: bytes) -> Iterator[Result]:
    torch.set_num_threads(job.torch_threads)
    network = MalNetwork(job.model)
    network.load(load(weights))
    labeler = Labeler(network, job.labeler, device=job.device, precision=job.precision)
    for annotation, result in label_images(
        labeler, job.rows, job.image_dir, job.tta, batch_size=job.batch_size, threads=job.threads
    ):
        yield annotation.id, result


def _chunks(results: Iterable[Result]) -> Iterator[list[Result]]:
    iterator = iter(results)
    while chunk := list(itertools.islice(iterator, RESULTS_PER_MESSAGE)):
        yield chunk
