"""The masks of a labeled COCO file, image by image, for the writers of foreign formats beside this file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mal_client.formats.boxes import RowError
from mal_train.core.coco.annotations import Annotation, CocoFile, ImageInfo, by_image, read_coco
from mal_train.core.errors import BadDataset, OutputError
from mal_train.core.masks.encodings import to_polygons
from mal_train.core.masks.polygons import Ring
from mal_train.core.masks.rle import Rle, from_segmentation


@dataclass(frozen=True)
class MaskRow:
    """One labeled object.

    Attributes:
        row: as the file holds it.
        category: name of its class.
        category_at: place of that in the file's list, from 0.
        rle: the mask; it has pixels.
        rings: the same as closed lines.
    """

    row: dict[str, Any]
    category: str
    category_at: int
    rle: Rle
    rings: tuple[Ring, ...]


@dataclass
class Export:
    """What an export came to.

    Attributes:
        written: objects.
        crowds: crowd regions, which no format here can say, left out.
        faults: everything else that was left out.
    """

    written: int = 0
    crowds: int = 0
    faults: list[RowError] = field(default_factory=list)


class MaskFile:
    """A labeled COCO file.

    Args:
        path: the file.
        tolerance_px: of the rings; 0 = exact.

    Raises:
        BadDataset: it is unusable as a whole.
    """

    def __init__(self, path: Path, tolerance_px: float = 0.0) -> None:
        self._coco: CocoFile = read_coco(path)
        self._tolerance_px = tolerance_px
        self.names = list(self._coco.category_names.values())
        self._places = {category_id: at for at, category_id in enumerate(self._coco.category_names)}
        self.export = Export()
        for row in self._coco.annotations:
            if row.image_id is None or row.image_id not in self._coco.images:
                self._leave_out(row, row.problem or "no image")

    def images(self) -> Iterator[tuple[ImageInfo, list[MaskRow]]]:
        """Every image whose size the file states, with its objects; what is left out is noted in `export`."""
        for image, rows in by_image(self._coco):
            size_wh = image.size_wh
            if image.problem is not None or size_wh is None:
                text = image.problem or f"image {image.id!r}: the file does not state its width and height"
                self.export.faults.append(RowError(image.file_name, "IMAGE_UNUSABLE", text))
                continue
            found = [self._mask_row(row, size_wh) for row in rows]
            kept = [row for row in found if row is not None]
            self.export.written += len(kept)
            yield image, kept

    def _mask_row(self, row: Annotation, size_wh: tuple[int, int]) -> MaskRow | None:
        if row.iscrowd:
            self.export.crowds += 1
            return None
        error = row.raw.get("error")
        if row.problem is not None or row.category_id is None or error:
            self._leave_out(row, row.problem or f"annotation {row.id!r}: was not labeled ({error})")
            return None
        try:
            rle = from_segmentation(row.raw.get("segmentation"), size_wh[1], size_wh[0], f"annotation {row.id!r}")
        except BadDataset as fault:
            self._leave_out(row, str(fault))
            return None
        rings = to_polygons(rle, self._tolerance_px).rings
        if not rings:
            self._leave_out(row, f"annotation {row.id!r}: its mask is empty")
            return None
        place = self._places[row.category_id]
        return MaskRow(dict(row.raw), self.names[place], place, rle, rings)

    def _leave_out(self, row: Annotation, text: str) -> None:
        self.export.faults.append(RowError(f"annotation {row.id!r}", str(row.reason or "NO_MASK"), text))


class LabelFiles:
    """Where the labels of each picture go: a file below a folder, named as the picture is; what has none is a fault.

    Args:
        folder: holds all of them. No file name leads out of it, since a COCO file may come from anywhere.
        suffix: of the files, with its dot.
        export: notes the faults.
    """

    def __init__(self, folder: Path, suffix: str, export: Export) -> None:
        self._folder = folder
        self._suffix = suffix
        self._export = export
        self._taken: dict[PurePosixPath, str] = {}

    def path(self, image: ImageInfo, rows: Sequence[MaskRow]) -> Path | None:
        """The file for a picture's labels; None when they cannot be written, so that `rows` count as left out."""
        name = PurePosixPath(image.file_name)
        if name.is_absolute() or ".." in name.parts or not name.name:
            self.leave_out(image, rows, "NAME_OUTSIDE", f"its labels would not lie below {self._folder}")
            return None
        below = name.with_suffix(self._suffix)
        if below in self._taken:
            text = f"its labels would have the same name as those of {self._taken[below]}; rename one"
            self.leave_out(image, rows, "NAME_TAKEN", text)
            return None
        self._taken[below] = image.file_name
        return self._folder / below

    def leave_out(self, image: ImageInfo, rows: Sequence[MaskRow], reason: str, text: str) -> None:
        """Counts the rows of a picture, for whose labels there is no file, as left out."""
        self._export.written -= len(rows)
        self._export.faults.append(
            RowError(image.file_name, reason, f"{image.file_name}: {text.removeprefix(f'{image.file_name}: ')}")
        )


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, with the folders above it. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path}: not written ({error.strerror})") from error
