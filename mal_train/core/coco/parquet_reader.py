"""Reads the parquet form of a COCO file: one file, or a folder of parts, by row group.

A file that another program wrote may be hostile. What its footer states is checked before a row group is read. A footer
that lies about sizes is not detected before the memory is used.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from mal_train.core.coco.parquet_records import ANNOTATION_COLUMNS, IMAGE_COLUMNS, BadRecord, ImageRow, RecordReader
from mal_train.core.coco.parquet_schema import (
    ANNOTATIONS,
    IMAGES,
    MAX_FOOTER_BYTES,
    MAX_ROW_GROUP_BYTES,
    MAX_ROW_GROUP_ROWS,
    NOTE_KEY,
    SUFFIX,
    Head,
    arrow_schema,
    check_schema,
    is_parquet,
    load_pyarrow,
    missing_shard_parts,
    read_metadata,
)
from mal_train.core.errors import BadDataset, OutputError, StorageError
from mal_train.core.spill import Spill
from mal_train.core.storage.addresses import Location, base_name, is_remote, join, redact
from mal_train.core.storage.listing import list_names
from mal_train.core.storage.reading import info_of, open_random

_ROWS_PER_BATCH: Final = 256
_ROWS_PER_BUCKET: Final = 1 << 16
_TAIL_BYTES: Final = 8
"""Length of the footer and the magic number, at the end of a file."""
_MAGIC: Final = b"PAR1"
_END_BYTES: Final = 1 << 16
"""Bytes at the end of a file that are read at once, and contain the footer of most files."""
_LISTED: Final = 10


@dataclass(frozen=True)
class RowGroup:
    """One row group of a dataset.

    Attributes:
        path: path or address of its file.
        index: index in the file.
        rows: number of rows.
        annotations: number of annotations.
    """

    path: Location
    index: int
    rows: int
    annotations: int


class ParquetDataset:
    """A COCO file in the parquet form. Opening it reads the footers alone.

    Args:
        path: path or address of a file, or of a folder whose files `*.parquet` are parts of one COCO file.

    Attributes:
        path: the file or folder.
        name: `path` in messages.
        head: the COCO file without images and annotations.
        row_groups: of all files, in the order of their names.
        sha256: SHA-256 of the footers, which contain the SHA-256 of the other bytes; 64 hex digits.

    Raises:
        BadDataset: a file is unreadable, not of this form, exceeds a limit, or belongs to another COCO file.
        ConfigError: pyarrow is not installed, or what reads the address.
        StorageError, StoreUnreachable: an object cannot be read.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        self.name = redact(path)
        self.row_groups: list[RowGroup] = []
        self._footers: dict[Location, str] = {}
        parts = _parts(path)
        self.head = self._add(parts[0])
        for part in parts[1:]:
            # Of the heads, each of which may take some MB, only the first is kept.
            if self._add(part) != self.head:
                raise BadDataset(
                    f"{redact(part)}: is no part of the same COCO file as {base_name(parts[0])}; keep its parts alone "
                    f"in {self.name}"
                )
        self.sha256 = hashlib.sha256("".join(self._footers.values()).encode()).hexdigest()

    def rows(
        self, row_groups: Iterable[RowGroup] | None = None, *, with_annotations: bool = True
    ) -> Iterator[ImageRow]:
        """Yields the rows of some row groups, by default of all, in the order given; reads no other row group.

        Args:
            row_groups: some of `row_groups`.
            with_annotations: False reads the columns of the images alone.

        Raises:
            BadDataset: a file is damaged, not of this form, or changed since it was opened.
        """
        for _, rows in self.by_row_group(row_groups, with_annotations=with_annotations):
            yield from rows

    def by_row_group(
        self, row_groups: Iterable[RowGroup] | None = None, *, with_annotations: bool = True
    ) -> Iterator[tuple[RowGroup, Iterator[ImageRow]]]:
        """Yields each row group with its rows, as `rows` does. Use them up before the next row group."""
        with RowGroupReader(self, with_annotations=with_annotations) as reader:
            for group in self.row_groups if row_groups is None else row_groups:
                yield group, reader.rows(group)

    @contextlib.contextmanager
    def open_file(self, path: Location) -> Iterator[Any]:
        """Yields a file of the dataset as a pyarrow ParquetFile.

        Raises:
            BadDataset: the file is damaged, or changed since the dataset was opened.
        """
        with _opened(path) as (file, footer_sha256):
            if footer_sha256 != self._footers[path]:
                raise BadDataset(f"{redact(path)}: changed while it was read; start the command again")
            yield file

    def check_complete(self) -> None:
        """Raises BadDataset if the parts do not hold all rows of the COCO file, as far as footers and names tell.

        A missing image without boxes may pass if other rows have no image: only its rows tell.
        """
        images = sum(group.rows for group in self.row_groups)
        annotations = sum(group.annotations for group in self.row_groups)
        missing = missing_shard_parts({base_name(part) for part in self._footers})
        if annotations == self.head.annotations and images >= self.head.images and not missing:
            return
        remedy = "a part is missing, or there are parts of several runs; keep all parts of one run here"
        if missing:
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            remedy = f"run the shards that write {', '.join(missing[:_LISTED])}{more}"
        raise BadDataset(
            f"{self.name}: holds {images} rows for {self.head.images} images, and {annotations} of "
            f"{self.head.annotations} annotations, of its COCO file; {remedy}"
        )

    def _add(self, part: Location) -> Head:
        """Adds the row groups of a part; returns its head."""
        with _opened(part) as (file, footer_sha256):
            head, counts = read_metadata(file.metadata.metadata, redact(part))
            check_schema(file.schema_arrow, redact(part))
            self.row_groups += _row_groups(part, file.metadata, counts)
        self._footers[part] = footer_sha256
        return head


class RowGroupReader:
    """Reader of row groups, which keeps the file of the last one open. A context manager. Not safe in threads.

    Args:
        dataset: the dataset.
        with_annotations: False reads the columns of the images alone.
    """

    def __init__(self, dataset: ParquetDataset, *, with_annotations: bool = True) -> None:
        self._dataset = dataset
        self._columns = [name for name in arrow_schema().names if with_annotations or name != ANNOTATIONS]
        self._path: Location | None = None
        self._file: Any = None
        self._close = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    def rows(self, group: RowGroup, start: int = 0) -> Iterator[ImageRow]:
        """Yields the rows of a row group from `start` on. Use them up before the next row group.

        Raises:
            BadDataset: a file is damaged, not of this form, or changed since the dataset was opened.
        """
        if group.path != self._path:
            self._close.close()
            self._path = None
            self._file = self._close.enter_context(self._dataset.open_file(group.path))
            self._path = group.path
        return _read_row_group(self._file, group, self._columns, start)


class ParquetMemberReader:
    """Reader of the members of a COCO file in the parquet form; the counterpart of `JsonMemberReader`.

    Args:
        path: path or address of a file, or of a folder of parts.

    Raises:
        BadDataset: see `ParquetDataset`, or parts are missing.
    """

    def __init__(self, path: Location) -> None:
        self.dataset = ParquetDataset(path)
        self.dataset.check_complete()

    def sha256(self) -> str:
        """Returns the SHA-256 of the footers."""
        return self.dataset.sha256

    def members(self) -> Iterator[tuple[str, Any]]:
        """Yields (name, value) in the order of the COCO file; the value of a list is an iterator over its rows.

        Rows come in the order of the COCO file. Those that the form holds in another order wait in a temporary file.

        Raises:
            BadDataset: a file is damaged or a row is missing.
        """
        head = self.dataset.head
        for name, value in head.members.items():
            if name == IMAGES:
                yield name, _in_order(self._images(), head.images, f"{self.dataset.name}: images")
            elif name == ANNOTATIONS:
                yield name, _in_order(self._annotations(), head.annotations, f"{self.dataset.name}: annotations")
            else:
                yield name, iter(value) if isinstance(value, list) else value

    def _images(self) -> Iterator[tuple[int, Any]]:
        return ((row.index, row.image) for row in self.dataset.rows(with_annotations=False) if row.index is not None)

    def _annotations(self) -> Iterator[tuple[int, Any]]:
        return (annotation for row in self.dataset.rows() for annotation in row.annotations)


def read_note(path: Location) -> Mapping[str, Any]:
    """Returns the note that a job left in the metadata of its part; {} without one, also if there is no such file.

    Raises:
        StorageError, StoreUnreachable: a remote file may be there, but cannot be read.
        ConfigError: pyarrow is not installed.
    """
    try:
        with _opened(path) as (file, _):
            note = json.loads((file.metadata.metadata or {}).get(NOTE_KEY, b"{}"))
    except (BadDataset, ValueError, RecursionError):
        return {}
    except StorageError as error:
        if error.reason != "NOT_FOUND":
            raise
        return {}
    return note if isinstance(note, dict) else {}


def refuse_hidden_parts(output: Location) -> None:
    """Refuses a remote output by which parts would be hidden from readers.

    On a disk, a name is that of a file or of a folder. A store may hold NAME.parquet beside parts below NAME.parquet/,
    and readers take the file: parts that are written later would never be read.

    Raises:
        OutputError: the output is a file that is there as a folder, or a part below a file.
        StoreUnreachable: the store does not answer.
    """
    if not is_remote(output):
        return
    folder = str(output).rpartition("/")[0]
    # Credentials that may only write see neither; the write itself reports other faults of the store.
    with contextlib.suppress(StorageError):
        if is_parquet(folder):
            info_of(folder)
            raise OutputError(
                f"{redact(folder)}: is a file, and readers would not see parts below it; remove it, or choose another "
                "output"
            )
        if is_parquet(output) and next(list_names(output), None) is not None:
            raise OutputError(
                f"{redact(output)}: is a folder, and readers would see a file of this name in place of its parts; "
                "remove it, or choose another output"
            )


def read_parquet(path: Location) -> dict[str, Any]:
    """Returns the JSON object of a COCO file in the parquet form.

    Raises:
        BadDataset: see `ParquetMemberReader`.
    """
    return {
        name: list(value) if isinstance(value, Iterator) else value
        for name, value in ParquetMemberReader(path).members()
    }


def rows_of(table: Any, name: str) -> Iterator[ImageRow]:
    """Yields the rows of a pyarrow table or record batch in the form's schema.

    Args:
        table: the rows.
        name: begins every message.

    Raises:
        BadDataset: a row is not of this form.
    """
    images, annotations = RecordReader(IMAGE_COLUMNS), RecordReader(ANNOTATION_COLUMNS)
    try:
        for batch in table.to_batches() if hasattr(table, "to_batches") else (table,):
            yield from _rows_of_batch(batch, images, annotations)
    except (BadRecord, UnicodeDecodeError) as error:
        raise BadDataset(f"{name}: {error}; the file is damaged, or another program wrote it") from None


def _rows_of_batch(batch: Any, images: RecordReader, annotations: RecordReader) -> Iterator[ImageRow]:
    cells = {name: batch.column(name).to_pylist() for name in batch.schema.names if name != ANNOTATIONS}
    indices = cells.pop("index")
    values = list(images.rows(cells))
    if any(index is None and value is not None for index, value in zip(indices, values, strict=True)):
        raise BadRecord("column 'index' is null in a row with an image")
    if ANNOTATIONS not in batch.schema.names:
        yield from (ImageRow(index, value, ()) for index, value in zip(indices, values, strict=True))
        return
    lists = batch.column(ANNOTATIONS)
    if lists.null_count:
        raise BadRecord("column 'annotations' has a null")
    lengths = lists.value_lengths().to_pylist()
    image_ids = [
        value.get("id") if isinstance(value, dict) else None
        for value, length in zip(values, lengths, strict=True)
        for _ in range(length)
    ]
    structs = lists.flatten()
    fields = {
        field.name: column.to_pylist() for field, column in zip(list(structs.type), structs.flatten(), strict=True)
    }
    positions = fields.pop("index")
    if None in positions:
        raise BadRecord("column 'annotations.index' has a null")
    restored = zip(positions, annotations.rows(fields, image_ids), strict=True)
    for index, value, length in zip(indices, values, lengths, strict=True):
        yield ImageRow(index, value, [next(restored) for _ in range(length)])


def _in_order(rows: Iterator[tuple[int, Any]], count: int, name: str) -> Iterator[Any]:
    """Yields the values by their position, which must be 0 to `count` - 1.

    Rows in that order pass; from the first other one on, they wait in a `Spill`.
    """
    expected = 0
    with Spill(_ROWS_PER_BUCKET) as spill:
        for position, value in rows:
            if position == expected:
                yield value
                expected += 1
                continue
            spill.add(position, 0, json.dumps(value))
            for later, waiting in rows:
                spill.add(later, 0, json.dumps(waiting))
        for position, _, text in spill.sorted():
            if position != expected:
                break
            yield json.loads(text)
            expected += 1
    if expected != count:
        raise BadDataset(
            f"{name}[{expected}] is missing or repeated; a part is missing, or there are parts of several runs"
        )


def _parts(path: Location) -> Sequence[Location]:
    if not _is_folder(path):
        return [path]
    names = [name for name in list_names(path) if is_parquet(Path(name)) and "/" not in name and name[0] != "."]
    if not names:
        raise BadDataset(f"{redact(path)}: contains no {SUFFIX} file; give a file, or the folder of the parts")
    return [join(path, name) for name in sorted(names)]


def _is_folder(path: Location) -> bool:
    if not is_remote(path):
        return Path(path).is_dir()
    try:
        info_of(str(path))
    except StorageError as error:
        if error.reason != "NOT_FOUND" or next(list_names(path), None) is None:
            raise
        return True
    return False


@contextlib.contextmanager
def _opened(path: Location) -> Iterator[tuple[Any, str]]:
    """Yields the open file as a pyarrow ParquetFile and the SHA-256 of its footer."""
    _, pq = load_pyarrow()
    with _read_errors(path), open_random(path) as source:
        footer = _read_footer(source, path)
        limits = dict.fromkeys(("thrift_string_size_limit", "thrift_container_size_limit"), MAX_FOOTER_BYTES)
        metadata = pq.ParquetFile(io.BytesIO(_MAGIC + footer), **limits).metadata
        # Buffered reads of a store would be one request for each column, one after the other.
        file = pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True, pre_buffer=is_remote(path))
        yield file, hashlib.sha256(footer[:-_TAIL_BYTES]).hexdigest()


@contextlib.contextmanager
def _read_errors(path: Location) -> Iterator[None]:
    """Turns errors of pyarrow and of the file into BadDataset."""
    pa, _ = load_pyarrow()
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.strerror is None:
            raise _damaged(path, error) from error
        raise BadDataset(
            f"{redact(path)}: cannot be read ({error.strerror}); give the path of a COCO file in parquet"
        ) from error


def _read_footer(source: BinaryIO, path: Location) -> bytes:
    """Returns the end of the file from its footer on; raises BadDataset for a file without one, or one too long."""
    name = redact(path)
    size = source.seek(0, os.SEEK_END)
    source.seek(max(0, size - _END_BYTES))
    end = source.read(_END_BYTES)
    length = int.from_bytes(end[-_TAIL_BYTES:][:4], "little") + _TAIL_BYTES
    if not end.endswith(_MAGIC) or length > size:
        raise BadDataset(f"{name}: not a parquet file, or its end is missing; give a COCO file in parquet")
    if length - _TAIL_BYTES > MAX_FOOTER_BYTES:
        raise BadDataset(f"{name}: footer of {length} bytes; the limit is {MAX_FOOTER_BYTES}: use larger row groups")
    if length > len(end):
        source.seek(size - length)
        end = source.read(length)
    return end[-length:]


def _row_groups(path: Location, metadata: Any, counts: Sequence[int]) -> Iterator[RowGroup]:
    if len(counts) != metadata.num_row_groups:
        raise BadDataset(f"{redact(path)}: its metadata states {len(counts)} row groups of {metadata.num_row_groups}")
    for index, count in enumerate(counts):
        group = metadata.row_group(index)
        name = f"{redact(path)}: row group {index}"
        # Not of `group.column(...)`: pyarrow 26 aborts the process if the statistics of a column are damaged.
        _check_limit(name, "uncompressed bytes", group.total_byte_size, MAX_ROW_GROUP_BYTES)
        _check_limit(name, "rows", group.num_rows, MAX_ROW_GROUP_ROWS)
        _check_limit(name, "annotations", count, MAX_ROW_GROUP_ROWS)
        yield RowGroup(path, index, group.num_rows, count)


def _check_limit(name: str, unit: str, value: int, limit: int) -> None:
    if value > limit:
        raise BadDataset(f"{name}: {value} {unit}; the limit is {limit}: write the file with smaller row groups")


def _read_row_group(file: Any, group: RowGroup, columns: list[str], start: int) -> Iterator[ImageRow]:
    name = f"{redact(group.path)}: row group {group.index}"
    # The caller's block does not see an error here: it has handed this iterator on.
    with _read_errors(group.path):
        batches = file.iter_batches(_ROWS_PER_BATCH, row_groups=[group.index], columns=columns, use_threads=False)
        for batch in batches:
            # Rows before the first wanted one are not restored from their columns.
            skipped = min(start, batch.num_rows)
            yield from rows_of(batch.slice(skipped), name)
            start -= skipped


def _damaged(path: Location, error: Exception) -> BadDataset:
    detail = str(error).partition("\n")[0][:200]
    return BadDataset(f"{redact(path)}: cannot be read as parquet ({detail}); it is damaged: copy or convert it again")
