"""Boxes of foreign formats become a COCO file: images with their stored sizes, boxes checked, faults listed.

The readers beside this file only parse; what a usable box is, and what becomes of one that is not, is settled here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mal_client.images.image_files import IMAGE_SUFFIXES
from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.masks.images import read_header

BAD_ROW = "BAD_ROW"


@dataclass(frozen=True)
class RowError:
    """Something that was not taken over. `where` is a file, with a line behind a colon where there is one."""

    where: str
    reason: str
    message: str

    def to_dict(self) -> dict[str, str]:
        """One line of the errors file."""
        return {"where": self.where, "reason": self.reason, "message": self.message}


@dataclass(frozen=True)
class BoxRecord:
    """One box as a reader found it.

    Attributes:
        where: file and line, for messages and for the row's `source`.
        file_name: of its picture, below the image folder.
        category: name of its class.
        xyxy: left, top, right, bottom; in px, or as shares of width and height.
        is_share: the numbers are shares in [0, 1].
        stated_wh: width and height of the picture that the file states; None: it does not.
        polygon: x0, y0, x1, y1, … of a known outline, in the unit of xyxy.
        extra: more fields of the COCO row.
    """

    where: str
    file_name: str
    category: str
    xyxy: tuple[float, float, float, float]
    is_share: bool = False
    stated_wh: tuple[int, int] | None = None
    polygon: tuple[float, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConversionResult:
    """A COCO file in memory, and what could not be taken over."""

    coco: dict[str, Any]
    faults: list[RowError]

    @property
    def boxes(self) -> int:
        """Boxes that were taken over."""
        return len(self.coco["annotations"])


def to_coco(
    rows: Iterable[BoxRecord | RowError], images_dir: Path, categories: Iterable[str] = (), pictures: Iterable[str] = ()
) -> ConversionResult:
    """A COCO file of boxes. Every row is in it, or among the faults.

    Args:
        rows: boxes and what readers could not read.
        images_dir: the pictures; sizes are read from their headers.
        categories: names whose order is given; others follow in alphabetical order. Ids count from 1.
        pictures: file names of images that are in the set even without a box.
    """
    maker = _Maker(images_dir)
    taken: list[tuple[BoxRecord, dict[str, Any]]] = []
    faults: list[RowError] = []
    for name in pictures:
        fault = maker.add_picture(name, str(images_dir / name))
        if fault is not None:
            faults.append(fault)
    for row in rows:
        made = row if isinstance(row, RowError) else maker.annotation(row)
        if isinstance(made, RowError):
            faults.append(made)
        elif isinstance(row, BoxRecord):
            taken.append((row, made))
    ordered = list(dict.fromkeys(categories))
    ordered += sorted({row.category for row, _ in taken} - set(ordered))
    ids = {name: at for at, name in enumerate(ordered, start=1)}
    annotations = [
        {"id": at, **made, "category_id": ids[row.category]} for at, (row, made) in enumerate(taken, start=1)
    ]
    coco = {
        "images": list(maker.images.values()),
        "annotations": annotations,
        "categories": [{"id": at, "name": name} for name, at in ids.items()],
    }
    return ConversionResult(coco, faults)


def write_converted(converted: ConversionResult, output_json: Path) -> Path | None:
    """Writes the COCO file, and the faults beside it where there are any; the path of their list."""
    listed = output_json.with_name(f"{output_json.stem}.errors.jsonl")
    write_json_atomic(output_json, converted.coco)
    if not converted.faults:
        listed.unlink(missing_ok=True)
        return None
    with atomic_write(listed) as file:
        file.writelines(json.dumps(fault.to_dict()).encode() + b"\n" for fault in converted.faults)
    return listed


def picture_names(images_dir: Path) -> list[str]:
    """Names of the pictures below a folder, in order. Raises BadDataset when there are none."""
    if not images_dir.is_dir():
        raise BadDataset(f"{images_dir}: no such folder; give the one that holds the pictures")
    found = sorted(
        path.relative_to(images_dir).as_posix()
        for path in images_dir.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not found:
        raise BadDataset(f"{images_dir}: holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def numbers(texts: Iterable[str], names: Iterable[str], where: str) -> tuple[float, ...] | RowError:
    """Finite numbers, or the fault that names the first one that is none."""
    found = []
    for text, name in zip(texts, names, strict=True):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            return RowError(where, BAD_ROW, f"{where}: {name} {text!r}; a finite number is needed")
        found.append(value)
    return tuple(found)


def annotation_files(folder: Path, suffix: str) -> Iterator[Path]:
    """Files below a folder, in order. Raises BadDataset when there are none."""
    found = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file()) if folder.is_dir() else []
    if not found:
        raise BadDataset(f"{folder}: no {suffix} file there; give the folder of the annotations as --labels")
    yield from found


class _Maker:
    """Looks at each picture once."""

    def __init__(self, images_dir: Path) -> None:
        self.images: dict[str, dict[str, Any]] = {}
        self._images_dir = images_dir
        self._faulty: dict[str, str] = {}

    def add_picture(self, name: str, where: str) -> RowError | None:
        if name in self.images:
            return None
        if name not in self._faulty:
            try:
                path = self._images_dir / name
                width, height = read_header(path.read_bytes(), str(path)).size_wh
            except BadImage as fault:
                self._faulty[name] = str(fault)
            except (OSError, ValueError) as fault:
                self._faulty[name] = f"{self._images_dir / name}: cannot be read ({fault})"
            else:
                self.images[name] = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
                return None
        return RowError(where, "BAD_IMAGE", f"{where}: {self._faulty[name]}")

    def annotation(self, row: BoxRecord) -> dict[str, Any] | RowError:
        fault = self.add_picture(row.file_name, row.where)
        if fault is not None:
            return fault
        image = self.images[row.file_name]
        size_wh = (image["width"], image["height"])
        if row.stated_wh is not None and row.stated_wh != size_wh:
            stated = f"stated as {row.stated_wh[0]}x{row.stated_wh[1]} px but stored as {size_wh[0]}x{size_wh[1]}"
            turned = "; it looks rotated by EXIF" if row.stated_wh == size_wh[::-1] else ""
            return RowError(row.where, "IMAGE_SIZE_MISMATCH", f"{row.where}: {row.file_name} is {stated}{turned}")
        scale = size_wh if row.is_share else (1, 1)
        if row.is_share and not all(-0.001 <= value <= 1.001 for value in (*row.xyxy, *row.polygon)):
            text = f"{list(row.xyxy)}; shares of width and height in [0, 1] are needed, not pixels"
            return RowError(row.where, BAD_ROW, f"{row.where}: {text}")
        x0, y0, x1, y1 = (value * scale[at % 2] for at, value in enumerate(row.xyxy))
        if x1 <= x0 or y1 <= y0:
            return RowError(
                row.where, BAD_ROW, f"{row.where}: box from {x0:g}, {y0:g} to {x1:g}, {y1:g} px holds nothing"
            )
        box = [x0, y0, x1 - x0, y1 - y0]
        made: dict[str, Any] = {"image_id": image["id"], "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        if row.polygon:
            made["segmentation"] = [[value * scale[at % 2] for at, value in enumerate(row.polygon)]]
        return {**made, **row.extra, "source": row.where}
