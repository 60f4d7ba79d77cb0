"""Labels a COCO file through bulk streams: every annotation gets a mask, or is listed with the reason for its failure.

The client reads image files and sends their bytes; only the server decodes. Results go to a journal on disk as they
arrive and from there into the output: memory holds neither pixels nor masks, and a killed run resumes where it ended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mal_client.bulk.dispatcher import AllServersLost, MultiServerDispatcher, OnNotice
from mal_client.bulk.stream import ItemResult
from mal_client.bulk.work_queue import WorkItem, WorkQueue
from mal_client.dataset.images import JobImages
from mal_client.dataset.output import finished_part, write_labeled
from mal_client.dataset.provenance import answering_model, job_fingerprint, provenance_of
from mal_client.dataset.servers import JobServers
from mal_client.dataset.shards import SHARD_KEY, Shard
from mal_client.errors import TOO_MANY_BOXES, ItemError, ModelChanged, too_many_boxes
from mal_client.images.image_files import ImageFiles
from mal_client.images.image_input import EncodedImage
from mal_client.transport.base import Transport
from mal_client.transport.resolver import Lookup, system_lookup
from mal_client.types import (
    DEFAULT_DATASET_OPTIONS,
    BoxLabel,
    DatasetOptions,
    DatasetResult,
    LabelOptions,
    Progress,
    RowFilter,
)
from mal_train.core.atomic_io import check_writable
from mal_train.core.coco.annotations import ImageInfo
from mal_train.core.coco.job_results import NOT_LABELED, JobResults
from mal_train.core.coco.journal import Journal, RowFailure, RowResult, failed, journal_path
from mal_train.core.coco.left_out import ignored_rows
from mal_train.core.coco.output import label_fields
from mal_train.core.coco.parquet_share import ParquetShare, share_of
from mal_train.core.coco.plan import DatasetPlan, RowAction, read_detection_plan, read_plan
from mal_train.core.errors import ConfigError
from mal_train.core.settings import MaskFormat
from mal_train.core.storage.addresses import Location, redact
from mal_train.core.storage.read_ahead import ReadAhead
from mal_train.core.storage.writing import refuse_same_location

OnProgress = Callable[[Progress], None]


def label_dataset(
    clients: Sequence[Transport],
    coco_json: Location,
    images_dir: ImageFiles | Location,
    output_json: Path,
    options: LabelOptions,
    *,
    dataset_options: DatasetOptions = DEFAULT_DATASET_OPTIONS,
    shard: Shard | None = None,
    publish: Callable[[], None] | None = None,
    published: Location | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    lookup: Lookup = system_lookup,
) -> DatasetResult:
    """Labels a COCO file as `Client.label_dataset` does, on the servers of several clients.

    A stream goes to each IP address of a name. While the job runs, names are resolved again: a server that is added
    joins if it gives the same masks, and one that is taken from its name gets no further items.

    Args:
        clients: one for each server or name.
        coco_json: the annotations.
        images_dir: the folder or address that `file_name` is relative to, or a pattern; `ImageFiles` for other files.
        output_json: the file with masks.
        options: label options.
        dataset_options: which annotations are labeled, and how they are written.
        shard: label this shard alone. From parquet to parquet, `output_json` is its part in a folder
            (`Shard.part_name`), and no other row group is read. Otherwise no file is written: the results stay in a
            journal for `merge_shards`.
        publish: called when the file is written and before the journal is deleted, for example to upload the file; if
            it raises, the same call later resumes from the journal.
        published: where `publish` puts the file; None: where it is written. A part that an earlier run of the same job
            left there is not labeled again, unless `restart` is set.
        on_progress: called after each result.
        on_notice: receives messages for the user.
        lookup: resolves names; returns the IP addresses of a host, for a port.

    Raises:
        ConfigError: `resolve_overlaps` with `only`, the servers differ, an unfinished run was another job, or the
            output is the annotation file.
        InvalidRequest: a server does not serve what the options ask for, or ignores the points of annotations.
        BadDataset, OutputError, ClientError: see `Client.label_dataset`.
    """
    notify = on_notice or (lambda _: None)
    _refuse_copied_masks(options, dataset_options)
    refuse_same_location(coco_json, output_json)
    check_writable(output_json)
    images = ImageFiles.of(images_dir)
    share = None
    if dataset_options.boxes is None:
        share = share_of(coco_json, output_json, *((0, 1) if shard is None else (shard.index, shard.count)))
    plan = plan_of(coco_json, dataset_options, share)
    images.expect(lambda: (image.file_name for image in plan.images))
    _note_rows(plan, notify)
    servers = JobServers(clients, options, notify, lookup=lookup)
    info = servers.first
    if plan.points:
        servers.limits.check_points()
    provenance = provenance_of(info, options)
    manifest = {**job_fingerprint(plan, dataset_options), "images": images.name, **provenance}
    path, job_sha256 = journal_path(output_json), None
    if shard is not None:
        manifest[SHARD_KEY] = str(shard)
        if share is None:
            path = shard.journal_path(output_json)
        else:
            shard = None  # the plan has no other rows
            job_sha256 = _job_sha256(manifest, dataset_options)
            finished = finished_part(plan, output_json, published or output_json, dataset_options, job_sha256)
            if finished is not None:
                notify(f"{redact(published or output_json)}: complete; give --restart (restart=True) to label it again")
                return replace(finished, model=answering_model(info, options))
    with Journal(path, plan.head.count, manifest, restart=dataset_options.restart) as journal, ExitStack() as cleanup:
        if shard is None:
            cleanup.callback(journal.remove_if_empty)
        run = _DatasetRun(plan, journal, options, on_progress, shard)
        resumed = run.results.resume_message()
        if resumed is not None:
            notify(resumed)
        job_images = JobImages(
            images,
            plan.images,
            servers.limits,
            info.margin_rate,
            resolve_overlaps=options.resolve_overlaps,
            writes_png=dataset_options.mask_format is MaskFormat.PNG,
        )
        lost = _label_pending(run, servers, job_images, options, notify)
        missing = NOT_LABELED if lost is None else _failure(lost)
        is_final = lost is None and not run.results.unavailable
        if shard is not None:
            result = run.shard_result(missing)
        else:
            result = write_labeled(
                plan,
                lambda index: run.results.result(index, missing),
                output_json,
                provenance,
                dataset_options,
                job_sha256=job_sha256 if is_final else None,
            )
            if publish is not None:
                publish()
            if is_final:
                journal.remove()
        return replace(result, model=answering_model(info, options), is_final=is_final)


def plan_of(coco_json: Location, options: DatasetOptions, share: ParquetShare | None = None) -> DatasetPlan:
    """Returns the rows of a job: those of the file or of a share of it, or the boxes of a detector.

    Raises:
        BadDataset: a file as a whole is unusable.
        ConfigError: `ids` has an id that the file does not have.
    """
    if options.boxes is not None:
        return read_detection_plan(coco_json, options.boxes, options.rules)
    return read_plan(coco_json, options.only, options.ids, share, options.rules)


def _refuse_copied_masks(options: LabelOptions, dataset_options: DatasetOptions) -> None:
    """Raises ConfigError if overlaps should be resolved although some masks are copied, which keep their pixels."""
    if options.resolve_overlaps and dataset_options.only is not RowFilter.ALL:
        raise ConfigError(
            f"--resolve-overlaps (resolve_overlaps=) with --only {dataset_options.only} (only=): masks would overlap "
            "those that are copied; omit one of the two"
        )


def _note_rows(plan: DatasetPlan, notify: OnNotice) -> None:
    """Reports rows of images and categories that are ignored, and boxes of another form."""
    name = redact(plan.head.path)
    for line in ignored_rows(plan.head.notes, name):
        notify(line)
    note = plan.form_note()
    if note is not None:
        notify(f"{name}: {note}")


def _job_sha256(manifest: Mapping[str, Any], options: DatasetOptions) -> str:
    """Returns a hash of all that a part depends on: its manifest, which names local paths, and the form of its rows."""
    form = [str(options.mask_format), options.polygon_tolerance_px, options.update_bbox]
    return hashlib.sha256(json.dumps([dict(manifest), form], sort_keys=True).encode()).hexdigest()


class _DatasetRun:
    """Results of one run: keeps them in the journal and counts progress. Rows go by their index in the file.

    A row that failed in an earlier run is tried again, and counts as done and failed until its new result arrives.

    Attributes:
        plan: the rows.
        pending: rows that need a label.
        results: of all rows.
    """

    def __init__(
        self,
        plan: DatasetPlan,
        journal: Journal,
        options: LabelOptions,
        on_progress: OnProgress | None,
        shard: Shard | None,
    ) -> None:
        self.plan = plan
        has_image = None if shard is None else shard.has_image
        self.results = JobResults(plan, journal, has_image, complete_images=options.resolve_overlaps)
        self.pending = self.results.pending
        self._refused: set[int] = set()
        self._journal = journal
        self._on_progress = on_progress
        self._images_open = self.pending.images_open()
        self._images_before = self.pending.images_total - self._images_open
        # Rows with an error in the file are done; a shard leaves them to the merge.
        reported = plan.actions.count(RowAction.REPORT) if shard is None else 0
        self._boxes_failed = reported + self.results.retried
        self._boxes_done = self._boxes_failed + len(self.pending.to_label) - len(self.pending.indices)

    def add(self, result: ItemResult) -> None:
        """Keeps the result of an item and reports progress."""
        image_error = None if result.error is None else _name_image(result.error, _image_of(self.plan, result.item))
        entries: dict[int, RowResult] = {}
        for index in result.item.boxes:
            error = image_error or result.labels[index].error
            self._count_box(index, is_failed=error is not None)
            if error is None:
                entries[index] = {"label": _fields(result.labels[index])}
            elif error.code == "UNAVAILABLE":
                self.results.unavailable[index] = _failure(error)
            else:
                entries[index] = failed(_failure(error))
        self.results.add(entries)
        self._count_image(int(result.item.key), len(result.item.boxes))
        if self._on_progress is not None:
            self._on_progress(self._progress())

    def refuse_above(self, max_boxes: int) -> None:
        """Refuses the pending boxes of images that have more of them: their overlaps cannot be resolved in parts."""
        for image, rows in self.pending.by_image():
            if len(rows) > max_boxes:
                message = too_many_boxes(self.plan.images[image].file_name, len(rows), max_boxes)
                error = ItemError("INVALID_ARGUMENT", TOO_MANY_BOXES, message)
                boxes = {index: self.plan.box(index) for index in rows}
                self._refused.add(image)
                self.add(ItemResult(WorkItem(str(image), boxes), error=error))

    def is_refused(self, image: int) -> bool:
        """Returns True for an image by its index if its boxes were refused."""
        return image in self._refused

    def shard_result(self, missing: RowFailure) -> DatasetResult:
        """Returns the summary of a shard; its failures are listed when the shards are merged."""
        to_label = self.pending.to_label.tolist()
        labeled = sum("label" in self.results.result(index, missing) for index in to_label)
        return DatasetResult(
            output=self._journal.path,
            errors_file=None,
            labeled=labeled,
            copied=0,
            failed_count=len(to_label) - labeled,
        )

    def _count_box(self, index: int, *, is_failed: bool) -> None:
        if self._journal.has_failure(index):
            self._boxes_failed -= 1
        else:
            self._boxes_done += 1
        self._boxes_failed += is_failed

    def _count_image(self, index: int, boxes: int) -> None:
        self.pending.boxes_left[index] -= boxes
        self._images_open -= not self.pending.boxes_left[index]

    def _progress(self) -> Progress:
        total = self.pending.images_total
        return Progress(
            images_done=total - self._images_open,
            images_total=total,
            boxes_done=self._boxes_done,
            boxes_failed=self._boxes_failed,
            images_before=self._images_before,
        )


def _label_pending(
    run: _DatasetRun,
    servers: JobServers,
    images: JobImages,
    options: LabelOptions,
    on_notice: OnNotice,
) -> ItemError | None:
    """Labels the pending rows.

    Returns:
        The error of the rows without a result when all servers were lost after some results arrived; else None.
    """
    if not len(run.pending.indices):
        return None
    max_boxes = max(1, servers.limits.max_boxes)
    if options.resolve_overlaps:
        run.refuse_above(max_boxes)
    model = answering_model(servers.first, options)

    try:
        with _read_ahead(images.files, _work_items(run, images, max_boxes), images.load) as (items, take):
            dispatcher = MultiServerDispatcher(
                servers.reachable,
                WorkQueue(items, model=model),
                take,
                options,
                on_notice,
                directory=servers,
            )
            with closing(dispatcher.results()) as results:
                for result in results:
                    run.add(result)
    except AllServersLost as lost:
        # A run with the same manifest could only end the same way.
        if not run.results.label_count or isinstance(lost.error, ModelChanged):
            raise lost.error from lost
        return ItemError("UNAVAILABLE", "SERVER_LOST", f"no result before the server was lost: {lost.error}")
    for note in images.notes():
        on_notice(note)
    return None


@contextmanager
def _read_ahead(
    images: ImageFiles, items: Iterator[WorkItem], load: Callable[[WorkItem], EncodedImage]
) -> Iterator[tuple[Iterator[WorkItem], Callable[[WorkItem], EncodedImage]]]:
    """Yields the items and the function that loads the image of one; remote images are read ahead."""
    if not images.is_remote:
        yield items, load
        return
    with ReadAhead(items, load, EncodedImage.size_bytes, lambda item: item.item_id) as ahead:
        yield ahead, ahead.take


def _work_items(run: _DatasetRun, images: JobImages, max_boxes: int) -> Iterator[WorkItem]:
    """Yields one item for each image, or several for an image with more than `max_boxes` boxes, or for a large one.

    The key of an item is the index of its image.
    """
    for image, rows in run.pending.by_image():
        if run.is_refused(image):
            continue
        size = 1 if images.is_large(image) else max_boxes
        for part, first in enumerate(range(0, len(rows), size)):
            item_id = str(image) if part == 0 else f"{image}.part{part}"
            boxes = {index: run.plan.box(index) for index in rows[first : first + size]}
            points = {index: run.plan.points[index] for index in boxes if index in run.plan.points}
            yield WorkItem(item_id, boxes, points=points)


def _image_of(plan: DatasetPlan, item: WorkItem) -> ImageInfo:
    return plan.images[int(item.key)]


def _fields(label: BoxLabel) -> dict[str, Any]:
    if label.rle is None:
        raise ValueError(f"box {label.index}: neither mask nor error")
    return label_fields(label.rle.to_coco(), label.area, label.score, label.flags, label.agreement)


def _failure(error: ItemError) -> RowFailure:
    return RowFailure(error.code, error.reason, error.message)


def _name_image(error: ItemError, image: ImageInfo) -> ItemError:
    """Adds the file name to the error of an image; the server, which does not know it, writes "image"."""
    if image.file_name in error.message:
        return error
    return replace(error, message=f"{image.file_name}: {error.message.removeprefix('image: ')}")
