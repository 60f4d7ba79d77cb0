"""Labels a whole COCO file through bulk streams: every annotation answered, or listed with the reason why not.

The client reads files and passes their bytes on; only the server decodes. Answers go to a ledger on disk as they come
and from there into the output, so memory holds neither pixels nor masks, and a killed run is taken up where it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from mal_client.bulk.dispatcher import AllServersLost, MultiServerDispatcher, OnNotice
from mal_client.bulk.stream import ItemResult
from mal_client.bulk.work_queue import WorkQueue
from mal_client.dataset.journal import Answer, Journal, journal_path
from mal_client.dataset.output import refuse_same_file, write_labeled
from mal_client.dataset.plan import DatasetPlan, RowAction, read_work
from mal_client.dataset.provenance import answering_model, provenance_of
from mal_client.dataset.shards import SHARD_KEY, Shard
from mal_client.errors import CallTimedOut, ItemError, ServerUnavailable
from mal_client.images.image_files import ImageFiles
from mal_client.images.image_input import EncodedImage, not_found, read_file
from mal_client.transport.base import Transport
from mal_client.transport.image_call import check_image_size
from mal_client.types import (
    DEFAULT_DATASET_OPTIONS,
    BoxLabel,
    DatasetOptions,
    DatasetResult,
    LabelOptions,
    ModelRef,
    Progress,
    ServerInfo,
    ServerLimits,
)
from mal_train.core.atomic_io import check_writable
from mal_train.core.coco.annotations import ImageInfo
from mal_train.core.coco.output import label_fields
from mal_train.core.errors import ConfigError
from mal_train.core.fingerprint import differences

OnProgress = Callable[[Progress], None]


def label_dataset(
    clients: Sequence[Transport],
    coco_json: Path,
    images_dir: Path | str,
    output_json: Path,
    options: LabelOptions,
    *,
    how: DatasetOptions = DEFAULT_DATASET_OPTIONS,
    shard: Shard | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> DatasetResult:
    """See `Client.label_dataset`; here the work is shared by the servers of several clients.

    Args:
        clients: one for each server.
        coco_json: the annotations.
        images_dir: the folder that `file_name` is relative to, or a pattern (`ImageFiles`).
        output_json: the file with masks.
        options: how boxes become masks.
        how: which annotations, and how they are written.
        shard: label this part alone and write no file: the answers stay in a ledger for `merge_shards`.
        on_progress: called after each answered image.
        on_notice: told what the user should know.

    Raises:
        ConfigError: the servers do not serve the same; an unfinished run was another job; or the output is the
            annotations' file.
        RequestRefused: a server does not serve what the options ask for.
    """
    tell = on_notice or (lambda _: None)
    check_writable(output_json)
    refuse_same_file(coco_json, output_json)
    images = ImageFiles(images_dir)
    work = read_work(coco_json, how)
    servers = _servers(clients, options, tell)
    provenance = provenance_of(servers[0][1], options)
    manifest = _manifest(work, images, how, provenance)
    path = journal_path(output_json)
    if shard is not None:
        manifest, path = {**manifest, SHARD_KEY: str(shard)}, shard.journal_path(output_json)
    with Journal(path, work.head.count, manifest, restart=how.restart) as ledger, ExitStack() as cleanup:
        if shard is None:
            cleanup.callback(_remove_if_empty, ledger)
        job = _DatasetRun(work, ledger, on_progress, shard)
        if ledger.label_count:
            again = f", {job.failed_before} failed and are asked again" if job.failed_before else ""
            answered = f"{ledger.label_count} of {job.asked} boxes are answered{again}"
            tell(f"{path}: going on with an unfinished run; {answered}")
        fault = _label_rest(job, servers, image_loader(images, servers[0][1].limits), options, tell)
        unanswered = fault or ItemError("INTERNAL", "NOT_ANSWERED", "no label was made")
        is_final = fault is None and not job.refused
        model = answering_model(servers[0][1], options)
        if shard is not None:
            return _shard_result(job, path, model, unanswered, is_final=is_final)
        result = write_labeled(work, lambda at: job.answer(at, unanswered), output_json, provenance, how)
        if is_final:
            ledger.remove()
        return replace(result, model=model, is_final=is_final)


def image_loader(images: ImageFiles, limits: ServerLimits) -> Callable[[ImageInfo], EncodedImage]:
    """Reads an image's file as it is stored; BadImage for one that is missing or that the server would not take."""

    def load(image: ImageInfo) -> EncodedImage:
        path = images.path(image.file_name)
        try:
            check_image_size(path.stat().st_size, limits, str(path))
        except (OSError, ValueError) as error:
            raise not_found(path, error) from None
        width, height = image.size_wh or (0, 0)
        return EncodedImage(read_file(path), width, height)

    return load


class _DatasetRun:
    """What is known so far: answers in the ledger, and what counts for progress. Rows are named by their place."""

    def __init__(
        self, work: DatasetPlan, ledger: Journal, on_progress: OnProgress | None, shard: Shard | None = None
    ) -> None:
        self.work = work
        self.ledger = ledger
        self.rest = work.remaining(ledger.has_label, shard.has_image if shard is not None else None)
        self.asked = len(self.rest.asked)
        self.refused: dict[int, ItemError] = {}
        """Rows that the server wanted again too often: failed, but not for good."""
        self._on_progress = on_progress
        self._images_open = self.rest.images_open()
        self._images_before = self.rest.images_total - self._images_open
        # What was found when the file was read is done; the parts of a shared job leave it to whoever merges them.
        self._faulty = work.plans.count(RowAction.FAULTY) if shard is None else 0
        # Boxes that failed in an unfinished run are asked again, and count as failed until that answer comes: a job
        # that ends before has no better one.
        self.failed_before = sum(map(ledger.has_failure, map(int, self.rest.places)))
        self._failed = self._faulty + self.failed_before

    def take(self, answer: ItemResult) -> None:
        """Stores what an item's boxes got."""
        image = self.work.image_of(answer.item)
        about_image = None if answer.error is None else _about_image(answer.error, image)
        found: dict[int, Answer] = {}
        for at in answer.item.boxes:
            was_failed = self.ledger.has_failure(at)
            self.failed_before -= was_failed
            self._failed -= was_failed
            error = about_image or answer.labels[at].error
            if error is None:
                found[at] = {"label": _fields(answer.labels[at])}
                continue
            self._failed += 1
            if error.code == "UNAVAILABLE":
                self.refused[at] = error
            else:
                found[at] = {"failed": [error.code, error.reason, error.message]}
        self.ledger.append(found)
        self._count(answer)

    def answer(self, at: int, unanswered: ItemError) -> Answer:
        """What became of a row; `unanswered` where nothing did."""
        return self.ledger.answer(at) or {"failed": _parts(self.refused.get(at, unanswered))}

    def progress(self) -> Progress:
        """How far the job is, with what an unfinished run left."""
        total = self.rest.images_total
        done = self._faulty + self.asked - int(self.rest.boxes_left.sum()) + self.failed_before
        return Progress(total - self._images_open, total, done, self._failed, images_before=self._images_before)

    def _count(self, answer: ItemResult) -> None:
        place = int(answer.item.key)
        self.rest.boxes_left[place] -= len(answer.item.boxes)
        self._images_open -= not self.rest.boxes_left[place]
        if self._on_progress is not None:
            self._on_progress(self.progress())


def _servers(clients: Sequence[Transport], options: LabelOptions, tell: OnNotice) -> list[tuple[Transport, ServerInfo]]:
    """The servers that answer, all with the same model and settings."""
    servers: list[tuple[Transport, ServerInfo]] = []
    faults: list[ServerUnavailable | CallTimedOut] = []
    for client in clients:
        try:
            servers.append((client, client.server_info().for_options(options)))
        except (ServerUnavailable, CallTimedOut) as fault:
            faults.append(fault)
    if not servers:
        raise faults[0]
    for silent in faults:
        tell(f"{silent}; {len(servers)} of {len(clients)} servers begin")
    first, *others = [(client.address, provenance_of(info, options)) for client, info in servers]
    for address, provenance in others:
        different = differences(provenance, first[1])
        if different:
            raise ConfigError(
                f"{address}: serves something else than {first[0]} ({'; '.join(different)}), so their masks would not "
                "belong together; give servers of one checkpoint, version and precision"
            )
    return servers


def _shard_result(
    job: _DatasetRun, path: Path, model: ModelRef, unanswered: ItemError, *, is_final: bool
) -> DatasetResult:
    """What one part of a job has come to; what failed is listed when the parts are merged."""
    outcomes = [job.answer(at, unanswered) for at in job.rest.asked.tolist()]
    labeled = sum("label" in outcome for outcome in outcomes)
    return DatasetResult(
        output=path,
        errors_file=None,
        labeled=labeled,
        copied=0,
        model=model,
        failed_count=len(outcomes) - labeled,
        is_final=is_final,
    )


def _label_rest(
    job: _DatasetRun,
    servers: Sequence[tuple[Transport, ServerInfo]],
    load: Callable[[ImageInfo], EncodedImage],
    options: LabelOptions,
    tell: OnNotice,
) -> ItemError | None:
    """Labels what is not answered yet; when the servers are lost after some answers came, what to say of the rest."""
    if not len(job.rest.places):
        return None
    limits = [info.limits for _, info in servers]
    pool = WorkQueue(
        job.rest.items(max(1, min(limit.max_boxes for limit in limits))), model=answering_model(servers[0][1], options)
    )
    fleet = MultiServerDispatcher(
        [(client, info.limits.max_items_in_flight) for client, info in servers],
        pool,
        lambda item: load(job.work.image_of(item)),
        options,
        tell,
    )
    try:
        with closing(fleet.results()) as answers:
            for answer in answers:
                job.take(answer)
    except AllServersLost as lost:
        if not job.ledger.label_count:
            raise lost.error from lost
        return ItemError("UNAVAILABLE", "SERVER_LOST", f"not answered before the server was lost: {lost.error}")
    return None


def _fields(label: BoxLabel) -> dict[str, Any]:
    if label.rle is None:
        raise ValueError(f"box {label.index}: neither mask nor error")
    return label_fields(label.rle.to_coco(), label.area, label.score, label.flags, label.agreement)


def _parts(error: ItemError) -> list[str]:
    return [error.code, error.reason, error.message]


def _about_image(error: ItemError, image: ImageInfo) -> ItemError:
    """The server knows no file names; its word is about "image"."""
    if image.file_name in error.message:
        return error
    return replace(error, message=f"{image.file_name}: {error.message.removeprefix('image: ')}")


def _remove_if_empty(ledger: Journal) -> None:
    """A run that ended before its first answer leaves nothing behind."""
    if not ledger.label_count:
        ledger.remove()


def job_fingerprint(work: DatasetPlan, how: DatasetOptions) -> dict[str, Any]:
    """Which boxes of which file a job labels."""
    return {"input_sha256": work.head.sha256, "only": str(how.only), "ids": sorted(map(repr, how.ids))}


def _manifest(
    work: DatasetPlan, images: ImageFiles, how: DatasetOptions, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """What the answers of a job depend on; `update_bbox` and the like only change how they are written."""
    return {**job_fingerprint(work, how), "images": images.name, **provenance}
