"""Converts boxes of other formats to a COCO file: reads image sizes, validates boxes and lists errors.

The readers in this folder only parse; this module decides which boxes are valid and reports the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mal_client.formats.rotated import extent, is_rectangle, is_upright
from mal_client.images.image_files import IMAGE_SUFFIXES, ImageFiles
from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.json_file import errors_path
from mal_train.core.coco.stream import write_coco
from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.images.container import ImageHeader
from mal_train.core.images.header import read_header
from mal_train.core.masks.rle import area, from_segmentation
from mal_train.core.numbers import number_of
from mal_train.core.settings import RotatedBoxes
from mal_train.core.storage.addresses import Location, redact
from mal_train.core.storage.read_ahead import ReadAhead

BAD_ROW: Final = "BAD_ROW"
BAD_IMAGE: Final = "BAD_IMAGE"
BAD_FILE: Final = "BAD_FILE"

SHARE_TOLERANCE: Final = 0.001
"""A share of width or height may leave [0, 1] by this much; other tools round."""

SHARE_ROUNDING: Final = 1e-6
"""Error of an edge, as a share of a side, if its center and size have six decimals: at most 0.75 of the last one."""

ROUNDING_PX: Final = 0.01
"""Distance from the image below which an edge that was computed from shares is that of the image."""


@dataclass(frozen=True)
class RowError:
    """An item that was not converted.

    Attributes:
        where: a file, followed by a colon and a line if it has one.
        reason: a code such as BAD_ROW.
        message: a sentence for the user, which begins with `where`.
        images: file names of the images that it may describe. Those without any box are left out of the COCO file: as
            images without boxes, they would state that they show no object.
    """

    where: str
    reason: str
    message: str
    images: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, str]:
        """Returns one line of the errors file."""
        return {"where": self.where, "reason": self.reason, "message": self.message}


@dataclass(frozen=True)
class BoxRecord:
    """One box as a reader parsed it.

    Attributes:
        where: file and line, for messages and for the field `source` of the COCO row.
        file_name: its image, relative to the image folder.
        category: name of its class.
        xyxy: left, top, right, bottom; in px, or as shares of width and height.
        is_normalized: all numbers are shares of width and height.
        stated_wh: width and height of the image as the annotation states them, 0 for one that it does not; None if it
            states neither.
        polygon: x0, y0, x1, y1, … of an outline, in the unit of xyxy; empty if there is none.
        corners: x0, y0, … x3, y3 of a box that may be rotated, in the unit of xyxy; empty if it cannot be. With a
            polygon of the same points, it is a rotated box only if it is a rectangle.
        keypoints: x, y, visibility of each key point, x and y in the unit of xyxy.
        segmentation: in place of an outline, the `segmentation` of the COCO row, in px; None if there is none.
        is_displayed: positions are those of the image as browsers display it, with its EXIF orientation applied.
        extra: additional fields of the COCO row.
    """

    where: str
    file_name: str
    category: str
    xyxy: tuple[float, float, float, float]
    is_normalized: bool = False
    stated_wh: tuple[int, int] | None = None
    polygon: tuple[float, ...] = ()
    corners: tuple[float, ...] = ()
    keypoints: tuple[float, ...] = ()
    segmentation: Any = None
    is_displayed: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EmptyImage:
    """A row that states an image without boxes."""

    where: str
    file_name: str


Row = BoxRecord | EmptyImage | RowError


@dataclass(frozen=True)
class ConversionResult:
    """A COCO file in memory, and the errors of the items that it lacks.

    Attributes:
        coco: the members of the file.
        errors: the items that it lacks.
        undescribed: file names of images in `coco` that no row and no error describes; they have no boxes.
    """

    coco: dict[str, Any]
    errors: list[RowError]
    undescribed: list[str] = field(default_factory=list)

    @property
    def boxes(self) -> int:
        """Number of converted boxes."""
        return len(self.coco["annotations"])


def to_coco(
    rows: Iterable[Row],
    images: ImageFiles | Location,
    categories: Iterable[str] = (),
    file_names: Iterable[str] = (),
    rotated: RotatedBoxes = RotatedBoxes.REFUSE,
) -> ConversionResult:
    """Builds a COCO file. Each row becomes an annotation, an image without boxes, or an error.

    An image that has errors and no annotation is left out.

    Args:
        rows: boxes, images without boxes, and the errors of their reader.
        images: folder or address of the images; sizes are read from their headers, remote ones several at a time. If
            several names lead to one file, each is an error, except its own.
        categories: category names in the order of their IDs, from 1; other categories follow alphabetically.
        file_names: images to include even if they have no box.
        rotated: treatment of rotated boxes; of one that is taken, the corners are kept as `rotated_box`.
    """
    files = ImageFiles.of(images)
    builder = _CocoBuilder(files, rotated)
    converted: list[tuple[BoxRecord, dict[str, Any]]] = []
    errors: list[RowError] = []
    names, rows = list(file_names), list(rows)
    described = {row.file_name: None for row in rows if not isinstance(row, RowError)}
    used = dict.fromkeys([*names, *described])
    files.expect(lambda: used)
    if files.is_remote:  # read ahead; a local file is read when its row comes
        builder.read_sizes(used)
    for name in names:
        error = builder.add_image(name, f"{files.name}/{name}")
        if error is not None:
            errors.append(error)
    refused: set[str] = set()
    for row in rows:
        result = row if isinstance(row, RowError) else builder.add(row)
        if isinstance(result, RowError):
            errors.append(result)
            refused.update(row.images if isinstance(row, RowError) else (row.file_name,))
        elif isinstance(row, BoxRecord) and result is not None:
            converted.append((row, result))
    builder.remove(refused.difference(row.file_name for row, _ in converted))
    known = list(dict.fromkeys(categories))
    known += sorted({row.category for row, _ in converted} - set(known))
    ids = {name: category_id for category_id, name in enumerate(known, start=1)}
    annotations = [
        {"id": annotation_id, **annotation, "category_id": ids[row.category]}
        for annotation_id, (row, annotation) in enumerate(converted, start=1)
    ]
    coco = {
        "images": list(builder.images.values()),
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for name, category_id in ids.items()],
    }
    return ConversionResult(coco, errors, [name for name in builder.images if name not in described])


def write_result(result: ConversionResult, output_json: Path) -> Path | None:
    """Writes the COCO file, and its errors beside it; returns the path of the errors file, None without errors."""
    write_coco(output_json, result.coco)
    return write_errors(result.errors, output_json)


def write_errors(errors: Sequence[RowError], output_json: Path) -> Path | None:
    """Writes the errors of a COCO file beside it; returns their path, or deletes those of an earlier run: None."""
    errors_file = errors_path(output_json)
    if not errors:
        errors_file.unlink(missing_ok=True)
        return None
    with atomic_write(errors_file) as file:
        file.writelines(json.dumps(error.to_dict()).encode() + b"\n" for error in errors)
    return errors_file


def image_names(files: ImageFiles) -> list[str]:
    """Returns the sorted names of the image files below a folder or prefix.

    Raises:
        BadDataset: there are none.
        StorageError, StoreUnreachable: the store cannot be listed; web servers have no list.
    """
    names = sorted(files.names())
    if not names:
        raise BadDataset(f"{files.name}: contains no image file ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return names


def parse_numbers(texts: Iterable[str], names: Iterable[str], where: str) -> tuple[float, ...] | RowError:
    """Parses finite numbers; returns an error that names the first text that is not one."""
    values = []
    for text, name in zip(texts, names, strict=True):
        value = number_of(text)
        if value is None:
            point = " with a decimal point, not a comma" if "," in text else ""
            return RowError(where, BAD_ROW, f"{where}: {name} {text!r}; expected a finite number{point}")
        values.append(value)
    return tuple(values)


def check_shares(values: Iterable[float], where: str) -> RowError | None:
    """Returns an error unless all values are shares of width or height, in [0, 1]."""
    outside = next((value for value in values if not abs(value - 0.5) <= 0.5 + SHARE_TOLERANCE), None)
    if outside is None:
        return None
    text = f"{outside:g}; expected shares of width and height in [0, 1], not pixels"
    return RowError(where, BAD_ROW, f"{where}: {text}")


def _outline_area(polygon: list[float], size_wh: tuple[int, int], where: str) -> int | RowError:
    """Returns the number of pixels in an outline, the `area` of COCO; an error for an outline without any."""
    try:
        pixels = area(from_segmentation([polygon], size_wh[1], size_wh[0], "outline"))
    except BadDataset as error:
        return RowError(where, BAD_ROW, f"{where}: {error}")
    if pixels:
        return pixels
    x0, y0, x1, y1 = extent(polygon)
    text = f"outline from {x0:g}, {y0:g} to {x1:g}, {y1:g} px has no pixel of the image"
    return RowError(where, BAD_ROW, f"{where}: {text}")


def _without_rounding(position_px: float, side_px: int) -> float:
    """Returns the edge of the image for a position that exceeds it by no more than rounding explains.

    >>> _without_rounding(-0.0002, 500), _without_rounding(500.0002, 500), _without_rounding(-0.02, 500)
    (0.0, 500.0, -0.02)
    """
    nearest = min(max(position_px, 0.0), float(side_px))
    return nearest if abs(position_px - nearest) <= max(ROUNDING_PX, SHARE_ROUNDING * side_px) else position_px


def are_shares(values: Iterable[float]) -> bool:
    """Returns True for numbers that all lie in [0, 1]: as pixels, their box would be a pixel wide at most."""
    return all(0 <= value <= 1 for value in values)


class _CocoBuilder:
    """Builds rows of a COCO file; reads the header of each image once."""

    def __init__(self, files: ImageFiles, rotated: RotatedBoxes) -> None:
        self.images: dict[str, dict[str, Any]] = {}
        self._files = files
        self._rotated = rotated
        self._headers: dict[str, ImageHeader | BadImage] = {}

    def read_sizes(self, names: Iterable[str]) -> None:
        """Reads the size of each image ahead of `add_image`, several at a time."""
        with ReadAhead(dict.fromkeys(names), self._read_header, lambda _: 0, str) as ahead:
            for name in ahead:
                self._headers[name] = ahead.take(name)

    def _read_header(self, name: str) -> ImageHeader | BadImage:
        try:
            return read_header(self._files.read(name), redact(self._files.locate(name)))
        except BadImage as error:
            return error

    def add_image(self, name: str, where: str) -> RowError | None:
        if name in self.images:
            return None
        if name not in self._headers:
            self._headers[name] = self._read_header(name)
        header = self._headers[name]
        if isinstance(header, BadImage):
            return RowError(where, BAD_IMAGE, f"{where}: {header}")
        width, height = header.size_wh
        self.images[name] = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
        return None

    def remove(self, names: Iterable[str]) -> None:
        """Removes images, as far as they were added."""
        for name in names:
            self.images.pop(name, None)

    def add(self, row: BoxRecord | EmptyImage) -> dict[str, Any] | RowError | None:
        """Adds the image of a row; returns the annotation of a box, or the error of the row."""
        error = self.add_image(row.file_name, row.where)
        if error is not None or isinstance(row, EmptyImage):
            return error
        return self._annotation(row, self.images[row.file_name])

    def _annotation(self, row: BoxRecord, image: Mapping[str, Any]) -> dict[str, Any] | RowError:
        size_wh = (image["width"], image["height"])
        mismatch = self._mismatch(row, size_wh)
        if mismatch is not None:
            return RowError(row.where, "IMAGE_SIZE_MISMATCH", f"{row.where}: {row.file_name}: {mismatch}")

        def in_px(values: tuple[float, ...]) -> list[float]:
            scale_xy = size_wh if row.is_normalized else (1, 1)
            return [value * scale_xy[index % 2] for index, value in enumerate(values)]

        x0, y0, x1, y1 = in_px(row.xyxy)
        if row.is_normalized:
            x0, x1 = (_without_rounding(x, size_wh[0]) for x in (x0, x1))
            y0, y1 = (_without_rounding(y, size_wh[1]) for y in (y0, y1))
        if x1 <= x0 or y1 <= y0:
            return RowError(
                row.where, BAD_ROW, f"{row.where}: box from {x0:g}, {y0:g} to {x1:g}, {y1:g} px has no area"
            )
        box = [x0, y0, x1 - x0, y1 - y0]
        if not math.isfinite(box[2] * box[3]):
            return RowError(row.where, BAD_ROW, f"{row.where}: box {box}; its numbers are too large for an area")
        annotation: dict[str, Any] = {"image_id": image["id"], "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        corners, polygon = in_px(row.corners), in_px(row.polygon)
        if corners and not is_upright(corners) and (not polygon or is_rectangle(corners)):
            if self._rotated is RotatedBoxes.REFUSE:
                text = "rotated box; --rotated-boxes upright takes the upright box around it"
                more = ", --rows segments the outline as it is" if polygon else ""
                return RowError(row.where, "BOX_ROTATED", f"{row.where}: {text}{more}")
            annotation["rotated_box"] = corners
        elif polygon:
            pixels = _outline_area(polygon, size_wh, row.where)
            if isinstance(pixels, RowError):
                return pixels
            annotation |= {"segmentation": [polygon], "area": pixels}
        if row.segmentation is not None:
            annotation["segmentation"] = row.segmentation
        if row.keypoints:
            xs, ys, visibility = row.keypoints[::3], row.keypoints[1::3], row.keypoints[2::3]
            points = in_px(tuple(value for point in zip(xs, ys, strict=True) for value in point))
            annotation["keypoints"] = [
                value for x, y, v in zip(points[::2], points[1::2], visibility, strict=True) for value in (x, y, v)
            ]
            annotation["num_keypoints"] = sum(v > 0 for v in visibility)
        return {**annotation, **row.extra, "source": row.where}

    def _mismatch(self, row: BoxRecord, size_wh: tuple[int, int]) -> str | None:
        """Returns why the positions of a row are not those of the image file; None if they are."""
        header = self._headers[row.file_name]
        sides = zip(row.stated_wh or size_wh, size_wh, strict=True)
        if row.stated_wh is not None and any(side not in (0, actual) for side, actual in sides):
            width, height = (side or "?" for side in row.stated_wh)
            stated = f"annotation states {width}x{height} px, file is {size_wh[0]}x{size_wh[1]} px"
            is_swapped = row.stated_wh == size_wh[::-1]
            if is_swapped and isinstance(header, ImageHeader):
                return f"{stated}; {header.reason_of_swap()}"
            return f"{stated}; give the annotated images with --images"
        if row.is_displayed and isinstance(header, ImageHeader) and header.orientation != 1:
            return f"EXIF orientation {header.orientation}: the tool displayed the image rotated; store it upright"
        return None
