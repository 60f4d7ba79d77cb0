"""COCO files read and written row by row, for files that would not fit into memory as objects.

The rules about rows are those of `coco`; what stands here is how to pass through a file with one row in memory at a
time. A scan notes which bytes it read, so that a later pass notices a file that was changed in between.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.annotations import (
    Annotation,
    ImageInfo,
    JsonId,
    category_ids,
    kind,
    note_id,
    read_annotation,
    read_images,
    refuse_repeated,
)
from mal_train.core.coco.output import PROVENANCE_KEY
from mal_train.core.errors import BadDataset

MAX_VALUE_CHARS: Final = 1 << 28
"""Longest single value, for example one row; beyond it the file counts as broken rather than being read whole."""

_READ_BYTES: Final = 1 << 20
_ROWS_A_PIECE: Final = 500
_SPACE: Final = " \t\n\r"
_ENDS: Final = frozenset(_SPACE + ",]}:")
_LISTS: Final = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoHead:
    """A COCO file without its annotations.

    Attributes:
        path: where it lies.
        sha256: of its bytes, 64 hex digits.
        images: by id, in file order.
        category_names: by id, in file order; the id itself where a row has no name.
        count: rows of `annotations`.
        repeated_images: image ids that stand more than once.
        repeated_annotations: annotation ids that do.
        notes: faults of `images` and `categories` rows, one sentence each.
    """

    path: Path
    sha256: str
    images: dict[JsonId, ImageInfo]
    category_names: dict[JsonId, str]
    count: int
    repeated_images: tuple[JsonId, ...] = ()
    repeated_annotations: tuple[JsonId, ...] = ()
    notes: tuple[str, ...] = ()


Take = Callable[[int, Annotation], None]
"""Gets the place of a row in `annotations` and what was read there."""

Change = Callable[[int, Any, Annotation], Any]
"""Gets a place, the row as the file holds it and as it was read; gives the row to write."""


def scan_coco(path: Path, take: Take, *, allow_repeated_ids: bool = False) -> CocoHead:
    """Reads the file, hands every annotation to `take` in file order and keeps none.

    Read once, or twice where `annotations` stands before `images` or `categories`.

    Args:
        path: the file.
        take: gets each annotation.
        allow_repeated_ids: note them instead of refusing the file; for reports about it.

    Raises:
        BadDataset: as `coco.read_coco`; `take` may have been called by then.
    """
    head = _Head()
    stream = _ObjectStream(path)
    found = set()
    taken = False
    count = 0
    for key, value in stream.members():
        if key in _LISTS:
            if not isinstance(value, Iterator):
                raise BadDataset(f"{path}: {key!r} is {kind(value)}; it must be a list")
            found.add(key)
        if key == "images":
            head.take_images(value)
        elif key == "categories":
            head.take_categories(list(value))
        elif key == "annotations" and found == set(_LISTS):
            count, taken = head.take_annotations(value, take), True
    missing = [key for key in _LISTS if key not in found]
    if missing:
        raise BadDataset(f"{path}: has no {', '.join(map(repr, missing))}; a COCO file needs {', '.join(_LISTS)}")
    if not allow_repeated_ids:
        refuse_repeated(head.repeated_images, f"{path}: image id")
    if not taken:
        stream = _ObjectStream(path)
        for key, value in stream.members():
            if key == "annotations":
                count = head.take_annotations(value, take)
    if not allow_repeated_ids:
        refuse_repeated(head.repeated_annotations, f"{path}: annotation id")
    return CocoHead(
        path,
        stream.sha256(),
        head.images,
        head.category_names,
        count,
        tuple(head.repeated_images),
        tuple(head.repeated_annotations),
        tuple(head.notes),
    )


def write_changed(head: CocoHead, output: Path, change: Change, provenance: Mapping[str, Any]) -> None:
    """Writes the scanned file anew with every annotation passed through `change`; all else as it is.

    The text is that of `coco.write_json_atomic(output, coco.labeled_file(...))`.

    Args:
        head: what `scan_coco` gave.
        output: the file to write; may be the input itself.
        change: called for each annotation, in file order.
        provenance: stored under `PROVENANCE_KEY`, in place of an earlier one.

    Raises:
        OutputError: folder missing, no permission, disk full; an older output is intact.
        BadDataset: the input is no longer the file that was scanned; an older output is intact.
    """
    stream = _ObjectStream(head.path)
    with atomic_write(output) as file:
        lead = b"{"
        for key, value in stream.members():
            if key == PROVENANCE_KEY:
                _drain(value)
                continue
            file.write(lead + _encoded(key) + b": ")
            lead = b", "
            if not isinstance(value, Iterator):
                file.write(_encoded(value))
                continue
            rows = _changed_rows(head, value, change) if key == "annotations" else value
            file.write(b"[")
            between = b""
            while piece := list(islice(rows, _ROWS_A_PIECE)):
                file.write(between + _encoded(piece)[1:-1])
                between = b", "
            file.write(b"]")
        file.write(lead + _encoded(PROVENANCE_KEY) + b": " + _encoded(dict(provenance)) + b"}\n")
        if stream.sha256() != head.sha256:
            raise BadDataset(f"{head.path}: was changed while the job ran; start the job again")


def read_member(path: Path, name: str) -> Iterator[Any]:
    """The rows of one top-level list, as the file holds them; none when there is no such list.

    Raises:
        BadDataset: the file cannot be read.
    """
    for key, value in _ObjectStream(path).members():
        if key == name and isinstance(value, Iterator):
            yield from value


class _Head:
    """What a scan gathers."""

    def __init__(self) -> None:
        self.images: dict[JsonId, ImageInfo] = {}
        self.category_names: dict[JsonId, str] = {}
        self.notes: list[str] = []
        self.repeated_images: dict[JsonId, None] = {}
        self.repeated_annotations: dict[JsonId, None] = {}

    def take_images(self, rows: Iterator[Any]) -> None:
        for row in rows:
            for image_id, image in read_images([row], self.notes).items():
                if image_id in self.images:
                    self.repeated_images[image_id] = None
                self.images[image_id] = image

    def take_categories(self, rows: list[Any]) -> None:
        known = category_ids(rows, self.notes)
        for row in rows:
            if isinstance(row, dict) and isinstance(row.get("id"), JsonId) and row["id"] in known:
                self.category_names.setdefault(row["id"], str(row.get("name", row["id"])))

    def take_annotations(self, rows: Iterator[Any], take: Take) -> int:
        seen: set[JsonId] = set()
        count = 0
        for count, row in enumerate(rows, start=1):
            annotation = read_annotation(row, count - 1, self.images, self.category_names)
            if annotation.id is not None:
                note_id(annotation.id, seen, self.repeated_annotations)
            take(count - 1, annotation)
        return count


class _ObjectStream:
    """The members of a JSON object in a file; the rows of a member that is a list come one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._scan = json.JSONDecoder().raw_decode
        self._buffer = ""
        self._at = 0
        self._dropped = 0
        self._is_whole = False
        self._chunks = self._read()

    def sha256(self) -> str:
        """Of the bytes; known when all members were read."""
        return self._hash.hexdigest()

    def members(self) -> Iterator[tuple[str, Any]]:
        """(name, value); a list is an iterator over its rows, which must be used up before the next member is asked.

        Raises:
            BadDataset: not readable, not JSON, no object, or a name that stands twice.
        """
        names = set()
        first = self._peek()
        if first != "{":
            # Small or wrong, so that its kind can be told.
            value = self._value()
            hint = " (a list is a COCO results file)" if isinstance(value, list) else ""
            raise BadDataset(f"{self._path}: holds {kind(value)}{hint}; an object with {', '.join(_LISTS)} is needed")
        for _ in self._entries("{", "}"):
            name = self._value()
            if not isinstance(name, str) or name in names:
                raise self._broken("a name that stands once was expected")
            names.add(name)
            self._expect(":")
            if self._peek() == "[":
                rows = self._rows()
                yield name, rows
                _drain(rows)
            else:
                yield name, self._value()
        if self._peek():
            raise self._broken("extra data")

    def _rows(self) -> Iterator[Any]:
        for _ in self._entries("[", "]"):
            yield self._value()

    def _entries(self, opening: str, closing: str) -> Iterator[None]:
        """Stops at each entry of a list or an object; the caller reads it."""
        self._expect(opening)
        if self._peek() == closing:
            self._at += 1
            return
        while True:
            yield
            mark = self._peek()
            self._at += 1
            if mark == closing:
                return
            if mark != ",":
                raise self._broken(f"',' or '{closing}' was expected")

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._scan(self._buffer, self._at)
            except ValueError as fault:
                if self._is_whole or len(self._buffer) - self._at > MAX_VALUE_CHARS:
                    raise self._broken(
                        str(fault) if isinstance(fault, ValueError) else "a value was expected"
                    ) from None
            except RecursionError:
                raise BadDataset(f"{self._path}: nested too deeply to be a COCO file") from None
            else:
                # A number at the end of what was read so far may go on ("1.5e" of "1.5e3" reads as 1.5).
                if self._is_whole or self._buffer[end : end + 1] in _ENDS:
                    self._at = end
                    return value
            self._fill()

    def _peek(self) -> str:
        """Skips white space; the next character, "" at the end of the file."""
        while True:
            while self._at < len(self._buffer):
                mark = self._buffer[self._at]
                if mark not in _SPACE:
                    return mark
                self._at += 1
            if self._is_whole:
                return ""
            self._fill()

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            raise self._broken(f"{mark!r} was expected")
        self._at += 1

    def _fill(self) -> None:
        """Reads on: at least as much as is waiting, so that a long value is tried a few times only."""
        pieces = [self._buffer[self._at :]]
        wanted = max(1, len(pieces[0]))
        while wanted > 0:
            piece = next(self._chunks, None)
            if piece is None:
                self._is_whole = True
                break
            pieces.append(piece)
            wanted -= len(piece)
        self._dropped += self._at
        self._buffer, self._at = "".join(pieces), 0

    def _read(self) -> Iterator[str]:
        decoder: codecs.IncrementalDecoder | None = None
        try:
            with self._path.open("rb") as file:
                while chunk := file.read(_READ_BYTES):
                    self._hash.update(chunk)
                    if decoder is None:
                        # The encodings that json.loads knows, told by the first bytes.
                        decoder = codecs.getincrementaldecoder(json.detect_encoding(chunk))("surrogatepass")
                    yield decoder.decode(chunk)
                if decoder is not None:
                    yield decoder.decode(b"", final=True)
        except OSError as fault:
            raise BadDataset(
                f"{self._path}: cannot be read ({fault.strerror}); give the path of a COCO JSON file"
            ) from fault
        except UnicodeDecodeError as fault:
            raise BadDataset(f"{self._path}: not JSON ({fault}); a COCO annotation file is needed") from fault

    def _broken(self, why: str) -> BadDataset:
        where = "empty file" if not self._dropped and not self._buffer.strip() else f"{why}, near character "
        where += "" if where == "empty file" else str(self._dropped + self._at)
        return BadDataset(f"{self._path}: not JSON ({where}); a COCO annotation file is needed")


def _changed_rows(head: CocoHead, rows: Iterator[Any], change: Change) -> Iterator[Any]:
    for at, row in enumerate(rows):
        yield change(at, row, read_annotation(row, at, head.images, head.category_names))


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode("ascii")


def _drain(rows: Any) -> None:
    if isinstance(rows, Iterator):
        for _ in rows:
            pass
