"""Reads and writes COCO files row by row, for files that do not fit into memory.

Rows are checked by the rules of `coco.annotations`. A scan returns the SHA-256 of the file, so that a later pass can
detect a change in between.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, Protocol

from mal_train.core.coco.annotations import (
    Annotation,
    ImageInfo,
    JsonId,
    category_ids,
    frequencies_of,
    read_annotation,
    read_images,
    record_id,
    reject_duplicate_ids,
)
from mal_train.core.coco.json_file import create_json
from mal_train.core.coco.json_reader import MAX_VALUE_CHARS, REQUIRED_LISTS, missing_lists, not_a_list, skip_rows
from mal_train.core.coco.members import open_members
from mal_train.core.coco.output import PROVENANCE_KEY
from mal_train.core.coco.parquet_schema import is_parquet
from mal_train.core.coco.parquet_writer import ROW_GROUP_BOXES, write_members
from mal_train.core.errors import BadDataset
from mal_train.core.settings import COCO_RULES, RowRules
from mal_train.core.storage.addresses import Location, redact

_ROWS_PER_WRITE: Final = 500


@dataclass(frozen=True)
class CocoHead:
    """A COCO file without its annotations.

    Attributes:
        path: path of the file; for parquet a path or an address.
        sha256: SHA-256 of its bytes without compression, for parquet of its footers; 64 hex digits.
        images: by id, in file order.
        category_names: by id, in file order; the id itself for a row without a name.
        count: number of rows in `annotations`.
        repeated_image_ids: image ids that are used more than once.
        repeated_annotation_ids: annotation ids that are used more than once.
        notes: one sentence per invalid row of `images` and `categories`.
        share: the part of the file that was scanned; None for the whole file.
        rules: how its rows are read.
        category_frequencies: frequencies of categories in LVIS by their ids; see `frequencies_of`.
    """

    path: Location
    sha256: str
    images: dict[JsonId, ImageInfo]
    category_names: dict[JsonId, str]
    count: int
    repeated_image_ids: tuple[JsonId, ...] = ()
    repeated_annotation_ids: tuple[JsonId, ...] = ()
    notes: tuple[str, ...] = ()
    share: "Share | None" = None
    rules: RowRules = COCO_RULES
    category_frequencies: dict[JsonId, str] = field(default_factory=dict)

    @property
    def is_federated(self) -> bool:
        """Only some categories are judged in each image, as in LVIS."""
        return any(image.is_federated for image in self.images.values())


OnAnnotation = Callable[[int, Annotation], None]
"""Callback with the index of a row in `annotations` and the parsed row."""

OnRows = Callable[[int, int], None]
"""Callback with the numbers of images and of annotations that were read so far."""

RowTransform = Callable[[int, Any, Annotation], Any]
"""Function from the index of a row, the JSON value of the row and the parsed row to the JSON value to write."""


class Share(Protocol):
    """Part of a COCO file that is read and written without the rest.

    Attributes:
        note: returns the note for the metadata of the written part.
    """

    note: Callable[[], Mapping[str, Any]] | None

    def write_transformed(
        self, head: CocoHead, output: Path, transform: RowTransform, provenance: Mapping[str, Any]
    ) -> None:
        """Writes the part as `stream.write_transformed` writes a file."""
        ...


def scan_coco(
    path: Location,
    on_annotation: OnAnnotation,
    *,
    allow_repeated_ids: bool = False,
    max_value_chars: int = MAX_VALUE_CHARS,
    rules: RowRules = COCO_RULES,
) -> CocoHead:
    """Parses the file and passes every annotation to `on_annotation` in file order, without keeping any.

    Reads the file once, or twice if `annotations` precedes `images`.

    Args:
        path: the file; parquet may be remote.
        on_annotation: receives each annotation.
        allow_repeated_ids: record repeated ids instead of rejecting the file, for reports about it.
        max_value_chars: maximum length of one row or another single value.
        rules: how rows are read.

    Raises:
        BadDataset: the file is unusable (see `read_coco`); `on_annotation` may have been called before.
    """
    head = HeadBuilder(path, rules)
    reader = open_members(path, max_value_chars)
    for key, value in reader.members():
        head.add_member(key, value, on_annotation)
    head.check_complete()
    if not allow_repeated_ids:
        head.reject_duplicate_ids()
    if head.count is None:
        reader = open_members(path, max_value_chars)
        for key, value in reader.members():
            if key == "annotations":
                head.add_annotations(value, on_annotation)
    if not allow_repeated_ids:
        head.reject_duplicate_ids()
    return head.build(reader.sha256())


def write_transformed(
    head: CocoHead,
    output: Path,
    transform: RowTransform,
    provenance: Mapping[str, Any],
    annotations: Iterable[tuple[Any, Annotation]] | None = None,
) -> None:
    """Writes a copy of the scanned file, or share, in which `transform` replaces every annotation.

    The bytes of a JSON file equal those of `write_json_atomic(output, labeled_file(...))`.

    Args:
        head: result of `scan_coco`.
        output: the file to write, in parquet if its suffix is `.parquet`; may be the input itself.
        transform: called for each annotation, in file order.
        provenance: stored under `PROVENANCE_KEY`; replaces the entry of an earlier run.
        annotations: (JSON value, parsed row) of rows that take the place of the file's; not for a share.

    Raises:
        OutputError: folder missing, no permission, disk full; an existing output is unchanged.
        BadDataset: the input changed after the scan; an existing output is unchanged.
    """
    if head.share is not None:
        head.share.write_transformed(head, output, transform, provenance)
        return
    reader = open_members(head.path)

    def transformed() -> Iterator[tuple[str, Any]]:
        for key, value in reader.members():
            if key == PROVENANCE_KEY:
                skip_rows(value)
                continue
            if key == "annotations" and isinstance(value, Iterator):
                rows = _parsed(head, value) if annotations is None else annotations
                yield key, _transformed_rows(rows, transform)
            else:
                yield key, value
        yield PROVENANCE_KEY, dict(provenance)

    with create_json(output) as file:
        _write_members(file, transformed(), output)
        if reader.sha256() != head.sha256:
            raise BadDataset(f"{redact(head.path)}: changed while the job ran; start the job again")


def copy_coco(
    source: Location,
    output: Path,
    *,
    row_group_boxes: int = ROW_GROUP_BOXES,
    change: Callable[[int, Any], Any] | None = None,
    on_rows: OnRows | None = None,
    on_written: Callable[[int], None] | None = None,
) -> None:
    """Writes a COCO file in the form that the suffix of `output` names: parquet, or else JSON. Loses nothing.

    Args:
        source: JSON file, parquet file, or folder of parquet parts.
        output: the file to write.
        row_group_boxes: for parquet, boxes after which a row group ends.
        change: function from the index and the JSON value of each annotation to the row to write, or None to leave it
            out; None: all are written as they are.
        on_rows: called after each row that is read.
        on_written: for parquet, called with the number of annotations that were written so far, after all were read.

    Raises:
        BadDataset: the source cannot be read, is no COCO file, or exceeds a limit of parquet.
        ConfigError: pyarrow is not installed.
        OutputError: folder missing, no permission, disk full; an existing output is unchanged.
    """
    members = _complete(open_members(source).members(), redact(source))
    if change is not None:
        members = _changed(members, change)
    with create_json(output) as file:
        counted = _counted(members, on_rows) if on_rows else members
        _write_members(file, counted, output, row_group_boxes, on_written)


def _complete(members: Iterator[tuple[str, Any]], name: str) -> Iterator[tuple[str, Any]]:
    """Yields the members of a COCO file.

    Raises:
        BadDataset: `images` or `annotations` is missing or no list.
    """
    missing = list(REQUIRED_LISTS)
    for key, value in members:
        if key in missing:
            if not isinstance(value, Iterator):
                raise BadDataset(not_a_list(name, key, value))
            missing.remove(key)
        yield key, value
    if missing:
        raise BadDataset(missing_lists(name, missing))


def _changed(members: Iterator[tuple[str, Any]], change: Callable[[int, Any], Any]) -> Iterator[tuple[str, Any]]:
    for key, value in members:
        is_rows = key == "annotations" and isinstance(value, Iterator)
        yield key, _changed_rows(value, change) if is_rows else value


def _changed_rows(rows: Iterator[Any], change: Callable[[int, Any], Any]) -> Iterator[Any]:
    changed = (change(index, row) for index, row in enumerate(rows))
    return (row for row in changed if row is not None)


def read_list(path: Location, name: str) -> Iterator[Any]:
    """Yields the JSON values of one top-level list; nothing if there is no such list.

    The rest of the file after the list is not read, so an error there is not reported.

    Raises:
        BadDataset: the file is unreadable or not a JSON object.
    """
    for key, value in open_members(path).members():
        if key == name and isinstance(value, Iterator):
            yield from value
            return


class HeadBuilder:
    """Collector of the fields of a `CocoHead` during a scan.

    Args:
        path: path or address of the file.
        rules: how rows are read.

    Attributes:
        count: number of annotations; None until they have been read.
        images: by id, in file order.
        category_names: by id.
        repeated_image_ids: keys in order of the first repetition.
        repeated_annotation_ids: keys in order of the first repetition.
    """

    def __init__(self, path: Location, rules: RowRules = COCO_RULES) -> None:
        self.count: int | None = None
        self.images: dict[JsonId, ImageInfo] = {}
        self.category_names: dict[JsonId, str] = {}
        self.repeated_image_ids: dict[JsonId, None] = {}
        self.repeated_annotation_ids: dict[JsonId, None] = {}
        self._name = redact(path)
        self._path = path
        self._rules = rules
        self._frequencies: dict[JsonId, str] = {}
        self._seen_ids: set[JsonId] = set()
        self._notes: list[str] = []
        self._lists: set[str] = set()

    def add_member(self, key: str, value: Any, on_annotation: OnAnnotation) -> None:
        """Adds a top-level member; skips `annotations` that precede `images`."""
        if key not in (*REQUIRED_LISTS, "categories") or (key == "categories" and value is None):
            return
        if not isinstance(value, Iterator):
            raise BadDataset(not_a_list(self._name, key, value))
        self._lists.add(key)
        if key == "images":
            self.add_images(value)
        elif key == "categories":
            self._add_categories(list(value))
        elif "images" in self._lists:
            self.add_annotations(value, on_annotation)

    def check_complete(self) -> None:
        """Raises BadDataset if a required list is missing."""
        missing = [key for key in REQUIRED_LISTS if key not in self._lists]
        if missing:
            raise BadDataset(missing_lists(self._name, missing))

    def add_images(self, rows: Iterable[Any], start: int = 0) -> None:
        """Parses rows of `images`, of which the first has the index `start` in the file."""
        for image_id, image in read_images(rows, self._notes, start):
            if image_id in self.images:
                self.repeated_image_ids[image_id] = None
            self.images[image_id] = image

    def add_annotations(self, rows: Iterator[Any], on_annotation: OnAnnotation) -> None:
        """Parses all rows and passes each to `on_annotation`."""
        self.count = 0
        for index, row in enumerate(rows):
            on_annotation(index, self.add_annotation(row, index))

    def add_annotation(self, row: Any, index: int) -> Annotation:
        """Parses one row, which has this index in the file."""
        annotation = read_annotation(row, index, self.images, self._rules)
        if annotation.id is not None:
            record_id(annotation.id, self._seen_ids, self.repeated_annotation_ids)
        self.count = (self.count or 0) + 1
        return annotation

    def reject_duplicate_ids(self) -> None:
        """Raises BadDataset if an id is used more than once."""
        for kind, member, repeated in (
            ("image", "images", self.repeated_image_ids),
            ("annotation", "annotations", self.repeated_annotation_ids),
        ):
            reject_duplicate_ids(repeated, f"{self._name}: {kind} id", member, partial(read_list, self._path, member))

    def build(self, sha256: str) -> CocoHead:
        """Returns the collected head; `sha256` is the hash of the file."""
        return CocoHead(
            self._path,
            sha256,
            self.images,
            self.category_names,
            self.count or 0,
            tuple(self.repeated_image_ids),
            tuple(self.repeated_annotation_ids),
            tuple(self._notes),
            rules=self._rules,
            category_frequencies=self._frequencies,
        )

    def _add_categories(self, rows: list[Any]) -> None:
        known = category_ids(rows, self._notes)
        self._frequencies = frequencies_of(rows)
        for row in rows:
            if isinstance(row, dict) and isinstance(row.get("id"), JsonId) and row["id"] in known:
                self.category_names.setdefault(row["id"], str(row.get("name", row["id"])))


def _parsed(head: CocoHead, rows: Iterator[Any]) -> Iterator[tuple[Any, Annotation]]:
    for index, row in enumerate(rows):
        yield row, read_annotation(row, index, head.images, head.rules)


def _transformed_rows(rows: Iterable[tuple[Any, Annotation]], transform: RowTransform) -> Iterator[Any]:
    return (transform(index, row, annotation) for index, (row, annotation) in enumerate(rows))


def write_coco(output: Path, raw: Mapping[str, Any]) -> None:
    """Writes a COCO file that is in memory, in the form that the suffix of `output` names: parquet, or else JSON.

    Raises:
        BadDataset: it is no COCO file, or exceeds a limit of parquet.
        ConfigError: pyarrow is not installed.
        OutputError: folder missing, no permission, disk full; an existing output is unchanged.
    """
    members = ((key, iter(value) if isinstance(value, list) else value) for key, value in raw.items())
    with create_json(output) as file:
        _write_members(file, _complete(members, str(output)), output)


def _counted(members: Iterator[tuple[str, Any]], on_rows: OnRows) -> Iterator[tuple[str, Any]]:
    done = {"images": 0, "annotations": 0}

    def counted(name: str, rows: Iterator[Any]) -> Iterator[Any]:
        for row in rows:
            yield row
            done[name] += 1
            on_rows(done["images"], done["annotations"])

    for key, value in members:
        yield key, counted(key, value) if key in done and isinstance(value, Iterator) else value


def _write_members(
    file: IO[bytes],
    members: Iterator[tuple[str, Any]],
    output: Path,
    row_group_boxes: int = ROW_GROUP_BOXES,
    on_written: Callable[[int], None] | None = None,
) -> None:
    if is_parquet(output):
        write_members(file, members, row_group_boxes=row_group_boxes, on_written=on_written)
        return
    separator = b"{"
    for key, value in members:
        file.write(separator + _encoded(key) + b": ")
        separator = b", "
        for piece in _encoded_list(value) if isinstance(value, Iterator) else (_encoded(value),):
            file.write(piece)
    file.write((b"{" if separator == b"{" else b"") + b"}\n")


def _encoded_list(rows: Iterator[Any]) -> Iterator[bytes]:
    yield b"["
    separator = b""
    while chunk := list(islice(rows, _ROWS_PER_WRITE)):
        yield separator + _encoded(chunk)[1:-1]
        separator = b", "
    yield b"]"


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode("ascii")
