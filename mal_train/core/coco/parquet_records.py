"""Packs the JSON rows of a COCO file into typed columns, and restores them exactly.

Of an object, each value that fits its typed column exactly is stored there. The others are stored as one JSON object in
`extra`. `layout` is a JSON object that maps each key, in the row's order, to the form of its value:

- `""`: in `extra`
- `n`: null
- `i`, `f`, `b`: integer, float or boolean in a column of numbers; `bbox` has one letter for each of its four numbers
- `s`: text, a list of texts, or an error of reason and message
- `j`: JSON text in the column of that name
- `=`: the id of the image of this row

A row that is not an object has no layout; `extra` is its JSON value.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, repeat
from typing import Any, Final

from mal_train.core.coco.json_values import MAX_NESTING, is_too_deep

MAX_LAYOUTS: Final = 4096
"""Number of layouts that are kept parsed; a file of one exporter has a few dozens."""

_EXACT_INT: Final = 1 << 53
"""Integers up to this size are exact as float64."""
_NO_IMAGE: Final = object()


@dataclass(frozen=True, slots=True)
class Column:
    """A typed column of a record.

    Attributes:
        fit: returns the form of a value that is not null; "" if the column cannot hold it.
        forms: all forms in the column.
    """

    fit: Callable[[Any], str]
    forms: frozenset[str]


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One row of the parquet form: an image with its annotations.

    Attributes:
        index: position in the list `images`, from 0; None in a row for annotations whose image is not in the file.
        image: JSON value of the entry of `images`; None without an image.
        annotations: (position in the list `annotations`, JSON value) of each annotation.
    """

    index: int | None
    image: Any
    annotations: Sequence[tuple[int, Any]]


class BadRecord(ValueError):
    """Columns that are not those of a packed row. The reader adds file and row."""


def _fits_integer(bits: int) -> Callable[[Any], str]:
    bound = 1 << (bits - 1)
    return lambda value: "i" if type(value) is int and -bound <= value < bound else ""


def _fits_crowd(value: Any) -> str:
    return "b" if type(value) is bool else "i" if type(value) is int and -128 <= value < 128 else ""


def _fits_number(value: Any) -> str:
    return "f" if type(value) is float else "i" if type(value) is int and abs(value) <= _EXACT_INT else ""


def _fits_text(value: Any) -> str:
    return "s" if type(value) is str and _is_utf8(value) else ""


def _fits_texts(value: Any) -> str:
    return "s" if type(value) is list and all(map(_fits_text, value)) else ""


def _fits_error(value: Any) -> str:
    is_error = type(value) is dict and list(value) == ["reason", "message"]
    return "s" if is_error and all(map(_fits_text, value.values())) else ""


def _fits_box(value: Any) -> str:
    if type(value) is not list or len(value) != 4:
        return ""
    forms = "".join(map(_fits_number, value))
    return forms if len(forms) == 4 else ""


def _fits_json(_value: Any) -> str:
    return "j"


def _is_utf8(text: str) -> bool:
    """Returns False for text with half of a surrogate pair, which JSON can hold and parquet cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _integers(bits: int) -> Column:
    return Column(_fits_integer(bits), frozenset("ni"))


_NUMBERS: Final = Column(_fits_number, frozenset("nif"))
_TEXT: Final = Column(_fits_text, frozenset("ns"))
_ERROR: Final = Column(_fits_error, frozenset("ns"))
_BOX_FORMS: Final = frozenset(map("".join, product("if", repeat=4)))

IMAGE_COLUMNS: Final[Mapping[str, Column]] = {
    "id": _integers(64),
    "file_name": _TEXT,
    "width": _integers(32),
    "height": _integers(32),
    "error": _ERROR,
}
ANNOTATION_COLUMNS: Final[Mapping[str, Column]] = {
    "id": _integers(64),
    "category_id": _integers(64),
    "bbox": Column(_fits_box, _BOX_FORMS | {"n"}),
    "iscrowd": Column(_fits_crowd, frozenset("nib")),
    "area": _NUMBERS,
    "segmentation": Column(_fits_json, frozenset("nj")),
    "score": _NUMBERS,
    "agreement": _NUMBERS,
    "flags": Column(_fits_texts, frozenset("ns")),
    "error": _ERROR,
}


class RecordColumns:
    """Columns of packed rows, filled row by row.

    Args:
        columns: the typed columns.

    Attributes:
        cells: values of each typed column, and of `extra` and `layout`.
        text_chars: characters of the long texts, a measure of the memory.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.cells: dict[str, list[Any]] = {name: [] for name in (*columns, "extra", "layout")}
        self.text_chars = 0
        self._columns = columns
        self._layouts: dict[tuple[tuple[str, str], ...], str] = {}

    def append(self, value: Any, image_id: Any = _NO_IMAGE) -> None:
        """Adds one row.

        Args:
            value: its JSON value.
            image_id: for an annotation, the id of its row's image.
        """
        if type(value) is not dict:
            self._append({}, json.dumps(value), None)
            return
        forms: list[tuple[str, str]] = []
        stored: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, item in value.items():
            form = self._form(key, item, image_id)
            forms.append((key, form))
            if form == "j":
                stored[key] = json.dumps(item)
            elif form == "":
                extra[key] = item
            elif form != "=":
                stored[key] = int(item) if form == "b" else item
        self._append(stored, json.dumps(extra) if extra else None, self._layout(tuple(forms)))

    def _append(self, stored: Mapping[str, Any], extra: str | None, layout: str | None) -> None:
        for name in self._columns:
            self.cells[name].append(stored.get(name))
        self.cells["extra"].append(extra)
        self.cells["layout"].append(layout)
        self.text_chars += sum(map(len, (extra or "", stored.get("segmentation") or "", stored.get("file_name") or "")))

    def _form(self, key: str, item: Any, image_id: Any) -> str:
        column = self._columns.get(key)
        if column is not None:
            return "n" if item is None else column.fit(item)
        # Compared with its type: 1, 1.0 and true are equal in Python. NaN is not equal to itself, and lies in `extra`.
        is_image_id = key == "image_id" and type(item) is type(image_id) and item == image_id
        return "=" if is_image_id and isinstance(item, int | float | str) else ""

    def _layout(self, forms: tuple[tuple[str, str], ...]) -> str:
        text = self._layouts.get(forms)
        if text is None:
            text = json.dumps(dict(forms), separators=(",", ":"))
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            self._layouts[forms] = text
        return text


class RecordReader:
    """Restores rows from their columns.

    Args:
        columns: the typed columns.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns = columns
        self._places = {name: place for place, name in enumerate((*columns, "extra", "layout"))}
        self._layouts: dict[str, list[_Step]] = {}

    def rows(self, cells: Mapping[str, Sequence[Any]], image_ids: Sequence[Any] | None = None) -> Iterator[Any]:
        """Yields the JSON value of each row.

        Args:
            cells: values of each typed column, and of `extra` and `layout`.
            image_ids: for annotations, the id of each row's image.

        Raises:
            BadRecord: the columns do not agree with the layout.
        """
        packed = zip(*(cells[name] for name in self._places), strict=True)
        for values, image_id in zip(packed, repeat(None) if image_ids is None else image_ids, strict=False):
            yield self._row(values, image_id)

    def _row(self, values: tuple[Any, ...], image_id: Any) -> Any:
        text, layout = values[-2:]
        if layout is None:
            return None if text is None else _parsed(text, "extra")
        extra = {} if text is None else _parsed(text, "extra")
        if type(extra) is not dict:
            raise BadRecord("column 'extra' is not a JSON object")
        row = {}
        for key, place, convert in self._steps(layout):
            if place is not None:
                row[key] = convert(_filled(key, values[place]))
            elif convert is _image_id:
                row[key] = image_id
            elif convert is _null:
                row[key] = None
            elif key in extra:
                row[key] = extra[key]
            else:
                raise BadRecord(f"{key[:80]!r} is missing in column 'extra'")
        return row

    def _steps(self, layout: str) -> "list[_Step]":
        steps = self._layouts.get(layout)
        if steps is None:
            steps = [self._step(key, form) for key, form in _parsed_layout(layout).items()]
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            self._layouts[layout] = steps
        return steps

    def _step(self, key: str, form: str) -> "_Step":
        if form == "":
            return key, None, _extra
        if form == "=" and key == "image_id":
            return key, None, _image_id
        if key not in self._columns or form not in self._columns[key].forms:
            raise BadRecord(f"column 'layout' states the form {form[:8]!r} for {key[:80]!r}, which has no such form")
        if form == "n":
            return key, None, _null
        return key, self._places[key], _CONVERSIONS[form]


_Step = tuple[str, int | None, Callable[[Any], Any]]
"""Key of a row, the place of its value among the columns, and what restores it."""


def _extra(value: Any) -> Any:
    return value


def _image_id(value: Any) -> Any:
    return value


def _null(_value: Any) -> Any:
    return None


def _filled(key: str, value: Any) -> Any:
    if value is None:
        raise BadRecord(f"column {key!r} is null, against its layout")
    return value


def _integer(value: Any) -> Any:
    try:
        return int(value)
    except (ValueError, OverflowError):
        raise BadRecord(f"{value!r} is stated to be an integer") from None


def _box(form: str) -> Callable[[Any], Any]:
    convert = [_integer if letter == "i" else float for letter in form]

    def restored(numbers: Any) -> Any:
        if len(numbers) != len(convert) or None in numbers:
            raise BadRecord(f"column 'bbox' has {len(numbers)} values or a null; it must have 4 numbers")
        return [one(number) for one, number in zip(convert, numbers, strict=True)]

    return restored


def _parsed(text: str, column: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRecord(f"column {column!r} is not JSON") from None
    if is_too_deep(value):
        raise BadRecord(f"column {column!r} is nested more than {MAX_NESTING} deep")
    return value


def _parsed_layout(text: str) -> dict[str, str]:
    layout = _parsed(text, "layout")
    if type(layout) is not dict or not all(type(form) is str for form in layout.values()):
        raise BadRecord("column 'layout' is not a JSON object of texts")
    return layout


_CONVERSIONS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "i": _integer,
    "f": float,
    "b": bool,
    "s": _extra,
    "j": lambda text: _parsed(text, "segmentation"),
    **{form: _box(form) for form in _BOX_FORMS},
}
