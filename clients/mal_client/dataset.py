"""Labels a whole COCO file through bulk streams: every annotation answered, or listed with the reason why not.

The client reads files and passes their bytes on; only the server decodes. Answers go to a ledger on disk as they come
and from there into the output, so memory holds neither pixels nor masks, and a killed run is taken up where it ended.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mal_client.bulk_call import ItemAnswer
from mal_client.errors import CallTimedOut, ItemError, ServerUnavailable
from mal_client.fleet import Fleet, OnNotice, ServersLost
from mal_client.image_call import check_image_size
from mal_client.ledger import Answer, Ledger, ledger_path
from mal_client.sources import EncodedImage, not_found, read_file
from mal_client.types import (
    FAILED_LISTED,
    WHOLE_FILE,
    BoxLabel,
    DatasetOptions,
    DatasetResult,
    FailedAnnotation,
    LabelOptions,
    MaskFormat,
    ModelRef,
    Progress,
    ServerInfo,
    ServerLimits,
)
from mal_client.version import client_version
from mal_client.work import Plan, Work, read_work
from mal_client.work_pool import WorkPool
from mal_train.atomic import check_writable, replacing
from mal_train.errors import BadDataset, ConfigError
from mal_train.labeling.coco import Annotation, ImageInfo
from mal_train.labeling.coco_output import answer_fields, error_fields, labelled_row
from mal_train.labeling.coco_stream import write_changed
from mal_train.labeling.rle import Rle, run_lengths, to_box

if TYPE_CHECKING:
    from mal_client.client import Client

OnProgress = Callable[[Progress], None]


def label_dataset(
    clients: Sequence[Client],
    coco_json: Path,
    images_dir: Path,
    output_json: Path,
    options: LabelOptions,
    *,
    how: DatasetOptions = WHOLE_FILE,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> DatasetResult:
    """See `Client.label_dataset`; here the work is shared by the servers of several clients.

    Raises:
        ConfigError: the servers do not serve the same; or an unfinished run was another job.
    """
    tell = on_notice or (lambda _: None)
    check_writable(output_json)
    work = read_work(coco_json, how)
    servers = _servers(clients, options, tell)
    provenance = _provenance(servers[0][1], options)
    manifest = _manifest(work, images_dir, how, provenance)
    path = ledger_path(output_json)
    with Ledger(path, work.head.count, manifest, restart=how.restart) as ledger, ExitStack() as cleanup:
        cleanup.callback(_remove_if_empty, ledger)
        job = _Job(work, ledger, on_progress)
        if ledger.label_count:
            tell(f"{path}: going on with an unfinished run; {ledger.label_count} of {work.asked()} boxes are answered")
        fault = _label_rest(job, servers, image_loader(images_dir, servers[0][1].limits), options, tell)
        result = _write(job, output_json, provenance, how, fault)
        if result.is_final:
            ledger.remove()
        return replace(result, model=_model(servers[0][1], options))


def image_loader(images_dir: Path, limits: ServerLimits) -> Callable[[ImageInfo], EncodedImage]:
    """Reads an image's file as it is stored; BadImage for one that is missing or that the server would not take.

    Raises:
        BadDataset: there is no such folder, so that every image would be missing.
    """
    if not images_dir.is_dir():
        raise BadDataset(f"{images_dir}: no such folder; give the one that the file names of the annotations start at")

    def load(image: ImageInfo) -> EncodedImage:
        path = images_dir / image.file_name
        try:
            check_image_size(path.stat().st_size, limits, str(path))
        except (OSError, ValueError) as error:
            raise not_found(path, error) from None
        width, height = image.size_wh or (0, 0)
        return EncodedImage(read_file(path), width, height)

    return load


def errors_path(output_json: Path) -> Path:
    """Where a job's failures are listed: `out.errors.jsonl` beside `out.json`."""
    return output_json.with_name(f"{output_json.stem}.errors.jsonl")


class _Job:
    """What is known so far: answers in the ledger, and what counts for progress. Rows are named by their place."""

    def __init__(self, work: Work, ledger: Ledger, on_progress: OnProgress | None) -> None:
        self.work = work
        self.ledger = ledger
        self.rest = work.remaining(ledger.has_label)
        self.refused: dict[int, ItemError] = {}
        """Rows that the server wanted again too often: failed, but not for good."""
        self._on_progress = on_progress
        self._images_open = self.rest.images_open()
        self._failed = work.plans.count(Plan.FAULTY)

    def take(self, answer: ItemAnswer) -> None:
        """Stores what an item's boxes got."""
        image = self.work.image_of(answer.item.item_id)
        about_image = None if answer.error is None else _about_image(answer.error, image)
        found: dict[int, Answer] = {}
        for at in answer.item.boxes:
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

    def progress(self) -> Progress:
        """How far the job is, with what an unfinished run left."""
        total = self.rest.images_total
        done = self.work.asked() - int(self.rest.boxes_left.sum())
        return Progress(total - self._images_open, total, done, self._failed)

    def _count(self, answer: ItemAnswer) -> None:
        place = int(answer.item.item_id.partition(".")[0])
        self.rest.boxes_left[place] -= len(answer.item.boxes)
        self._images_open -= not self.rest.boxes_left[place]
        if self._on_progress is not None:
            self._on_progress(self.progress())


def _servers(clients: Sequence[Client], options: LabelOptions, tell: OnNotice) -> list[tuple[Client, ServerInfo]]:
    """The servers that answer, all with the same model and settings."""
    servers: list[tuple[Client, ServerInfo]] = []
    faults: list[ServerUnavailable | CallTimedOut] = []
    for client in clients:
        try:
            servers.append((client, client.server_info()))
        except (ServerUnavailable, CallTimedOut) as fault:
            faults.append(fault)
    if not servers:
        raise faults[0]
    for silent in faults:
        tell(f"{silent}; {len(servers)} of {len(clients)} servers begin")
    first, *others = [(client.address, _provenance(info, options)) for client, info in servers]
    for address, provenance in others:
        different = [
            f"{key}: {provenance[key]!r}, not {value!r}" for key, value in first[1].items() if provenance[key] != value
        ]
        if different:
            raise ConfigError(
                f"{address}: serves something else than {first[0]} ({'; '.join(different)}), so their masks would not "
                "belong together; give servers of one checkpoint, version and precision"
            )
    return servers


def _label_rest(
    job: _Job,
    servers: Sequence[tuple[Client, ServerInfo]],
    load: Callable[[ImageInfo], EncodedImage],
    options: LabelOptions,
    tell: OnNotice,
) -> ItemError | None:
    """Labels what is not answered yet; when the servers are lost after some answers came, what to say of the rest."""
    if not len(job.rest.places):
        return None
    limits = [info.limits for _, info in servers]
    pool = WorkPool(
        job.rest.items(max(1, min(limit.max_boxes for limit in limits))), model=_model(servers[0][1], options)
    )
    fleet = Fleet(
        [(client, info.limits.max_items_in_flight) for client, info in servers],
        pool,
        lambda item: load(job.work.image_of(item.item_id)),
        options,
        tell,
    )
    try:
        with closing(fleet.answers()) as answers:
            for answer in answers:
                job.take(answer)
    except ServersLost as lost:
        if not job.ledger.label_count:
            raise lost.fault from lost
        return ItemError("UNAVAILABLE", "SERVER_LOST", f"not answered before the server was lost: {lost.fault}")
    return None


class _Errors:
    """The list of failures: all into the errors file, which is made with the first one, the first ones in memory."""

    def __init__(self, path: Path, on_success: ExitStack) -> None:
        self.count = 0
        self.first: list[FailedAnnotation] = []
        self._path = path
        self._on_success = on_success
        self._file: BinaryIO | None = None

    def add(self, failed: FailedAnnotation) -> None:
        """Lists one more."""
        self.count += 1
        if len(self.first) < FAILED_LISTED:
            self.first.append(failed)
        if self._file is None:
            self._file = self._on_success.enter_context(replacing(self._path))
        self._file.write(json.dumps(failed.to_dict()).encode() + b"\n")


def _write(
    job: _Job, output_json: Path, provenance: Mapping[str, Any], how: DatasetOptions, lost: ItemError | None
) -> DatasetResult:
    """Writes the labelled file and the list of failures beside it."""
    work, ledger, images = job.work, job.ledger, job.work.head.images
    unanswered = lost or ItemError("INTERNAL", "NOT_ANSWERED", "no label was made")
    listed = errors_path(output_json)
    labelled = 0
    with ExitStack() as finish:
        errors = _Errors(listed, finish)

        def change(at: int, row: Any, annotation: Annotation) -> Any:
            nonlocal labelled
            plan = work.plans[at]
            if plan == Plan.FAULTY:
                fault = ItemError("INVALID_ARGUMENT", str(annotation.reason), annotation.problem or "")
            elif plan != Plan.ASK:
                return labelled_row(row, annotation, images, None, is_kept=plan == Plan.KEEP)
            else:
                answer = ledger.answer(at) or {"failed": _parts(job.refused.get(at, unanswered))}
                if "label" in answer:
                    labelled += 1
                    return _labelled(row, annotation, images, answer["label"], how)
                fault = _about_row(ItemError(*answer["failed"]), annotation)
            errors.add(_failed(annotation, images, fault))
            # The words of a faulty row are found again by whoever reads it.
            fields = None if plan == Plan.FAULTY else error_fields(fault.reason or fault.code, fault.message)
            return _formatted(labelled_row(row, annotation, images, fields), how)

        write_changed(work.head, output_json, change, provenance)
    if not errors.count:
        listed.unlink(missing_ok=True)
    return DatasetResult(
        output=output_json,
        errors_file=listed if errors.count else None,
        labelled=labelled,
        copied=work.head.count - labelled - errors.count,
        failed=tuple(errors.first),
        failed_count=errors.count,
        is_final=lost is None and not job.refused,
    )


def _labelled(
    row: Any, annotation: Annotation, images: Mapping[Any, ImageInfo], fields: Mapping[str, Any], how: DatasetOptions
) -> Any:
    changed = _formatted(labelled_row(row, annotation, images, fields), how)
    if how.update_bbox:
        code = fields["segmentation"]
        height, width = code["size"]
        box = to_box(Rle(height, width, code["counts"].encode("ascii")))
        # An empty mask has no box; the user's is better than none.
        return changed if box is None else {**changed, "bbox": list(box)}
    return changed


def _formatted(row: Any, how: DatasetOptions) -> Any:
    """A row that was made here, with its mask in the format that was asked for."""
    code = row.get("segmentation") if isinstance(row, dict) else None
    if how.mask_format is MaskFormat.RLE or not isinstance(code, dict):
        return row
    runs = run_lengths(code["counts"].encode("ascii")).tolist()
    return {**row, "segmentation": {"size": code["size"], "counts": runs}}


def _fields(label: BoxLabel) -> dict[str, Any]:
    if label.rle is None:
        raise ValueError(f"box {label.index}: neither mask nor error")
    return answer_fields(label.rle.to_coco(), label.area, label.score, label.flags, label.agreement)


def _parts(error: ItemError) -> list[str]:
    return [error.code, error.reason, error.message]


def _failed(annotation: Annotation, images: Mapping[Any, ImageInfo], error: ItemError) -> FailedAnnotation:
    image = None if annotation.image_id is None else images.get(annotation.image_id)
    shown_id = annotation.raw.get("id") if annotation.id is None else annotation.id
    return FailedAnnotation(shown_id, annotation.raw.get("image_id"), None if image is None else image.file_name, error)


def _about_image(error: ItemError, image: ImageInfo) -> ItemError:
    """The server knows no file names; its word is about "image"."""
    if image.file_name in error.message:
        return error
    return replace(error, message=f"{image.file_name}: {error.message.removeprefix('image: ')}")


def _about_row(error: ItemError, row: Annotation) -> ItemError:
    """The server counts the boxes of a request; the file has annotation ids."""
    found = re.match(r"box -?[0-9]+: ", error.message)
    return error if found is None else replace(error, message=f"annotation {row.id!r}: {error.message[found.end() :]}")


def _remove_if_empty(ledger: Ledger) -> None:
    """A run that ended before its first answer leaves nothing behind."""
    if not ledger.label_count:
        ledger.remove()


def _model(info: ServerInfo, options: LabelOptions) -> ModelRef:
    """Which weights and network answer these options."""
    return info.model if options.branch is None else replace(info.model, branch=options.branch)


def _manifest(work: Work, images_dir: Path, how: DatasetOptions, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers of a job depend on; `update_bbox` and the like only change how they are written."""
    return {
        "input_sha256": work.head.sha256,
        "images": os.path.realpath(images_dir),
        "only": str(how.only),
        "ids": sorted(map(repr, how.ids)),
        **provenance,
    }


def _provenance(info: ServerInfo, options: LabelOptions) -> dict[str, Any]:
    """What made the masks: enough to make them again."""
    model = _model(info, options)
    return {
        "model": model.name,
        "checkpoint_sha256": model.checkpoint_sha256,
        "arch": info.arch,
        "crop_size": info.crop_size,
        "margin_rate": info.margin_rate,
        "branch": str(model.branch),
        "thresholds": [options.threshold] * 3 if options.threshold is not None else list(info.mask_thresholds),
        "flip": options.flip,
        "min_component_area_px": options.min_component_area_px,
        "score": info.score_meaning,
        "precision": info.precision,
        "server_version": info.version,
        "client_version": client_version(),
    }
