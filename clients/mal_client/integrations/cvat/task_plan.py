"""Plans the masks of a CVAT task, one for each rectangle. Pure functions on CVAT's JSON; needs no SDK."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mal_client.types import BoxXywh
from mal_train.core.coco.fields import turn_of
from mal_train.core.errors import ConfigError
from mal_train.core.numbers import finite_number

Json = dict[str, Any]

ANY_TYPE: Final = frozenset({"any", "mask"})
"""Types of labels that accept masks."""


@dataclass(frozen=True)
class Target:
    """A rectangle on one frame that gets a mask.

    Attributes:
        key: name of the rectangle in messages: `shape 12`, or `track 3 on frame 40`.
        frame: number of the frame.
        box: x, y, width, height in px of the frame.
        shape: CVAT's JSON of the mask, without its points and score.
        box_label: fields with which a tight box differs from the mask: label and attributes of the rectangle.
    """

    key: str
    frame: int
    box: BoxXywh
    shape: Json = field(compare=False)
    box_label: Json = field(compare=False, default_factory=dict)


@dataclass(frozen=True)
class SkippedShape:
    """A rectangle that gets no mask, and the reason."""

    key: str
    frame: int
    reason: str


@dataclass(frozen=True)
class TaskPlan:
    """Masks to add to a task.

    Attributes:
        targets: rectangles to label, by frame, then in CVAT's order.
        skipped: rectangles that cannot be labeled.
        other: number of other shapes, tracks and tags, which stay unchanged.
    """

    targets: tuple[Target, ...]
    skipped: tuple[SkippedShape, ...]
    other: int

    def digest(self) -> str:
        """Returns a fingerprint that changes when a rectangle is added, removed or moved."""
        content = json.dumps([[target.key, target.box, target.shape] for target in self.targets], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class LabelMap:
    """Maps the label of a rectangle to the label of its mask; by default they are the same.

    Args:
        labels: labels of the task, as CVAT lists them.
        mask_names: label names of rectangles → label names of their masks.

    Raises:
        ConfigError: the task has no label of a given name.
    """

    def __init__(self, labels: Sequence[Mapping[str, Any]], mask_names: Mapping[str, str]) -> None:
        self._by_id = {int(label["id"]): label for label in labels}
        by_name = {str(label["name"]): label for label in labels}
        for name in (*mask_names, *mask_names.values()):
            if name not in by_name:
                raise ConfigError(f"label {name!r}: not in the task; its labels are {', '.join(sorted(by_name))}")
        self._mask_labels = {int(by_name[source]["id"]): by_name[target] for source, target in mask_names.items()}

    def mask_label(self, label_id: int) -> Mapping[str, Any] | str:
        """Returns the label of a mask; a message if that label does not accept masks."""
        label = self._mask_labels.get(label_id, self._by_id.get(label_id))
        if label is None:
            return f"label ID {label_id}: not in the task"
        label_type = str(label.get("type") or "any")
        if label_type not in ANY_TYPE:
            return (
                f"label {label['name']!r} accepts only shapes of type {label_type}; set its type to any, or choose "
                f"another label for the masks with --label {label['name']}=OTHER"
            )
        return label

    @staticmethod
    def own_attributes(values: Sequence[Mapping[str, Any]]) -> list[Json]:
        """Returns attribute values for another shape of the same label."""
        return [{"spec_id": value["spec_id"], "value": value["value"]} for value in values]

    def attributes(self, label_id: int, values: Sequence[Mapping[str, Any]]) -> list[Json]:
        """Returns attribute values of a rectangle with the attribute IDs of the mask's label, matched by name."""
        target = self._mask_labels.get(label_id)
        if target is None:
            return self.own_attributes(values)
        names = {spec["id"]: spec["name"] for spec in self._by_id[label_id].get("attributes") or []}
        ids = {spec["name"]: spec["id"] for spec in target.get("attributes") or []}
        known = [(ids.get(names.get(value["spec_id"])), value["value"]) for value in values]
        return [{"spec_id": spec_id, "value": value} for spec_id, value in known if spec_id is not None]


def first_free_group(annotations: Mapping[str, Any]) -> int:
    """Returns the lowest group number above all groups in use."""
    rows = (*(annotations.get("shapes") or []), *(annotations.get("tracks") or []))
    return max((int(row.get("group") or 0) for row in rows), default=0) + 1


def make_plan(
    annotations: Mapping[str, Any], labels: LabelMap, deleted_frames: Collection[int], first_group: int
) -> TaskPlan:
    """Plans a mask for each rectangle of a task's annotations.

    The rectangles of a track are those on its key frames, except where the track is outside. CVAT has no tracks of
    masks, so the masks of one track share a group; groups are numbered from `first_group`. The tight boxes that an
    earlier run has added beside its masks stay as they are.
    """
    shapes, tracks = annotations.get("shapes") or [], annotations.get("tracks") or []
    targets: list[Target] = []
    skipped: list[SkippedShape] = []
    other = len(annotations.get("tags") or [])
    rows = [*_shape_rows(shapes), *_track_rows(tracks, first_group)]
    tight = {_place(row["frame"], _tight_points(row)) for _, row in rows if row["type"] == "mask"}
    for key, row in rows:
        is_added = row["source"] == "auto" and _place(row["frame"], row["points"]) in tight
        if row["type"] != "rectangle" or is_added:
            other += 1
            continue
        reason = _skip_reason(row, deleted_frames)
        label = labels.mask_label(row["label_id"])
        if reason is not None or isinstance(label, str):
            skipped.append(SkippedShape(key, row["frame"], reason if reason is not None else str(label)))
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
        box_label = {"label_id": row["label_id"], "attributes": labels.own_attributes(row["attributes"])}
        targets.append(Target(key, row["frame"], (x0, y0, x1 - x0, y1 - y0), shape, box_label))
    targets.sort(key=lambda target: target.frame)
    return TaskPlan(tuple(targets), tuple(skipped), other)


def _tight_points(mask: Json) -> list[float]:
    """Returns left, top, right, bottom of the pixels of a mask, whose `points` end with inclusive corners."""
    left, top, right, bottom = mask["points"][-4:] if len(mask["points"]) > 4 else (0, 0, 0, 0)
    return [left, top, right + 1, bottom + 1]


def _place(frame: int, points: Sequence[float]) -> tuple[float, ...]:
    return (frame, *points)


def _shape_rows(shapes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Json]]:
    for row in shapes:
        yield f"shape {row.get('id')}", _common(row, int(row["label_id"]), int(row.get("group") or 0), [])


def _track_rows(tracks: Sequence[Mapping[str, Any]], first_group: int) -> Iterator[tuple[str, Json]]:
    for index, track in enumerate(sorted(tracks, key=lambda track: int(track.get("id") or 0))):
        for row in track.get("shapes") or []:
            if row.get("outside"):
                continue
            common = _common(row, int(track["label_id"]), first_group + index, track.get("attributes") or [])
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
        "source": row.get("source"),
        "attributes": [*more_attributes, *(row.get("attributes") or [])],
    }


def _skip_reason(row: Json, deleted_frames: Collection[int]) -> str | None:
    if row["frame"] in deleted_frames:
        return "frame was deleted from the task"
    points = row["points"]
    if len(points) != 4 or not all(finite_number(v) is not None for v in points):
        return f"{len(points)} numbers as points; expected left, top, right, bottom"
    x0, y0, x1, y1 = points
    if turn_of((x0, y0, x1 - x0, y1 - y0), row["rotation"]):
        return f"rectangle is rotated by {row['rotation']:g} degrees; draw it without rotation"
    return None
