"""Maps the columns of a table of boxes to their meaning; recognizes the usual names and Open Images' header."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from mal_client.formats.boxes import BAD_ROW, BoxRecord, EmptyImage, Row, RowError, parse_numbers
from mal_client.formats.class_names import ClassNames
from mal_client.formats.label_files import FindImage, only_image
from mal_train.core.errors import BadDataset
from mal_train.core.numbers import counted

FILE: Final = ("file_name", "filename", "file", "image", "image_name", "image_path", "path")
IMAGE_ID: Final = ("imageid", "image_id")
CATEGORY: Final = ("category", "class", "class_name", "label", "name", "category_name", "labelname", "label_name",
                   "category_id", "class_id", "label_id")  # fmt: skip
CORNERS: Final = (("x_min", "xmin", "x1", "left"), ("y_min", "ymin", "y1", "top"), ("x_max", "xmax", "x2", "right"),
                  ("y_max", "ymax", "y2", "bottom"))  # fmt: skip
SIZES: Final = (("x", "bbox_x", "left", "x_min", "xmin"), ("y", "bbox_y", "top", "y_min", "ymin"),
                ("width", "w", "bbox_width", "bbox_w"), ("height", "h", "bbox_height", "bbox_h"))  # fmt: skip
IMAGE_SIZE: Final = (("image_width", "img_width", "imagewidth", "image_w"),
                     ("image_height", "img_height", "imageheight", "image_h"))  # fmt: skip
SCORE: Final = ("score", "confidence", "conf", "probability")

_BOOLEANS: Final = {"true": 1.0, "false": 0.0}

# Of Open Images: 1 yes, 0 no, -1 unknown. A box of a group is one of many objects.
OPEN_IMAGES: Final = {
    "isoccluded": "is_occluded",
    "istruncated": "is_truncated",
    "isdepiction": "is_depiction",
    "isinside": "is_inside",
    "isgroupof": "is_group_of",
}
GROUP: Final = "is_group_of"

DEFAULT_CATEGORY: Final = "object"


class Columns:
    """Columns of a table.

    Args:
        name: the file, for messages.
        header: names of the columns, in lower case.
        classes: names of classes by number or identifier; None: the cells are names.
        find_image: finds an image by its name without suffix.

    Attributes:
        is_open_images: the header is Open Images'; its numbers are shares.
        is_size_of_box: width and height are those of the box, not of the image; None: no row has shown it yet.
        unread: names of the columns that are not read.

    Raises:
        BadDataset: a column is missing or repeated.
    """

    def __init__(self, name: str, header: list[str], classes: ClassNames | None, find_image: FindImage) -> None:
        self._header = header
        self._classes = classes
        self._find_image = find_image
        self._file, self._image_id = _index_of(header, FILE), _index_of(header, IMAGE_ID)
        self._category = _index_of(header, CATEGORY)
        self.is_open_images = {"imageid", "labelname", "xmin", "xmax", "ymin", "ymax"} <= set(header)
        self._score = None if self.is_open_images else _index_of(header, SCORE)
        corners = [_index_of(header, names) for names in CORNERS]
        sizes = [_index_of(header, names) for names in SIZES]
        # Corners win: such tables often also have the width and height of the image.
        self._is_corners = None not in corners
        box = corners if self._is_corners else sizes
        if (self._file is None and self._image_id is None) or None in box:
            raise BadDataset(
                f"{name}: columns {', '.join(header) or '(none)'}; expected file_name and x_min, y_min, x_max, "
                "y_max or x, y, width, height; for a file without a header, give --columns"
            )
        named = [column for column in header if column]
        if len(set(named)) != len(named):
            raise BadDataset(f"{name}: column names are not unique: {', '.join(header)}")
        self._box = [index for index in box if index is not None]
        image_size = [_index_of(header, names) for names in IMAGE_SIZE]
        self._has_image_size = None not in image_size
        self.is_size_of_box: bool | None = False
        if not self._has_image_size and self._is_corners:
            image_size = sizes[2:]
            self.is_size_of_box = False if None in image_size else None
        self._size = [] if None in image_size else [index for index in image_size if index is not None]
        self._extra = [index for index, column in enumerate(header) if column in OPEN_IMAGES]
        read = {*self._box, *self._size, *self._extra, self._file, self._category, self._score}
        if self._file is None:
            read.add(self._image_id)
        self.unread = [column for index, column in enumerate(header) if column and index not in read]

    def decide_size(self, row: list[str]) -> None:
        """Decides what width and height beside corners are, if a row shows it."""
        try:
            x0, y0, x1, y1, width, height = self._numbers(row, [*self._box, *self._size])
        except (ValueError, IndexError):
            return
        is_of_box = abs(width - (x1 - x0)) <= 1 and abs(height - (y1 - y0)) <= 1
        # An image of this size would not hold the box.
        is_too_small = x1 > width + 1 or y1 > height + 1
        if width and height and is_of_box is is_too_small:
            self.is_size_of_box = is_of_box

    def read(self, row: list[str], where: str) -> Row:
        """Returns the box of a row, with its numbers as they are; or an image without boxes, or the error."""
        try:
            return self._read(row, where)
        except ValueError as error:
            return RowError(where, BAD_ROW, f"{where}: {error}")

    def _read(self, row: list[str], where: str) -> Row:
        if len(row) != len(self._header):
            raise ValueError(f"{counted(len(row), 'column')}; expected {len(self._header)}")
        file_name = self._image_of(row, where)
        if isinstance(file_name, RowError):
            return file_name
        category = DEFAULT_CATEGORY if self._category is None else row[self._category].strip()
        is_classless = self._category is None or not category
        if is_classless and not any(row[index].strip() for index in self._box):
            return EmptyImage(where, file_name)
        a, b, c, d = self._numbers(row, self._box)
        xyxy = (a, b, c, d) if self._is_corners else (a, b, a + c, b + d)
        stated_wh = self._stated_wh(row, xyxy)
        return BoxRecord(
            where, file_name, self._class_of(category), xyxy, stated_wh=stated_wh, extra=self._extra_of(row)
        )

    def _image_of(self, row: list[str], where: str) -> str | RowError:
        index = self._image_id if self._file is None else self._file
        name = row[index or 0]
        bare = name.strip()
        if not bare:
            raise ValueError("file name is empty")
        if name != bare and (found := self._found_with_spaces(name, bare)):
            return only_image(where, name, found)
        return bare if self._file is not None else only_image(where, bare, self._find_image(bare))

    def _found_with_spaces(self, name: str, bare: str) -> list[str]:
        """Returns the images of a name with the spaces around it, if there are any.

        Spaces before it may also belong to the delimiter, so that images without them may be meant, too.
        """
        is_exact = self._file is not None
        names = (name, bare) if name[0].isspace() else (name,)
        found = [[image for image in self._find_image(text) if image == text or not is_exact] for text in names]
        return [image for images in found for image in images] if found[0] else []

    def _class_of(self, category: str) -> str:
        if not category:
            raise ValueError("class is empty")
        if self._classes is None or self._category is None:
            return category
        known = self._classes.find(category)
        if known is None:
            raise ValueError(f"class {category[:100]!r} is not in {self._classes.path}")
        return known

    def _numbers(self, row: list[str], indices: Sequence[int]) -> tuple[float, ...]:
        names = (self._header[index] for index in indices)
        values = parse_numbers((row[index].strip() for index in indices), names, "")
        if isinstance(values, RowError):
            raise ValueError(values.message.removeprefix(": "))
        return values

    def _stated_wh(self, row: list[str], xyxy: tuple[float, float, float, float]) -> tuple[int, int] | None:
        """Returns the size of the image that a row states; None if it states none, or that of the box."""
        if self.is_size_of_box or not self._size or not any(row[index].strip() for index in self._size):
            return None
        width, height = self._numbers(row, self._size)
        if not (width.is_integer() and height.is_integer() and width >= 0 and height >= 0):
            raise ValueError(f"size {width:g} x {height:g}; expected whole numbers of pixels")
        return (int(width), int(height)) if width and height else None

    def _extra_of(self, row: list[str]) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        for index in self._extra:
            if text := row[index].strip():
                extra[OPEN_IMAGES[self._header[index]]] = _flag_of(text, self._header[index])
        if extra.get(GROUP) == 1:
            extra["iscrowd"] = 1
        if self._score is not None and row[self._score].strip():
            extra["score"] = self._numbers(row, [self._score])[0]
        return extra


def _flag_of(text: str, name: str) -> int:
    """Returns -1 (unknown), 0 or 1; tables that passed through other tools have `1.0` or `True`."""
    try:
        number = _BOOLEANS[text.lower()] if text.lower() in _BOOLEANS else float(text)
    except ValueError:
        number = math.nan
    if number not in (-1, 0, 1):
        raise ValueError(f"{name} {text[:40]!r}; expected -1, 0 or 1")
    return int(number)


def _index_of(header: list[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)
