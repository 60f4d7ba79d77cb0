"""Labels a whole COCO file through one bulk stream: every annotation answered, or listed with the reason why not.

The client reads files and passes their bytes on; only the server decodes. What is held for the length of the job are
the annotations and their run-length codes, never pixels.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from mal.v1 import labeling_pb2_grpc

from mal_client.bulk_call import BulkCall, Item, ItemAnswer
from mal_client.errors import CallTimedOut, ItemError, ServerFailed, ServerUnavailable
from mal_client.files import write_text_atomic
from mal_client.image_call import check_image_size
from mal_client.sources import EncodedImage, not_found, read_file
from mal_client.types import (
    BoxLabel,
    DatasetResult,
    FailedAnnotation,
    LabelOptions,
    ModelRef,
    Progress,
    ServerInfo,
    ServerLimits,
)
from mal_train.errors import MalError, OutputError
from mal_train.labeling.coco import (
    Annotation,
    CocoFile,
    ImageInfo,
    answer_fields,
    by_image,
    error_fields,
    labelled_file,
    read_coco,
    write_json_atomic,
)

if TYPE_CHECKING:
    from mal_client.client import Client

OnProgress = Callable[[Progress], None]


@dataclass
class _Job:
    """What is known so far. Rows are named by their place in the file, since ids may be of any type or missing."""

    coco: CocoFile
    images: dict[str, ImageInfo] = field(default_factory=dict)
    answers: dict[Any, Mapping[str, Any]] = field(default_factory=dict)
    failed: dict[int, ItemError] = field(default_factory=dict)
    images_done: set[str] = field(default_factory=set)
    boxes_done: int = 0
    labelled: int = 0

    def progress(self) -> Progress:
        return Progress(len(self.images_done), len(self.images), self.boxes_done, len(self.failed))


def label_dataset(
    client: Client,
    coco_json: Path,
    images_dir: Path,
    output_json: Path,
    options: LabelOptions,
    *,
    only_missing: bool = False,
    on_progress: OnProgress | None = None,
) -> DatasetResult:
    """See `Client.label_dataset`.

    When the server is lost for good after some answers came, those are written and the rest is listed as failed: a
    later run with `only_missing` on the output takes up what is missing. Lost before any answer, it is an exception.
    """
    coco = read_coco(coco_json)
    check_writable(output_json)
    info = client.server_info()
    keep = {row.id for row in coco.annotations if only_missing and row.id is not None and has_mask(row)}
    job = _Job(coco)
    items = list(_items(job, keep, max(1, info.limits.max_boxes)))
    _note_unusable_rows(job, keep)
    load = image_loader(images_dir, job.images, info.limits)
    call = BulkCall(
        address=client.address,
        items=iter(items),
        load=lambda item: load(item.item_id),
        options=options,
        max_items=info.limits.max_items_in_flight,
        silence_s=client.timeout_s,
    )
    if items:
        _run(client, job, call, on_progress)

    failed = tuple(_failed_rows(job))
    provenance = _provenance(info, call.model or info.model, options)
    write_json_atomic(output_json, labelled_file(coco, job.answers, provenance, keep))
    errors_file = write_errors(output_json, failed)
    copied = len(coco.annotations) - job.labelled - len(failed)
    return DatasetResult(output_json, errors_file, job.labelled, copied, failed, call.model)


def has_mask(row: Annotation) -> bool:
    """Whether a row already holds a mask worth keeping: crowd regions are copied anyway, failed rows hold none."""
    return bool(row.raw.get("segmentation")) and "error" not in row.raw and not row.iscrowd


def check_writable(output_json: Path) -> None:
    """Raises OutputError now rather than after an hour: a folder is missing, or the path is one."""
    if output_json.is_dir():
        raise OutputError(f"{output_json}: is a folder; give the name of a file")
    if not output_json.resolve().parent.is_dir():
        raise OutputError(f"{output_json}: its folder does not exist; make it first")


def image_loader(
    images_dir: Path, images: Mapping[str, ImageInfo], limits: ServerLimits
) -> Callable[[str], EncodedImage]:
    """Reads an item's file as it is stored; BadImage for one that is missing or that the server would not take."""

    def load(item_id: str) -> EncodedImage:
        image = images[item_id]
        path = images_dir / image.file_name
        try:
            check_image_size(path.stat().st_size, limits, str(path))
        except (OSError, ValueError) as error:
            raise not_found(path, error) from None
        width, height = image.size_wh or (0, 0)
        return EncodedImage(read_file(path), width, height)

    return load


@contextmanager
def watchdog(is_silent: Callable[[], bool], cancel: Callable[[], object], every_s: float = 0.5) -> Iterator[None]:
    """Cancels a stream that has gone silent: waiting for a message knows no time limit of its own."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            if is_silent():
                cancel()

    thread = threading.Thread(target=watch, name="mal-client-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def errors_path(output_json: Path) -> Path:
    """Where a job's failures are listed: `out.errors.jsonl` beside `out.json`."""
    return output_json.with_name(f"{output_json.stem}.errors.jsonl")


def write_errors(output_json: Path, failed: tuple[FailedAnnotation, ...]) -> Path | None:
    """Lists failures beside the output, one JSON object a line; removes an earlier list when there are none."""
    path = errors_path(output_json)
    if failed:
        write_text_atomic(path, "".join(f"{json.dumps(row.to_dict())}\n" for row in failed))
        return path
    path.unlink(missing_ok=True)
    return None


def client_version() -> str:
    """Version of the installed distribution; "unknown" when it runs from a source folder that is not installed."""
    try:
        return version("mask-auto-labeler")
    except PackageNotFoundError:
        return "unknown"


def _run(client: Client, job: _Job, call: BulkCall, on_progress: OnProgress | None) -> None:
    """Opens streams until everything is answered or the server is lost."""
    try:
        while not call.done:
            pause_s = _one_stream(client, call, job, on_progress)
            client.pause(pause_s)
    except (ServerUnavailable, CallTimedOut, ServerFailed) as lost:
        if not job.labelled:
            raise
        _give_up(job, call, lost)
    finally:
        call.close()


def _one_stream(client: Client, call: BulkCall, job: _Job, on_progress: OnProgress | None) -> float:
    """Runs one stream to its end; seconds to wait before the next, if one is needed."""
    stub = labeling_pb2_grpc.LabelingServiceStub(client.open_channel())
    stream = stub.LabelImages(call.requests())
    try:
        with watchdog(call.is_silent, stream.cancel):
            for response in stream:
                _take(job, call.absorb(response), on_progress)
        _take(job, call.ended(), on_progress)
    except grpc.RpcError as error:
        return call.broke(error)
    finally:
        stream.cancel()  # type: ignore[no-untyped-call]
    return 0.0


def _items(job: _Job, keep: set[Any], max_boxes: int) -> Iterator[Item]:
    """The annotations to send, image by image; an image with more boxes than the server takes comes in parts."""
    place = {id(row): at for at, row in enumerate(job.coco.annotations)}
    for image, rows in by_image(job.coco):
        boxes = {place[id(row)]: row.box_xywh for row in rows if _is_asked(row, keep)}
        keys = list(boxes)
        for start in range(0, len(keys), max_boxes):
            item_id = str(len(job.images))
            job.images[item_id] = image
            yield Item(item_id, {key: boxes[key] for key in keys[start : start + max_boxes]})


def _is_asked(row: Annotation, keep: set[Any]) -> bool:
    return row.problem is None and not row.iscrowd and row.id not in keep


def _note_unusable_rows(job: _Job, keep: set[Any]) -> None:
    for at, row in enumerate(job.coco.annotations):
        if row.problem is not None and row.id not in keep:
            job.failed[at] = ItemError("INVALID_ARGUMENT", str(row.reason), row.problem)


def _take(job: _Job, answers: list[ItemAnswer], on_progress: OnProgress | None) -> None:
    for answer in answers:
        for key in answer.item.boxes:
            if answer.error is not None:
                _record(job, key, _about_image(answer.error, job.images[answer.item.item_id]))
            else:
                label = answer.labels[key]
                _record(job, key, label if label.error is None else _about_row(label.error, job.coco.annotations[key]))
        job.images_done.add(answer.item.item_id)
        if on_progress is not None:
            on_progress(job.progress())


def _record(job: _Job, at: int, outcome: BoxLabel | ItemError) -> None:
    row = job.coco.annotations[at]
    job.boxes_done += 1
    if isinstance(outcome, BoxLabel) and outcome.rle is not None:
        job.labelled += 1
        job.answers[row.id] = answer_fields(
            outcome.rle.to_coco(), outcome.area, outcome.score, outcome.flags, outcome.agreement
        )
    elif isinstance(outcome, ItemError):
        job.failed[at] = outcome
        job.answers[row.id] = error_fields(outcome.reason or outcome.code, outcome.message)


def _about_image(error: ItemError, image: ImageInfo) -> ItemError:
    """The server knows no file names; its word is about "image"."""
    if image.file_name in error.message:
        return error
    return replace(error, message=f"{image.file_name}: {error.message.removeprefix('image: ')}")


def _about_row(error: ItemError, row: Annotation) -> ItemError:
    """The server counts the boxes of a request; the file has annotation ids."""
    return replace(error, message=f"annotation {row.id!r}: {re.sub(r'^box -?[0-9]+: ', '', error.message)}")


def _give_up(job: _Job, call: BulkCall, lost: MalError) -> None:
    error = ItemError("UNAVAILABLE", "SERVER_LOST", f"not answered before the server was lost: {lost}")
    for item in call.unanswered():
        for key in item.boxes:
            _record(job, key, error)


def _failed_rows(job: _Job) -> Iterator[FailedAnnotation]:
    for at, error in sorted(job.failed.items()):
        row = job.coco.annotations[at]
        image = None if row.image_id is None else job.coco.images.get(row.image_id)
        shown_id = row.raw.get("id") if row.id is None else row.id
        yield FailedAnnotation(shown_id, row.raw.get("image_id"), None if image is None else image.file_name, error)


def _provenance(info: ServerInfo, model: ModelRef, options: LabelOptions) -> dict[str, Any]:
    """What made the masks: enough to make them again."""
    return {
        "model": model.name,
        "checkpoint_sha256": model.checkpoint_sha256,
        "arch": info.arch,
        "crop_size": info.crop_size,
        "margin_rate": info.margin_rate,
        "branch": str(model.branch),
        "thresholds": [options.threshold] * 3 if options.threshold is not None else list(info.mask_thresholds),
        "flip": options.flip,
        "score": "mean foreground probability, not calibrated",
        "precision": info.precision,
        "server_version": info.version,
        "client_version": client_version(),
    }
