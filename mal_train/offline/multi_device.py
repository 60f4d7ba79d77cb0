"""Labels the boxes of many images on several devices, a process for each: one interpreter does not keep two GPUs busy.

Images are dealt out in turn and answers come back in the order of the rows: whoever reads them cannot tell how many
devices there were. In float32 on a CPU they are the same bytes.
"""

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from safetensors.torch import load, save

from mal_train.core.coco.annotations import Annotation, JsonId
from mal_train.core.errors import LostProcess, MalError
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Label, Labeler
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.offline.dataset_labeler import LabelFailure, Row
from mal_train.offline.tta import TtaOptions, label_images

Answer = tuple[JsonId | None, Label | LabelFailure]

CHUNK = 16
"""Answers in one message."""


@dataclass(frozen=True)
class _Part:
    """What one process needs to know. Weights as safetensors bytes: passed as tensors they would take shared memory."""

    model: ModelConfig
    labeler: LabelerConfig
    weights: bytes
    device: str
    precision: str
    rows: Sequence[Row]
    image_dir: Path
    passes: TtaOptions
    batch_size: int
    threads: int
    torch_threads: int


def label_on(
    devices: Sequence[torch.device],
    labeler: Labeler,
    rows: Sequence[Row],
    image_dir: Path,
    *,
    precision: str,
    passes: TtaOptions | None = None,
    batch_size: int = 8,
    threads: int = 2,
) -> Generator[tuple[Annotation, Label | LabelFailure], None, None]:
    """Every box that is no crowd, in the order of `rows`, with its label or why there is none.

    Args:
        devices: one runs in this process, with `labeler`; several in a process each, one as often as it is named.
        labeler: network and settings.
        rows: images with their annotations, as `coco.by_image` gives them.
        image_dir: folder that the file names start at.
        precision: arithmetic of the network.
        passes: what is done for a label; None: the student's answer, once.
        batch_size: crops in a batch of one device, ≥ 1.
        threads: for decoding and encoding, on all devices together.

    Raises:
        LostProcess: one of the processes was killed.
        MalError: what one of them met and could not answer with a `LabelFailure`.
    """
    if len(devices) == 1:
        yield from label_images(
            labeler, rows, image_dir, passes or TtaOptions(), batch_size=batch_size, threads=threads
        )
        return
    weights = save({name: value.contiguous() for name, value in labeler.network.weights().items()})
    parts = [
        _Part(
            labeler.network.config,
            labeler.config,
            weights,
            str(device),
            precision,
            rows[number :: len(devices)],
            image_dir,
            passes or TtaOptions(),
            batch_size,
            max(1, threads // len(devices)),
            torch.get_num_threads(),
        )
        for number, device in enumerate(devices)
    ]
    with _processes(parts) as workers:
        inbox = _Inbox(workers)
        for number, (_, annotations) in enumerate(rows):
            for annotation in annotations:
                if not annotation.iscrowd:
                    name, answer = inbox.next_of(number % len(devices))
                    assert name == annotation.id, "answers come in the order of the rows"
                    yield annotation, answer


@dataclass(frozen=True)
class _Worker:
    process: multiprocessing.context.SpawnProcess
    connection: Connection
    device: str


class _Inbox:
    """Answers that have come and were not asked for yet. They are small, and processes keep about the same pace."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers
        self._waiting: list[deque[Answer]] = [deque() for _ in workers]

    def next_of(self, number: int) -> Answer:
        """The next answer of a process; those of the others that come meanwhile are kept."""
        while not self._waiting[number]:
            ready = wait([worker.connection for worker in self._workers])
            for index, worker in enumerate(self._workers):
                if worker.connection in ready:
                    self._waiting[index] += self._receive(worker)
        return self._waiting[number].popleft()

    def _receive(self, worker: _Worker) -> list[Answer]:
        try:
            message: list[Answer] | MalError = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            raise LostProcess(
                f"the process that labels on {worker.device} has gone (exit code {worker.process.exitcode}); nothing "
                "was written, and the same command starts anew"
            ) from None
        if isinstance(message, MalError):
            raise message
        return message


@contextlib.contextmanager
def _processes(parts: Sequence[_Part]) -> Iterator[list[_Worker]]:
    """A process for each part, ended at the end of the block, whatever it is doing then."""
    # A fork would share the threads' locks and a GPU's state.
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for part in parts:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,), daemon=True)
            process.start()
            there.close()
            workers.append(_Worker(process, here, part.device))
        for part, worker in zip(parts, workers, strict=True):
            # Once all have started: each takes seconds before it reads.
            with contextlib.suppress(BrokenPipeError):  # it has gone, which whoever waits for its answers will hear
                worker.connection.send(part)
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


def _work(connection: Connection) -> None:
    """Life of a process: one part in, chunks of answers out; waits at the end until it is ended."""
    # Ctrl-C reaches the whole group; the process that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whoever reads has gone: there is nobody to tell.
    with contextlib.suppress(BrokenPipeError, EOFError, ConnectionError):
        part: _Part = connection.recv()
        try:
            for chunk in _chunks(_answers(part)):
                connection.send(chunk)
        except MalError as error:
            connection.send(error)
        connection.recv()


def _answers(part: _Part) -> Iterator[Answer]:
    torch.set_num_threads(part.torch_threads)
    network = MalNetwork(part.model)
    network.load(load(part.weights))
    labeler = Labeler(network, part.labeler, device=part.device, precision=part.precision)
    found = label_images(
        labeler, part.rows, part.image_dir, part.passes, batch_size=part.batch_size, threads=part.threads
    )
    for annotation, answer in found:
        yield annotation.id, answer


def _chunks(answers: Iterator[Answer]) -> Iterator[list[Answer]]:
    chunk: list[Answer] = []
    for answer in answers:
        chunk.append(answer)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    yield chunk
