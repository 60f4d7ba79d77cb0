"""A CVAT task in memory; its JSON has the shape of version 2.80."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30
Json = dict[str, Any]

LABELS: list[Json] = [
    {
        "id": 11,
        "name": "cup",
        "type": "any",
        "color": "#fa3253",
        "attributes": [
            {"id": 1, "name": "color", "mutable": False, "input_type": "text", "default_value": "", "values": [""]}
        ],
        "sublabels": [],
    },
    {"id": 12, "name": "crate", "type": "rectangle", "color": "#33ddff", "attributes": [], "sublabels": []},
    {
        "id": 13,
        "name": "crate mask",
        "type": "mask",
        "color": "#34d1b7",
        "attributes": [
            {"id": 5, "name": "color", "mutable": False, "input_type": "text", "default_value": "", "values": [""]}
        ],
        "sublabels": [],
    },
]


def rectangle(number: int, frame: int, points: list[float], **change: Any) -> Json:
    """Returns a rectangle as the server sends it."""
    return {
        "type": "rectangle",
        "occluded": False,
        "outside": False,
        "z_order": 0,
        "rotation": 0.0,
        "points": points,
        "id": number,
        "frame": frame,
        "label_id": 11,
        "group": 0,
        "source": "manual",
        "attributes": [],
        "elements": [],
        "score": 1.0,
        **change,
    }


def track(number: int, shapes: Sequence[Json], **change: Any) -> Json:
    """Returns a track of rectangles."""
    keys = ("type", "occluded", "outside", "z_order", "rotation", "points", "id", "frame", "attributes")
    rows = [{key: shape[key] for key in keys} for shape in shapes]
    return {
        "id": number,
        "frame": rows[0]["frame"],
        "label_id": 11,
        "group": 0,
        "source": "manual",
        "attributes": [],
        "elements": [],
        "shapes": rows,
        **change,
    }


def tag(number: int, frame: int) -> Json:
    """Returns a tag of a frame."""
    return {"id": number, "frame": frame, "label_id": 11, "group": 0, "source": "manual", "attributes": []}


class TaskInMemory:
    """A task with six frames; `create` assigns IDs. `fail_creates` and `lose_responses` count calls to fail."""

    name = "memory task 7"

    def __init__(self, shapes: Sequence[Json], tracks: Sequence[Json] = (), tags: Sequence[Json] = ()) -> None:
        self.content: Json = {"version": 1, "shapes": list(shapes), "tracks": list(tracks), "tags": list(tags)}
        self.deleted: frozenset[int] = frozenset()
        self.orientation = 1
        self.size_wh = (WIDTH, HEIGHT)
        self.fail_creates = 0
        self.lose_responses = 0
        self.create_calls: list[int] = []
        self._next_id = 1000

    def annotations(self) -> Json:
        """Returns a copy of the annotations."""
        return {
            key: [dict(row) for row in rows] if isinstance(rows, list) else rows for key, rows in self.content.items()
        }

    def labels(self) -> list[Json]:
        """Returns three labels."""
        return LABELS

    def deleted_frames(self) -> frozenset[int]:
        """Returns the attribute `deleted`."""
        return self.deleted

    def frame_sizes(self) -> list[tuple[int, int]]:
        """Returns the sizes of six frames."""
        return [(WIDTH, HEIGHT)] * 6

    def frame(self, number: int) -> bytes:
        """Returns a gray image."""
        return encoded(number, self.size_wh, self.orientation)

    def create(self, shapes: Sequence[Json]) -> None:
        """Adds all shapes or none; the response can be lost after they were added."""
        if self.fail_creates:
            self.fail_creates -= 1
            raise ConnectionError("refused")
        self.create_calls.append(len(shapes))
        for shape in shapes:
            self._next_id += 1
            points = [float(value) for value in shape["points"]]
            row = rectangle(self._next_id, shape["frame"], points)
            self.content["shapes"].append(row | shape | {"points": points})
        if self.lose_responses:
            self.lose_responses -= 1
            raise ConnectionError("response lost")

    def masks(self) -> list[Json]:
        """Returns the shapes of type mask."""
        return [row for row in self.content["shapes"] if row["type"] == "mask"]


def encoded(number: int, size_wh: tuple[int, int] = (WIDTH, HEIGHT), orientation: int = 1) -> bytes:
    """Returns the encoded image of a frame."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    gray = np.full((size_wh[1], size_wh[0], 3), 40 * number % 256, dtype=np.uint8)
    Image.fromarray(gray).save(buffer, format="PNG", exif=exif)
    return buffer.getvalue()
