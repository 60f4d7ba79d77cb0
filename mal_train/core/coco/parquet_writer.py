"""Writes the parquet form of a COCO file: row by row, or from the members of a COCO file in any order.

Memory holds one row group, and for a COCO file the ids of its images (some 150 bytes each) and `spill.MEMORY_BYTES` of
rows; the others wait in a temporary file until they are grouped by image.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from types import TracebackType
from typing import IO, Any, Final, Self

from mal_train.core.coco.parquet_records import ANNOTATION_COLUMNS, IMAGE_COLUMNS, ImageRow, RecordColumns
from mal_train.core.coco.parquet_schema import (
    ANNOTATIONS,
    ID_COLUMNS,
    IMAGES,
    MAX_ROW_ANNOTATIONS,
    MAX_ROW_BYTES,
    MAX_ROW_GROUP_BOXES,
    MAX_ROW_GROUPS,
    METADATA_KEY,
    NOTE_KEY,
    Head,
    annotation_type,
    arrow_schema,
    load_pyarrow,
)
from mal_train.core.errors import BadDataset, ConfigError
from mal_train.core.spill import Spill
from mal_train.core.storage.addresses import Location
from mal_train.core.storage.writing import write_output

ROW_GROUP_BOXES: Final = 1 << 16
"""Default number of boxes of a row group. An image without boxes counts as one."""
ROW_GROUP_BYTES: Final = 64 << 20
"""Text after which a row group ends, whatever its number of boxes."""

_IMAGES_PER_BUCKET: Final = 4096
_ROWS_PER_BUCKET: Final = 1 << 16
_UNPLACED_PER_ROW: Final = 1000
"""Positions of the annotations without an image that share a row."""
_WITH_DICTIONARY: Final = (
    *("layout", "error.reason", "annotations.list.element.category_id", "annotations.list.element.iscrowd"),
    *("annotations.list.element.flags.list.element", "annotations.list.element.error.reason"),
    "annotations.list.element.layout",
)
_NUMBERED: Final = ("index", "id", "annotations.list.element.index", "annotations.list.element.id")


def write_part(path: Location, rows: Iterable[ImageRow], head: Head, *, row_group_boxes: int = ROW_GROUP_BOXES) -> int:
    """Writes rows as one file or object, the whole file or nothing; returns the number of annotations.

    The head is that of the complete COCO file, of which the rows may be a part.

    Raises:
        BadDataset: a row or the head exceeds its limit.
        ConfigError: pyarrow is not installed.
        OutputError: the file cannot be written; an existing one is unchanged.
    """
    load_pyarrow()
    with write_output(path) as file, PartWriter(file, row_group_boxes) as writer:
        for row in rows:
            writer.add(row)
        writer.finish(head)
        return sum(writer.row_groups)


class PartWriter:
    """Writer of one file in the parquet form. A context manager; call `finish` last.

    Args:
        file: open for writing; stays open.
        row_group_boxes: boxes after which a row group ends.

    Attributes:
        row_groups: number of annotations in each row group.

    Raises:
        ConfigError: pyarrow is not installed, or `row_group_boxes` is out of range.
    """

    def __init__(self, file: IO[bytes], row_group_boxes: int = ROW_GROUP_BOXES) -> None:
        if not 1 <= row_group_boxes <= MAX_ROW_GROUP_BOXES:
            raise ConfigError(f"row_group_boxes: {row_group_boxes}; it must be from 1 to {MAX_ROW_GROUP_BOXES}")
        self._pa, pq = load_pyarrow()
        self._schema = arrow_schema()
        self._sink = _HashedFile(file)
        self._writer = pq.ParquetWriter(
            self._pa.PythonFile(self._sink, mode="w"),
            self._schema,
            compression="zstd",
            use_dictionary=list(_WITH_DICTIONARY),
            column_encoding=dict.fromkeys(_NUMBERED, "DELTA_BINARY_PACKED"),
            write_statistics=["index", *ID_COLUMNS.values()],
            write_page_checksum=True,
        )
        self._row_group_boxes = row_group_boxes
        self._rows = _RowGroup()
        self.row_groups: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer.is_open:
            # pyarrow would write a footer into the file later, when it is closed or already another one.
            self._sink.discard()
            self._writer.close()

    def add(self, row: ImageRow) -> None:
        """Adds a row; ends the row group when it is full.

        Raises:
            BadDataset: the row exceeds `MAX_ROW_BYTES` or `MAX_ROW_ANNOTATIONS`.
        """
        self._rows.add(row)
        if self._rows.boxes >= self._row_group_boxes or self._rows.text_chars >= ROW_GROUP_BYTES:
            self.end_row_group()

    def end_row_group(self) -> None:
        """Writes the rows since the last row group, if there are any, as one row group.

        Raises:
            ConfigError: the file has `MAX_ROW_GROUPS` row groups.
        """
        if self._rows.boxes:
            if len(self.row_groups) == MAX_ROW_GROUPS:
                raise ConfigError(
                    f"row_group_boxes: {self._row_group_boxes} gives more than {MAX_ROW_GROUPS} row groups, whose list "
                    "every reader reads; choose more boxes"
                )
            table = self._rows.table(self._pa, self._schema)
            self._writer.write_table(table, row_group_size=table.num_rows)
            self.row_groups.append(self._rows.annotations)
            self._rows = _RowGroup()

    def finish(self, head: Head, note: Mapping[str, Any] | None = None) -> None:
        """Writes the last row group and the footer, with a note for `read_note`."""
        self.end_row_group()
        metadata = {METADATA_KEY: head.to_metadata(self.row_groups, self._sink.sha256())}
        if note is not None:
            metadata[NOTE_KEY] = json.dumps(dict(note)).encode("ascii")
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()


class _HashedFile(io.RawIOBase):
    """File that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file: IO[bytes] | None = file
        self._hash = hashlib.sha256()
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        if self._file is not None:
            self._hash.update(data)
            self._file.write(data)
        self._position += size
        return size

    def tell(self) -> int:
        return self._position

    def sha256(self) -> str:
        """Returns the SHA-256 of what was written so far, as 64 hex digits."""
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Ignores what is written from now on."""
        self._file = None


class _RowGroup:
    """Rows of a row group, packed into columns.

    Attributes:
        boxes: number of annotations; an image without one counts as one.
    """

    def __init__(self) -> None:
        self.boxes = 0
        self._images = RecordColumns(IMAGE_COLUMNS)
        self._annotations = RecordColumns(ANNOTATION_COLUMNS)
        self._image_indices: list[int | None] = []
        self._annotation_indices: list[int] = []
        self._offsets = [0]

    @property
    def annotations(self) -> int:
        return len(self._annotation_indices)

    @property
    def text_chars(self) -> int:
        return self._images.text_chars + self._annotations.text_chars

    def add(self, row: ImageRow) -> None:
        before = self.text_chars
        self._image_indices.append(row.index)
        self._images.append(row.image)
        place = {} if row.index is None else {"image_id": row.image.get("id") if isinstance(row.image, dict) else None}
        for index, value in row.annotations:
            self._annotation_indices.append(index)
            self._annotations.append(value, **place)
        self._offsets.append(len(self._annotation_indices))
        self.boxes += max(1, len(row.annotations))
        if self.text_chars - before > MAX_ROW_BYTES or len(row.annotations) > MAX_ROW_ANNOTATIONS:
            name = "annotations without an image" if row.index is None else f"images[{row.index}]"
            raise BadDataset(
                f"{name}: {len(row.annotations)} annotations with {self.text_chars - before} characters; a row of "
                f"parquet may have {MAX_ROW_ANNOTATIONS} and {MAX_ROW_BYTES}: split the image, or keep the JSON file"
            )

    def table(self, pa: Any, schema: Any) -> Any:
        """Returns the rows as a pyarrow table."""
        element = annotation_type()
        cells = {"index": self._annotation_indices, **self._annotations.cells}
        children = [pa.array(cells[field.name], field.type) for field in element]
        structs = pa.StructArray.from_arrays(children, fields=list(element))
        lists = pa.ListArray.from_arrays(pa.array(self._offsets, pa.int32()), structs)
        columns = {"index": self._image_indices, **self._images.cells}
        arrays = [
            lists if name == ANNOTATIONS else pa.array(columns[name], schema.field(name).type) for name in schema.names
        ]
        return pa.Table.from_arrays(arrays, schema=schema)


def write_members(
    file: IO[bytes],
    members: Iterable[tuple[str, Any]],
    *,
    row_group_boxes: int = ROW_GROUP_BOXES,
    on_written: Callable[[int], None] | None = None,
) -> None:
    """Writes the members of a COCO file in the parquet form.

    Images keep their order. An annotation goes to the first image of its id, or to a row without an image.

    Args:
        file: open for writing.
        members: (name, value) in file order, as `JsonMemberReader.members` yields them, with the lists `images` and
            `annotations`.
        row_group_boxes: boxes after which a row group ends.
        on_written: called with the number of annotations in the row groups that were written so far.

    Raises:
        BadDataset: a row or the head exceeds its limit.
        OutputError: the temporary file cannot be written.
    """
    with PartWriter(file, row_group_boxes) as writer, ExitStack() as stack:
        grouping = _Grouping(stack)
        for key, value in members:
            grouping.add_member(key, value)
        head = grouping.finish()
        for row in grouping.rows():
            written = len(writer.row_groups)
            writer.add(row)
            if on_written is not None and len(writer.row_groups) > written:
                on_written(sum(writer.row_groups))
        writer.finish(head)


class _Grouping:
    """Groups the annotations of a COCO file by image, in a `Spill`."""

    def __init__(self, stack: ExitStack) -> None:
        self._rows = stack.enter_context(Spill(_IMAGES_PER_BUCKET))
        self._early = stack.enter_context(Spill(_ROWS_PER_BUCKET))
        """Annotations that precede the images in the file."""
        self._members: dict[str, Any] = {}
        self._lists: set[str] = set()
        self._image_index: dict[Any, int] = {}
        self._images = self._annotations = 0

    def add_member(self, key: str, value: Any) -> None:
        if key in (IMAGES, ANNOTATIONS) and isinstance(value, Iterator):
            self._members[key] = None
            self._lists.add(key)
            (self._add_images if key == IMAGES else self._add_annotations)(value)
        else:
            self._members[key] = list(value) if isinstance(value, Iterator) else value

    def finish(self) -> Head:
        """Places the annotations that preceded the images; returns the head."""
        for position, _, text in self._early.sorted():
            self._place(position, json.loads(text), text)
        return Head(self._members, self._images, self._annotations)

    def rows(self) -> Iterator[ImageRow]:
        """Yields the rows in the order of the images, then those without an image."""
        for key, group in groupby(self._rows.sorted(), key=lambda row: row[0]):
            values = [(position, json.loads(text)) for _, position, text in group]
            if key < self._images:
                yield ImageRow(key, values[0][1], values[1:])
            else:
                yield ImageRow(None, None, values)

    def _add_images(self, rows: Iterator[Any]) -> None:
        for index, value in enumerate(rows):
            # Before its annotations, whose positions begin at 0.
            self._rows.add(index, -1, json.dumps(value))
            image_id = value.get("id") if isinstance(value, dict) else None
            if _is_key(image_id):
                self._image_index.setdefault(image_id, index)
            self._images = index + 1

    def _add_annotations(self, rows: Iterator[Any]) -> None:
        is_early = IMAGES not in self._lists
        for position, value in enumerate(rows):
            if is_early:
                self._early.add(position, 0, json.dumps(value))
            else:
                self._place(position, value, json.dumps(value))
            self._annotations = position + 1

    def _place(self, position: int, value: Any, text: str) -> None:
        image_id = value.get("image_id") if isinstance(value, dict) else None
        index = self._image_index.get(image_id) if _is_key(image_id) else None
        key = self._images + position // _UNPLACED_PER_ROW if index is None else index
        self._rows.add(key, position, text)


def _is_key(value: object) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)
