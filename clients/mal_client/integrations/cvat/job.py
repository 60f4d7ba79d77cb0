"""Gives the rectangles of a CVAT task their masks: frame by frame, in small batches, from where an earlier run ended.

The ledger holds each mask before it is sent and a word after CVAT took it. A run that was killed between the two looks
whether the mask is there, and sends it only when it is not. Nothing on the server is changed but by adding masks; the
annotations as they were are kept beside the ledger all the same.
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
from mal_client.dataset.journal import Journal
from mal_client.dataset.provenance import provenance_of
from mal_client.integrations.cvat.mask_encoding import mask_points
from mal_client.integrations.cvat.task_plan import (
    Json,
    LabelMap,
    SkippedShape,
    Target,
    TaskPlan,
    first_free_group,
    make_plan,
)
from mal_client.types import BoxLabel, LabelOptions, Progress
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.errors import BadImage, InputError
from mal_train.core.masks.images import read_header

FRAMES_AT_ONCE: Final = 4
"""Frames that are fetched and labeled side by side."""

MASKS_A_CALL: Final = 50
"""Masks of one call to CVAT, whose own work a call is mostly."""


class CvatClient(Protocol):
    """A task on a CVAT server. `name` tells it from all others."""

    @property
    def name(self) -> str:
        """Server and task."""
        ...

    def annotations(self) -> Json:
        """Shapes, tracks and tags, as the server's JSON."""
        ...

    def labels(self) -> list[Json]:
        """The task's labels with their attributes."""
        ...

    def deleted_frames(self) -> frozenset[int]:
        """Frames that were deleted from the task."""
        ...

    def frame_sizes(self) -> list[tuple[int, int]]:
        """Width and height of the frames as CVAT's page shows them, by number; one entry for all frames of a video."""
        ...

    def frame(self, number: int) -> bytes:
        """An encoded frame in its original quality."""
        ...

    def create(self, shapes: Sequence[Json]) -> None:
        """Adds shapes."""
        ...


@dataclass
class JobResult:
    """What a run left behind.

    Attributes:
        plan: what the task asked for.
        written: masks that this run added.
        already: masks that an earlier run had added.
        refusals: rectangles without a mask, those of the plan included.
        changed: annotations that were there at the start and are not there, or not the same, at the end: somebody
            else was at work on the task.
    """

    plan: TaskPlan
    written: int = 0
    already: int = 0
    refusals: list[SkippedShape] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def label_task(
    site: CvatClient,
    client: Client,
    ledger_file: Path,
    options: LabelOptions,
    *,
    renamed: Mapping[str, str] | None = None,
    restart: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> JobResult:
    """Adds the masks of a task's rectangles.

    Raises:
        ConfigError: the ledger is that of another job, or a label name is unknown.
        RequestRefused: the server does not serve what the options ask for.
        OutputError: the ledger cannot be written, or another run is at work on it.
        ClientError: the labeling server was lost; what was done stays done.
    """
    before = site.annotations()
    kept = ledger_file.with_name(f"{ledger_file.name}.before.json")
    # Numbers of groups come from the annotations as they were: those of masks written since would push them up.
    at_first = json.loads(kept.read_bytes()) if kept.exists() and not restart else before
    plan = plan_of(site, before, renamed, first_group=first_free_group(at_first))
    made_by = provenance_of(client.server_info().for_options(options), options)
    manifest = {"task": site.name, "rectangles": plan.digest(), **made_by}
    result = JobResult(plan, refusals=list(plan.refusals))
    with Journal(ledger_file, len(plan.targets), manifest, restart=restart) as ledger:
        if not kept.exists() or restart:
            write_json_atomic(kept, before)
        _Run(site, client, ledger, options=options, result=result, before=before).work(on_progress)
    result.changed = _changed(before, site.annotations())
    return result


def plan_of(site: CvatClient, annotations: Json, renamed: Mapping[str, str] | None, first_group: int) -> TaskPlan:
    """What a task asks for; changes nothing."""
    return make_plan(annotations, LabelMap(site.labels(), renamed or {}), site.deleted_frames(), first_group)


class _Run:
    def __init__(
        self,
        site: CvatClient,
        client: Client,
        ledger: Journal,
        *,
        options: LabelOptions,
        result: JobResult,
        before: Json,
    ) -> None:
        self._site = site
        self._client = client
        self._ledger = ledger
        self._options = options
        self._result = result
        self._sizes = site.frame_sizes()
        self._there = {_identity(row) for row in before.get("shapes", []) if row.get("type") == "mask"}
        self._waiting: dict[int, Json] = {}

    def work(self, on_progress: Callable[[Progress], None] | None) -> None:
        targets = self._result.plan.targets
        by_frame = [list(group) for _, group in groupby(enumerate(targets), key=lambda pair: pair[1].frame)]
        frames = iter(by_frame)
        done = boxes = 0
        with ThreadPoolExecutor(FRAMES_AT_ONCE) as pool:
            while some := list(islice(frames, FRAMES_AT_ONCE)):
                for group, answers in zip(some, pool.map(self._label, some), strict=True):
                    self._take(answers)
                    done, boxes = done + 1, boxes + len(group)
                    if len(self._waiting) >= MASKS_A_CALL:
                        self._send()
                    if on_progress is not None:
                        on_progress(Progress(done, len(by_frame), boxes, len(self._result.refusals)))
        self._send()

    def _label(self, group: Sequence[tuple[int, Target]]) -> list[tuple[int, Target, Json | str]]:
        """(place, rectangle, shape or why there is none) of the rectangles of one frame that have no mask yet."""
        asked = [(at, target) for at, target in group if not self._ledger.has_label(at)]
        known: list[tuple[int, Target, Json | str]] = [
            (at, target, dict(answer["label"]))
            for at, target in group
            if self._ledger.has_label(at) and (answer := self._ledger.result(at)) is not None
        ]
        if not asked:
            return known
        try:
            content = self._frame(asked[0][1].frame)
            labels = self._client.label_image(content, [target.box for _, target in asked], self._options)
        except InputError as error:
            return known + [(at, target, str(error)) for at, target in asked]
        return known + [(at, target, _shape(target, label)) for (at, target), label in zip(asked, labels, strict=True)]

    def _frame(self, number: int) -> bytes:
        content = self._site.frame(number)
        header = read_header(content, f"frame {number}")
        shown = self._sizes[number if len(self._sizes) > 1 else 0]
        if header.orientation != 1 or header.size_wh != shown:
            raise BadImage(
                f"frame {number}: CVAT shows {shown[0]}x{shown[1]} px but the file is stored as "
                f"{header.size_wh[0]}x{header.size_wh[1]} with EXIF orientation {header.orientation}; masks would land "
                "elsewhere: store the images upright and make the task anew",
                "IMAGE_SIZE_MISMATCH",
            )
        return content

    def _take(self, answers: Sequence[tuple[int, Target, Json | str]]) -> None:
        fresh: dict[int, dict[str, Any]] = {}
        for at, target, answer in answers:
            if isinstance(answer, str):
                self._result.refusals.append(SkippedShape(target.key, target.frame, answer))
                fresh[at] = {"failed": answer}
            elif "sent" in answer or _identity(answer) in self._there:
                self._result.already += 1
            else:
                self._waiting[at] = answer
                fresh[at] = {"label": answer}
        # Before anything is sent: a run that dies in the call then knows what may have arrived.
        if fresh:
            self._ledger.append(fresh)

    def _send(self) -> None:
        if not self._waiting:
            return
        self._site.create(list(self._waiting.values()))
        self._ledger.append({at: {"label": {"sent": True}} for at in self._waiting})
        self._result.written += len(self._waiting)
        self._waiting = {}


def _shape(target: Target, label: BoxLabel) -> Json | str:
    if label.error is not None:
        return str(label.error)
    if not label.area or label.rle is None:
        return "the mask is empty: no pixel of the box reached the threshold"
    return {**target.shape, "points": mask_points(label.rle), "score": round(label.score, 4)}


def _identity(shape: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one mask from another; CVAT gives points back as floats."""
    return shape["frame"], shape["label_id"], tuple(map(int, shape["points"]))


def _changed(before: Json, after: Json) -> list[str]:
    return [
        f"{kind[:-1]} {row['id']}"
        for kind in ("shapes", "tracks", "tags")
        for row in _missing(before.get(kind, []), after.get(kind, []))
    ]


def _missing(before: Sequence[Json], after: Sequence[Json]) -> Iterator[Json]:
    there = {row.get("id"): json.dumps(row, sort_keys=True) for row in after}
    return (row for row in before if there.get(row.get("id")) != json.dumps(row, sort_keys=True))
