"""What a CVAT task's annotations ask for: a mask for each rectangle. Pure functions on CVAT's own JSON; no SDK."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mal_client.types import BoxXywh
from mal_train.core.errors import ConfigError

Json = dict[str, Any]

ANY_TYPE: Final = frozenset({"any", "mask"})
"""Types of labels that masks may have."""


@dataclass(frozen=True)
class Target:
    """A rectangle on one frame that gets a mask.

    Attributes:
        key: which it is, for people and for the ledger: `shape 12`, or `track 3 on frame 40`.
        frame: number of the frame.
        box: x, y, width, height in px of the frame.
        shape: the mask's shape as CVAT takes it, but for its points and score.
    """

    key: str
    frame: int
    box: BoxXywh
    shape: Json = field(compare=False)


@dataclass(frozen=True)
class SkippedShape:
    """A rectangle that gets no mask, and why."""

    key: str
    frame: int
    reason: str


@dataclass(frozen=True)
class TaskPlan:
    """Everything that a task asks for.

    Attributes:
        targets: by frame, then in CVAT's order.
        refusals: rectangles without a way to a mask.
        other: shapes, tracks and tags that are no rectangles; they are left alone.
    """

    targets: tuple[Target, ...]
    refusals: tuple[SkippedShape, ...]
    other: int

    def digest(self) -> str:
        """Changes when a rectangle comes, goes or moves."""
        content = json.dumps([[target.key, target.box, target.shape] for target in self.targets], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class LabelMap:
    """Labels of masks from labels of rectangles: the same one, or another by name.

    Args:
        labels: the task's, as CVAT lists them.
        renamed: name of a rectangle's label → name of its mask's.

    Raises:
        ConfigError: a name that the task does not have.
    """

    def __init__(self, labels: Sequence[Mapping[str, Any]], renamed: Mapping[str, str]) -> None:
        self._by_id = {int(label["id"]): label for label in labels}
        by_name = {str(label["name"]): label for label in labels}
        for name in (*renamed, *renamed.values()):
            if name not in by_name:
                raise ConfigError(f"label {name!r}: the task has no such label; it has {', '.join(sorted(by_name))}")
        self._renamed = {int(by_name[source]["id"]): by_name[target] for source, target in renamed.items()}

    def mask_label(self, label_id: int) -> Mapping[str, Any] | str:
        """The label of a mask; a sentence where it takes none."""
        label = self._renamed.get(label_id, self._by_id.get(label_id))
        if label is None:
            return f"its label {label_id} is not among the task's"
        kind = str(label.get("type") or "any")
        if kind not in ANY_TYPE:
            return (
                f"label {label['name']!r} takes shapes of type {kind} alone; set its type to any, or give the masks "
                f"another label with --label {label['name']}=OTHER"
            )
        return label

    def attributes(self, label_id: int, values: Sequence[Mapping[str, Any]]) -> list[Json]:
        """Values of a rectangle's attributes under the ids that they have on the mask's label, matched by name."""
        target = self._renamed.get(label_id)
        if target is None:
            return [{"spec_id": value["spec_id"], "value": value["value"]} for value in values]
        names = {spec["id"]: spec["name"] for spec in self._by_id[label_id].get("attributes", [])}
        ids = {spec["name"]: spec["id"] for spec in target.get("attributes", [])}
        known = [(ids.get(names.get(value["spec_id"])), value["value"]) for value in values]
        return [{"spec_id": spec_id, "value": value} for spec_id, value in known if spec_id is not None]


def first_free_group(annotations: Mapping[str, Any]) -> int:
    """Above all groups that are in use."""
    rows = (*annotations.get("shapes", []), *annotations.get("tracks", []))
    return max((int(row.get("group") or 0) for row in rows), default=0) + 1


def make_plan(
    annotations: Mapping[str, Any], labels: LabelMap, deleted_frames: Collection[int], first_group: int
) -> TaskPlan:
    """What the annotations of a task ask for.

    Rectangles of tracks count on their key frames, where somebody placed them, and not while they are outside. CVAT
    knows no tracks of masks: those of one track share a group, `first_group` and up.
    """
    shapes, tracks = annotations.get("shapes", []), annotations.get("tracks", [])
    targets: list[Target] = []
    refusals: list[SkippedShape] = []
    other = len(annotations.get("tags", []))
    rows = [*_of_shapes(shapes), *_of_tracks(tracks, first_group)]
    for key, row in rows:
        if row["type"] != "rectangle":
            other += 1
            continue
        reason = _refusal(row, deleted_frames)
        label = labels.mask_label(row["label_id"])
        if reason is not None or isinstance(label, str):
            refusals.append(SkippedShape(key, row["frame"], reason if reason is not None else str(label)))
            continue
        x0, y0, x1, y1 = map(float, row["points"])
        shape = {
            "type": "mask",
            "frame": row["frame"],
            "label_id": label["id"],
            "group": row["group"],
            "z_order": row["z_order"],
            "occluded": row["occluded"],
            "source": "auto",
            "attributes": labels.attributes(row["label_id"], row["attributes"]),
        }
        targets.append(Target(key, row["frame"], (x0, y0, x1 - x0, y1 - y0), shape))
    targets.sort(key=lambda target: target.frame)
    return TaskPlan(tuple(targets), tuple(refusals), other)


def _of_shapes(shapes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Json]]:
    for row in shapes:
        yield f"shape {row.get('id')}", _common(row, int(row["label_id"]), int(row.get("group") or 0), [])


def _of_tracks(tracks: Sequence[Mapping[str, Any]], first_group: int) -> Iterator[tuple[str, Json]]:
    for place, track in enumerate(sorted(tracks, key=lambda track: int(track.get("id") or 0))):
        for row in track.get("shapes", []):
            if row.get("outside"):
                continue
            common = _common(row, int(track["label_id"]), first_group + place, track.get("attributes") or [])
            yield f"track {track.get('id')} on frame {row['frame']}", common


def _common(row: Mapping[str, Any], label_id: int, group: int, more_attributes: Sequence[Mapping[str, Any]]) -> Json:
    return {
        "type": row["type"],
        "frame": int(row["frame"]),
        "points": row.get("points") or [],
        "rotation": float(row.get("rotation") or 0.0),
        "label_id": label_id,
        "group": group,
        "z_order": int(row.get("z_order") or 0),
        "occluded": bool(row.get("occluded")),
        "attributes": [*more_attributes, *(row.get("attributes") or [])],
    }


def _refusal(row: Json, deleted_frames: Collection[int]) -> str | None:
    if row["frame"] in deleted_frames:
        return "its frame was deleted from the task"
    if row["rotation"] % 360:
        return f"it is turned by {row['rotation']:g} degrees; draw it upright round the object"
    points = row["points"]
    if len(points) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in points):
        return f"its points are {points}; left, top, right and bottom are needed"
    return None
