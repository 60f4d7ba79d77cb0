"""What load clients send, and what must come back: JPEGs of synthetic scenes, boxes, and the right mask of each box.

A deck is drawn once, kept in a folder, and read by every client process. Needs no torch.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mal.v1 import labeling_pb2, types_pb2
from PIL import Image

from deploy.demo.synthetic import SceneSettings, draw_scene
from mal_train.core.masks.geometry import Box

JPEG_QUALITY = 90

Expect = Callable[[bytes, Sequence[Box]], Sequence[bytes]]
"""COCO counts of the right mask of each box of an encoded picture."""


@dataclass(frozen=True)
class DeckImage:
    """An encoded picture, its size, its boxes, and the COCO counts of the right masks where they are known."""

    content: bytes
    width: int
    height: int
    boxes: tuple[Box, ...]
    counts: tuple[bytes, ...] | None

    def request(self, places: Sequence[int], ids: Sequence[int], options: types_pb2.LabelOptions) -> bytes:
        """A serialized LabelImageRequest for some of the boxes. Serialized, so that clients cost little."""
        instances = []
        for place, one in zip(places, ids, strict=True):
            x, y, width, height = self.boxes[place]
            box = types_pb2.Box(x=x, y=y, width=width, height=height)
            instances.append(types_pb2.Instance(instance_id=one, box=box))
        source = types_pb2.ImageSource(content=self.content, expected_width=self.width, expected_height=self.height)
        return labeling_pb2.LabelImageRequest(image=source, instances=instances, options=options).SerializeToString()

    def is_right(self, place: int, result: types_pb2.InstanceResult) -> bool:
        """Whether a result is the answer to this box: the exact mask where it is known, else one of the right size."""
        if result.status.code or len(result.masks) != 1:
            return False
        rle = result.masks[0].coco_rle
        if (rle.width, rle.height) != (self.width, self.height) or not 0.0 <= result.score <= 1.0:
            return False
        return self.counts is None or rle.counts == self.counts[place]


def draw_deck(pictures: int, boxes: int, seed: int, size: tuple[int, int] = (640, 480)) -> list[DeckImage]:
    """Scenes of (width, height) px as JPEGs, `boxes` boxes each: the objects' own ones, then random ones."""
    width, height = size
    settings = SceneSettings(width=width, height=height, min_objects=3, max_objects=8)
    deck = []
    for at in range(pictures):
        rng = np.random.default_rng((seed, at))
        scene = draw_scene(rng, settings)
        buffer = io.BytesIO()
        Image.fromarray(scene.image).save(buffer, "JPEG", quality=JPEG_QUALITY)
        found: list[Box] = [one.box_xywh() for one in scene.objects][:boxes]
        while len(found) < boxes:
            w, h = (float(v) for v in rng.uniform(24, (width / 2, height / 2)))
            found.append((float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h)), w, h))
        deck.append(DeckImage(buffer.getvalue(), width, height, tuple(found), None))
    return deck


def with_answers(deck: Sequence[DeckImage], expect: Expect) -> list[DeckImage]:
    """The deck with the right masks. Raises ValueError where two boxes of the deck have one mask: a mix-up would pass.

    An empty mask proves nothing either.
    """
    full = [
        DeckImage(one.content, one.width, one.height, one.boxes, tuple(expect(one.content, one.boxes))) for one in deck
    ]
    every = [counts for one in full for counts in one.counts or ()]
    if len(set(every)) != len(every):
        raise ValueError(f"{len(every) - len(set(every))} of {len(every)} boxes share their mask with another")
    return full


def save_deck(deck: Sequence[DeckImage], folder: Path) -> None:
    """Writes the deck for client processes."""
    rows = []
    for at, one in enumerate(deck):
        (folder / f"{at}.jpg").write_bytes(one.content)
        counts = None if one.counts is None else [value.decode("ascii") for value in one.counts]
        rows.append({"width": one.width, "height": one.height, "boxes": one.boxes, "counts": counts})
    (folder / "deck.json").write_text(json.dumps(rows))


def load_deck(folder: Path) -> list[DeckImage]:
    """Reads what `save_deck` wrote."""
    deck = []
    for at, row in enumerate(json.loads((folder / "deck.json").read_text())):
        counts = None if row["counts"] is None else tuple(value.encode("ascii") for value in row["counts"])
        boxes = tuple((x, y, w, h) for x, y, w, h in row["boxes"])
        deck.append(DeckImage((folder / f"{at}.jpg").read_bytes(), row["width"], row["height"], boxes, counts))
    return deck
