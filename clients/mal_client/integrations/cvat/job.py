"""Adds masks for the rectangles of a CVAT task, frame by frame, in small batches; resumes an interrupted run.

The journal stores each mask before it is sent and a confirmation after CVAT accepted it. If a run is killed between the
two, the next run sends the mask only if the task does not have it. Masks are added and nothing else is changed; a copy
of the original annotations is saved beside the journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Final, Protocol

from mal_client.client import Client
from mal_client.dataset.provenance import provenance_of
from mal_client.errors import ServerError
from mal_client.integrations.cvat.mask_encoding import mask_points
from mal_client.integrations.cvat.schema import check_annotations, check_labels
from mal_client.integrations.cvat.task_plan import (
    Json,
    LabelMap,
    SkippedShape,
    Target,
    TaskPlan,
    first_free_group,
    make_plan,
)
from mal_client.integrations.missing_mask import missing_mask_reason
from mal_client.types import BoxLabel, LabelOptions, Progress
from mal_train.core.coco.journal import Journal, RowFailure, RowResult, failed
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.errors import BadImage, ConfigError, InputError
from mal_train.core.images.header import read_header

FRAMES_AT_ONCE: Final = 4
"""Frames fetched and labeled concurrently."""

MASKS_PER_CALL: Final = 50
"""Masks sent to CVAT per call; most of the time of a call does not depend on their number."""


class CvatClient(Protocol):
    """A task on a CVAT server."""

    @property
    def name(self) -> str:
        """Server and task, unique among all tasks."""
        ...

    def annotations(self) -> Json:
        """Returns shapes, tracks and tags, as the server's JSON."""
        ...

    def labels(self) -> list[Json]:
        """Returns the labels of the task with their attributes."""
        ...

    def deleted_frames(self) -> frozenset[int]:
        """Returns the numbers of the frames that were deleted from the task."""
        ...

    def frame_sizes(self) -> list[tuple[int, int]]:
        """Returns (width, height) of each frame as CVAT displays it; a video has a single entry."""
        ...

    def frame(self, number: int) -> bytes:
        """Returns an encoded frame in its original quality."""
        ...

    def create(self, shapes: Sequence[Json]) -> None:
        """Adds shapes to the annotations of the task."""
        ...


@dataclass
class JobResult:
    """Outcome of a run.

    Attributes:
        plan: the plan of the task.
        written: masks added by this run.
        existing: masks added by earlier runs.
        skipped: rectangles without a mask, including those of the plan.
        changed: annotations that were changed or removed during the run, which means that another user edited the task.
    """

    plan: TaskPlan
    written: int = 0
    existing: int = 0
    skipped: list[SkippedShape] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def label_task(
    cvat: CvatClient,
    client: Client,
    journal_file: Path,
    options: LabelOptions,
    *,
    label_names: Mapping[str, str] | None = None,
    tight_boxes: bool = False,
    restart: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> JobResult:
    """Adds the masks of a task's rectangles.

    Args:
        cvat: the task.
        client: client of the labeling server.
        journal_file: journal of the run.
        options: labeling options.
        label_names: label names of rectangles → label names of their masks; by default they are the same.
        tight_boxes: also add the tight box of each mask, with the label of the rectangle.
        restart: discard the journal of an earlier run.
        on_progress: called after each frame.

    Raises:
        ConfigError: the journal belongs to another job, or a label name is unknown.
        InvalidRequest: the server does not support the options.
        OutputError: the journal cannot be written, or another run uses it.
        ClientError: the labeling server was lost; the masks added so far remain.
    """
    before = check_annotations(cvat.annotations())
    backup_file = journal_file.with_name(f"{journal_file.name}.before.json")
    # Group numbers follow those of the original annotations, so that a resumed run assigns the same ones.
    original = check_annotations(_read_backup(backup_file)) if backup_file.exists() and not restart else before
    plan = fetch_plan(cvat, before, label_names, first_group=first_free_group(original))
    provenance = provenance_of(client.server_info().for_options(options), options)
    manifest = {"task": cvat.name, "rectangles": plan.digest(), **provenance}
    if tight_boxes:
        manifest["tight_boxes"] = True
    result = JobResult(plan, skipped=list(plan.skipped))
    with Journal(journal_file, len(plan.targets), manifest, restart=restart) as journal:
        if not backup_file.exists() or restart:
            write_json_atomic(backup_file, before)
        run = _Run(cvat, client, journal, options=options, result=result, before=before, tight_boxes=tight_boxes)
        run.label_all(on_progress)
    result.changed = _changed(before, check_annotations(cvat.annotations()))
    return result


def _read_backup(path: Path) -> Any:
    """Reads the original annotations that an earlier run saved. Raises ConfigError."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not the annotations of an earlier run ({error}); move or delete it") from None


def fetch_plan(
    cvat: CvatClient, annotations: Json, label_names: Mapping[str, str] | None, first_group: int
) -> TaskPlan:
    """Fetches the labels and deleted frames of a task and plans its masks; changes nothing."""
    labels = LabelMap(check_labels(cvat.labels()), label_names or {})
    return make_plan(check_annotations(annotations), labels, cvat.deleted_frames(), first_group)


class _Run:
    """One run over the targets of a plan."""

    def __init__(
        self,
        cvat: CvatClient,
        client: Client,
        journal: Journal,
        *,
        options: LabelOptions,
        result: JobResult,
        before: Json,
        tight_boxes: bool,
    ) -> None:
        self._cvat = cvat
        self._client = client
        self._journal = journal
        self._options = options
        self._tight_boxes = tight_boxes
        self._result = result
        self._sizes = cvat.frame_sizes()
        self._existing = {_identity(row) for row in before.get("shapes") or [] if row.get("type") == "mask"}
        self._unsent: dict[int, Json] = {}

    def label_all(self, on_progress: Callable[[Progress], None] | None) -> None:
        targets = self._result.plan.targets
        by_frame = [list(group) for _, group in groupby(enumerate(targets), key=lambda pair: pair[1].frame)]
        frames = iter(by_frame)
        done = boxes = 0
        with ThreadPoolExecutor(FRAMES_AT_ONCE) as pool:
            while chunk := list(islice(frames, FRAMES_AT_ONCE)):
                for group, outcomes in zip(chunk, pool.map(self._label_frame, chunk), strict=True):
                    self._record(outcomes)
                    done, boxes = done + 1, boxes + len(group)
                    if len(self._unsent) >= MASKS_PER_CALL:
                        self._send()
                    if on_progress is not None:
                        on_progress(Progress(done, len(by_frame), boxes, len(self._result.skipped)))
        self._send()

    def _label_frame(self, group: Sequence[tuple[int, Target]]) -> list[tuple[int, Target, Json | str]]:
        """Labels the rectangles of one frame that the journal lacks.

        Returns (index, rectangle, outcome) of all rectangles; an outcome is a shape, or the reason for its absence.
        """
        missing = [(index, target) for index, target in group if not self._journal.has_label(index)]
        outcomes: list[tuple[int, Target, Json | str]] = [
            (index, target, _stored(entry["label"], self._journal.path))
            for index, target in group
            if self._journal.has_label(index) and (entry := self._journal.result(index)) is not None
        ]
        if not missing:
            return outcomes
        try:
            image_bytes = self._frame(missing[0][1].frame)
            labels = self._client.label_image(image_bytes, [target.box for _, target in missing], self._options)
        except InputError as error:
            return outcomes + [(index, target, str(error)) for index, target in missing]
        return outcomes + [
            (index, target, _shape(target, label)) for (index, target), label in zip(missing, labels, strict=True)
        ]

    def _frame(self, number: int) -> bytes:
        image_bytes = self._cvat.frame(number)
        header = read_header(image_bytes, f"frame {number}")
        index = number if len(self._sizes) > 1 else 0
        if not 0 <= index < len(self._sizes):
            raise BadImage(f"frame {number}: not a frame of the task, which has {len(self._sizes)}", "IMAGE_NOT_FOUND")
        displayed = self._sizes[index]
        if header.orientation != 1 or header.size_wh != displayed:
            raise BadImage(
                f"frame {number}: CVAT displays {displayed[0]}x{displayed[1]} px, but the file has "
                f"{header.size_wh[0]}x{header.size_wh[1]} px and EXIF orientation {header.orientation}, so masks would "
                "be misplaced; store the images upright and create the task again",
                "IMAGE_SIZE_MISMATCH",
            )
        return image_bytes

    def _record(self, outcomes: Sequence[tuple[int, Target, Json | str]]) -> None:
        entries: dict[int, RowResult] = {}
        for index, target, outcome in outcomes:
            if isinstance(outcome, str):
                self._result.skipped.append(SkippedShape(target.key, target.frame, outcome))
                entries[index] = failed(RowFailure("", "NO_MASK", outcome))
            elif "sent" in outcome or _identity(outcome) in self._existing:
                self._result.existing += 1
            else:
                self._unsent[index] = outcome
                entries[index] = {"label": outcome}
        # Before anything is sent: if the run dies during the call, the next one knows which masks may have arrived.
        if entries:
            self._journal.append(entries)

    def _send(self) -> None:
        if not self._unsent:
            return
        shapes = list(self._unsent.values())
        if self._tight_boxes:
            targets = self._result.plan.targets
            shapes += [_tight_box(targets[index], mask) for index, mask in self._unsent.items()]
        self._cvat.create(shapes)
        self._journal.append({index: {"label": {"sent": True}} for index in self._unsent})
        self._result.written += len(self._unsent)
        self._unsent = {}


def _shape(target: Target, label: BoxLabel) -> Json | str:
    reason = missing_mask_reason(label)
    if reason is not None or label.rle is None:
        return str(reason)
    return {**target.shape, "points": mask_points(label.rle), "score": round(label.score, 4)}


def _tight_box(target: Target, mask: Json) -> Json:
    """Returns the rectangle around the pixels of a mask, whose `points` end with inclusive corners."""
    left, top, right, bottom = mask["points"][-4:]
    rectangle = {key: value for key, value in mask.items() if key != "score"} | target.box_label
    return {**rectangle, "type": "rectangle", "points": [left, top, right + 1, bottom + 1]}


def _stored(label: Mapping[str, Any], path: Path) -> Json:
    """Returns a label of the journal: a shape, or the note that it was sent. Raises ConfigError for anything else."""
    shape = dict(label)
    if shape.get("sent") is not True:
        try:
            check_annotations({"shapes": [shape]})
        except ServerError:
            raise ConfigError(f"{path}: holds a result that is no mask of this task; move or delete the file") from None
    return shape


def _identity(shape: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the values that identify a mask; CVAT returns points as floats."""
    return shape["frame"], shape["label_id"], tuple(map(int, shape.get("points") or []))


def _changed(before: Json, after: Json) -> list[str]:
    return [
        f"{field_name[:-1]} {row.get('id')}"
        for field_name in ("shapes", "tracks", "tags")
        for row in _missing(before.get(field_name) or [], after.get(field_name) or [])
    ]


def _missing(before: Sequence[Json], after: Sequence[Json]) -> Iterator[Json]:
    present = {row.get("id"): json.dumps(row, sort_keys=True) for row in after}
    return (row for row in before if present.get(row.get("id")) != json.dumps(row, sort_keys=True))
