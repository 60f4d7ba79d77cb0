"""Reads and writes COCO files row by row, for files that do not fit into memory.

Rows are checked by the rules of `coco.annotations`. A scan returns the SHA-256 of the file, so that a later pass can
detect a change in between.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.annotations import (
    REQUIRED_LISTS,
    Annotation,
    ImageInfo,
    JsonId,
    category_ids,
    json_type,
    missing_lists,
    read_annotation,
    read_images,
    record_id,
    reject_duplicate_ids,
)
from mal_train.core.coco.json_reader import MAX_VALUE_CHARS, JsonMemberReader, skip_rows
from mal_train.core.coco.output import PROVENANCE_KEY
from mal_train.core.errors import BadDataset

_ROWS_PER_WRITE: Final = 500


@dataclass(frozen=True)
class CocoHead:
    """A COCO file without its annotations.

    Attributes:
        path: path of the file.
        sha256: SHA-256 of its bytes, 64 hex digits.
        images: by id, in file order.
        category_names: by id, in file order; the id itself for a row without a name.
        count: number of rows in `annotations`.
        repeated_image_ids: image ids that are used more than once.
        repeated_annotation_ids: annotation ids that are used more than once.
        notes: one sentence per invalid row of `images` and `categories`.
    """

    path: Path
    sha256: str
    images: dict[JsonId, ImageInfo]
    category_names: dict[JsonId, str]
    count: int
    repeated_image_ids: tuple[JsonId, ...] = ()
    repeated_annotation_ids: tuple[JsonId, ...] = ()
    notes: tuple[str, ...] = ()


OnAnnotation = Callable[[int, Annotation], None]
"""Callback with the index of a row in `annotations` and the parsed row."""

RowTransform = Callable[[int, Any, Annotation], Any]
"""Function from the index of a row, the JSON value of the row and the parsed row to the JSON value to write."""


def scan_coco(
    path: Path,
    on_annotation: OnAnnotation,
    *,
    allow_repeated_ids: bool = False,
    max_value_chars: int = MAX_VALUE_CHARS,
) -> CocoHead:
    """Parses the file and passes every annotation to `on_annotation` in file order, without keeping any.

    Reads the file once, or twice if `annotations` precedes `images` or `categories`.

    Args:
        path: the file.
        on_annotation: receives each annotation.
        allow_repeated_ids: record repeated ids instead of rejecting the file, for reports about it.
        max_value_chars: maximum length of one row or another single value.

    Raises:
        BadDataset: the file is unusable (see `read_coco`); `on_annotation` may have been called before.
    """
    head = _HeadBuilder(path)
    reader = JsonMemberReader(path, max_value_chars)
    for key, value in reader.members():
        head.add_member(key, value, on_annotation)
    head.check_complete()
    if not allow_repeated_ids:
        reject_duplicate_ids(head.repeated_image_ids, f"{path}: image id")
    if head.count is None:
        reader = JsonMemberReader(path, max_value_chars)
        for key, value in reader.members():
            if key == "annotations":
                head.add_annotations(value, on_annotation)
    if not allow_repeated_ids:
        reject_duplicate_ids(head.repeated_annotation_ids, f"{path}: annotation id")
    return head.build(reader.sha256())


def write_transformed(head: CocoHead, output: Path, transform: RowTransform, provenance: Mapping[str, Any]) -> None:
    """Writes a copy of the scanned file in which every annotation is replaced by the result of `transform`.

    The bytes equal those of `write_json_atomic(output, labeled_file(...))`.

    Args:
        head: result of `scan_coco`.
        output: the file to write; may be the input itself.
        transform: called for each annotation, in file order.
        provenance: stored under `PROVENANCE_KEY`; replaces the entry of an earlier run.

    Raises:
        OutputError: folder missing, no permission, disk full; an existing output is unchanged.
        BadDataset: the input changed after the scan; an existing output is unchanged.
    """
    reader = JsonMemberReader(head.path)
    with atomic_write(output) as file:
        separator = b"{"
        for key, value in reader.members():
            if key == PROVENANCE_KEY:
                skip_rows(value)
                continue
            file.write(separator + _encoded(key) + b": ")
            separator = b", "
            if not isinstance(value, Iterator):
                file.write(_encoded(value))
                continue
            rows = _transformed_rows(head, value, transform) if key == "annotations" else value
            for piece in _encoded_list(rows):
                file.write(piece)
        file.write(separator + _encoded(PROVENANCE_KEY) + b": " + _encoded(dict(provenance)) + b"}\n")
        if reader.sha256() != head.sha256:
            raise BadDataset(f"{head.path}: changed while the job ran; start the job again")


def read_list(path: Path, name: str) -> Iterator[Any]:
    """Yields the JSON values of one top-level list; nothing if there is no such list.

    Raises:
        BadDataset: the file is unreadable or not a JSON object.
    """
    for key, value in JsonMemberReader(path).members():
        if key == name and isinstance(value, Iterator):
            yield from value


class _HeadBuilder:
    """Collector of the fields of a `CocoHead` during a scan.

    Attributes:
        count: number of annotations; None until they have been read.
        repeated_image_ids: keys in order of the first repetition.
        repeated_annotation_ids: keys in order of the first repetition.
    """

    def __init__(self, path: Path) -> None:
        self.count: int | None = None
        self.repeated_image_ids: dict[JsonId, None] = {}
        self.repeated_annotation_ids: dict[JsonId, None] = {}
        self._path = path
        self._images: dict[JsonId, ImageInfo] = {}
        self._category_names: dict[JsonId, str] = {}
        self._notes: list[str] = []
        self._lists: set[str] = set()

    def add_member(self, key: str, value: Any, on_annotation: OnAnnotation) -> None:
        """Adds a top-level member; skips `annotations` that precede one of the other two lists."""
        if key not in REQUIRED_LISTS:
            return
        if not isinstance(value, Iterator):
            raise BadDataset(f"{self._path}: {key!r} is {json_type(value)}; it must be a list")
        self._lists.add(key)
        if key == "images":
            self._add_images(value)
        elif key == "categories":
            self._add_categories(list(value))
        elif len(self._lists) == len(REQUIRED_LISTS):
            self.add_annotations(value, on_annotation)

    def check_complete(self) -> None:
        """Raises BadDataset if a required list is missing."""
        missing = [key for key in REQUIRED_LISTS if key not in self._lists]
        if missing:
            raise BadDataset(missing_lists(str(self._path), missing))

    def add_annotations(self, rows: Iterator[Any], on_annotation: OnAnnotation) -> None:
        """Parses the rows and passes each to `on_annotation`."""
        seen: set[JsonId] = set()
        self.count = 0
        for index, row in enumerate(rows):
            annotation = read_annotation(row, index, self._images, self._category_names)
            if annotation.id is not None:
                record_id(annotation.id, seen, self.repeated_annotation_ids)
            on_annotation(index, annotation)
            self.count = index + 1

    def build(self, sha256: str) -> CocoHead:
        """Returns the collected head; `sha256` is the hash of the file."""
        return CocoHead(
            self._path,
            sha256,
            self._images,
            self._category_names,
            self.count or 0,
            tuple(self.repeated_image_ids),
            tuple(self.repeated_annotation_ids),
            tuple(self._notes),
        )

    def _add_images(self, rows: Iterator[Any]) -> None:
        # One call for all rows, so that notes carry the index of the row.
        for image_id, image in read_images(rows, self._notes):
            if image_id in self._images:
                self.repeated_image_ids[image_id] = None
            self._images[image_id] = image

    def _add_categories(self, rows: list[Any]) -> None:
        known = category_ids(rows, self._notes)
        for row in rows:
            if isinstance(row, dict) and isinstance(row.get("id"), JsonId) and row["id"] in known:
                self._category_names.setdefault(row["id"], str(row.get("name", row["id"])))


def _transformed_rows(head: CocoHead, rows: Iterator[Any], transform: RowTransform) -> Iterator[Any]:
    for index, row in enumerate(rows):
        yield transform(index, row, read_annotation(row, index, head.images, head.category_names))


def _encoded_list(rows: Iterator[Any]) -> Iterator[bytes]:
    yield b"["
    separator = b""
    while chunk := list(islice(rows, _ROWS_PER_WRITE)):
        yield separator + _encoded(chunk)[1:-1]
        separator = b", "
    yield b"]"


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode("ascii")
