"""Results of a job on a dataset on disk, in the order in which they came, from which a killed run resumes.

Each line is the CRC-32 of the text behind it, then JSON. The first line is the manifest, which identifies the job; the
others are `[index of the annotation, result]`, and the last one for an index counts. Lines are appended as results
arrive and never changed. Reading stops at the first damaged line, the last one of a killed run, and what follows is cut
off. A file whose first line is damaged is refused and unchanged: it may be no journal, or one with many results. A
written line survives a killed process at once, and a power cut `SYNC_EVERY_S` seconds later; the manifest survives both
at once.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from mal_train.core.atomic_io import remedy_of
from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.fingerprint import differences
from mal_train.core.locked_file import LockedFile

SYNC_EVERY_S: Final = 5.0
"""Seconds between two fsync calls: a power cut loses the results of this time at most."""

NO_ROW: Final = -1

_HEAD_BYTES: Final = 10
_JOURNAL_HEAD: Final = re.compile(rb"[0-9a-f]{8} \{|[0-9a-f]{0,8} ?\Z")
"""First bytes of a journal, or all bytes of one that a killed process has only begun."""

_encode: Final = json.JSONEncoder(separators=(",", ":")).encode

RowResult = Mapping[str, Any]
"""`{"label": …}`, or `{"failed": …}`, which a later run tries again."""


class RowFailure(NamedTuple):
    """Failure of one row.

    Attributes:
        code: name of a gRPC status; empty for a row that no server has failed.
        reason: code such as IMAGE_DECODE_FAILED; may be empty if `code` is not.
        message: text for users.
    """

    code: str
    reason: str
    message: str


def failed(failure: RowFailure) -> RowResult:
    """Returns a failure as the journal keeps it."""
    return {"failed": list(failure)}


def journal_path(output_json: Path) -> Path:
    """Returns the journal of a job: `out.json.ledger` beside `out.json`; symbolic links are followed."""
    target = Path(os.path.realpath(output_json))
    return target.with_name(f"{target.name}.ledger")


def has_manifest(path: Path) -> bool:
    """Returns True for the journal of a job; False if there is none, or a process was killed before it named its job.

    Raises:
        OutputError: another process holds the file.
        ConfigError: the file is no journal, or its first line is damaged.
    """
    if not path.exists():
        return False
    with LockedFile(path) as file:
        return _read_manifest(file) is not None


def has_results(path: Path) -> bool:
    """Returns True for a journal with anything behind its manifest, and False for a missing file.

    Raises:
        As `has_manifest`.
    """
    if not path.exists():
        return False
    with LockedFile(path) as file:
        first = _read_manifest(file)
        return first is not None and file.size > first[0]


class JournalLine(NamedTuple):
    """Line with the result of a row, by the index of that row; `offset` and `length` in bytes."""

    row: int
    offset: int
    length: int


class JournalReader:
    """Journal of another run, locked while it is read. A context manager.

    Args:
        path: the file.

    Attributes:
        manifest: its first line.

    Raises:
        OutputError: another process holds the file.
        ConfigError: the file has no manifest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = LockedFile(path)
        with ExitStack() as on_error:
            on_error.callback(self._file.close)
            first = _read_manifest(self._file)
            if first is None:
                raise ConfigError(f"{path}: empty; label that shard again")
            on_error.pop_all()
        self._first: int = first[0]
        self.manifest: dict[str, Any] = first[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def lines(self, count: int) -> Iterator[JournalLine]:
        """Yields the position of each result of `count` rows; later results of a row follow earlier ones."""
        return (line for line, _ in _results(self._file, count, self._first))

    def result(self, offset: int, length: int) -> RowResult:
        """Returns the result in one line."""
        return _result(self._file, offset, length)

    def remove(self) -> None:
        """Deletes the file."""
        self._file.remove()


class Journal:
    """Results by the index of their annotation; locked against other processes. A context manager that unlocks.

    Args:
        path: the file; created when it is missing.
        count: number of annotations.
        manifest: everything that the results depend on.
        restart: discard the results of an earlier run.
        restart_option: name of `restart` in the error for another job.
        clock: monotonic seconds.

    Attributes:
        label_count: number of rows that need no further attempt.

    Raises:
        ConfigError: the file belongs to a job with another manifest.
        OutputError: another process holds the file, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        count: int,
        manifest: Mapping[str, Any],
        *,
        restart: bool = False,
        restart_option: str = "--restart (restart=True)",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._restart_option = restart_option
        self._clock = clock
        self._synced_at = clock()
        self._offsets = array("q", [NO_ROW]) * count
        self._lengths = array("i", [0]) * count
        self._is_failed = bytearray(count)
        self._end = 0
        self.label_count = 0
        self._file = LockedFile(path)
        with ExitStack() as on_error:
            on_error.callback(self.close)
            self._end = self._read(manifest, restart=restart)
            if not self._end:
                # Without it after a power cut, the files of finished rows would be those of an unknown job.
                self._write(_line(manifest), sync=True)
            self._noted = self._end
            on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, results: Mapping[int, RowResult]) -> None:
        """Adds results by index. Raises OutputError when the disk is full."""
        lines = {index: _line([index, result]) for index, result in results.items()}
        offset = self._end
        self._write(b"".join(lines.values()), sync=self._clock() - self._synced_at > SYNC_EVERY_S)
        for index, line in lines.items():
            self._note(JournalLine(index, offset, len(line)), is_failed="failed" in results[index])
            offset += len(line)
        self._noted = offset

    def note_interrupted(self) -> None:
        """Notes the rows that an `append` has written but not noted, because an exception of a signal ended it."""
        for line, result in _results(self._file, len(self._offsets), self._noted):
            self._note(line, is_failed="failed" in result)

    def result(self, index: int) -> RowResult | None:
        """Returns the result of a row; None when it has none."""
        if self._offsets[index] == NO_ROW:
            return None
        return _result(self._file, self._offsets[index], self._lengths[index])

    def has_label(self, index: int) -> bool:
        """Returns whether a row has a result that needs no further attempt."""
        return self._offsets[index] != NO_ROW and not self._is_failed[index]

    def has_failure(self, index: int) -> bool:
        """Returns whether a row failed and is to be tried again."""
        return bool(self._is_failed[index])

    def close(self) -> None:
        """Ends the lock; the file stays."""
        self._file.close()

    def remove_if_empty(self) -> None:
        """Deletes the file of a run that ended before its first label, also in the middle of an `append`."""
        self.note_interrupted()
        if not self.label_count:
            self.remove()

    def remove(self) -> None:
        """Deletes the file of a job that is finished or never began. The lock ends with `close`."""
        self._file.remove()

    def _note(self, line: JournalLine, *, is_failed: bool) -> None:
        index, offset, length = line
        self.label_count -= self.has_label(index)
        self._offsets[index], self._lengths[index], self._is_failed[index] = offset, length, is_failed
        self.label_count += self.has_label(index)

    def _read(self, manifest: Mapping[str, Any], *, restart: bool) -> int:
        """Notes the results of an earlier run and cuts off damaged lines; returns the end of the good ones."""
        first = _read_manifest(self._file)
        if first is None or restart:
            self._file.truncate(0)
            return 0
        end, actual = first
        self._refuse_other_job(actual, manifest)
        for line, result in _results(self._file, len(self._offsets), end):
            end = line.offset + line.length
            self._note(line, is_failed="failed" in result)
        self._file.truncate(end)
        return end

    def _refuse_other_job(self, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Raises ConfigError with the differences between two manifests."""
        # Through JSON, which makes lists of tuples.
        known: dict[str, Any] = json.loads(json.dumps(dict(expected)))
        different = differences(actual, known)
        if different:
            raise ConfigError(
                f"{self.path}: holds the results of another job: {'; '.join(different)}; finish that job, choose "
                f"another output, or give {self._restart_option} to discard its results"
            )

    def _write(self, data: bytes, *, sync: bool) -> None:
        try:
            self._file.write_at(self._end, data)
            if sync:
                self._file.sync()
                self._synced_at = self._clock()
        except OSError as error:
            raise OutputError(
                f"{self.path}: not written ({error.strerror}); {remedy_of(error)} and run the same command again: "
                "the results so far are kept, and an older output file is unchanged"
            ) from error
        self._end += len(data)


def _read_manifest(file: LockedFile) -> tuple[int, dict[str, Any]] | None:
    """Returns (its end, manifest) of a journal; None for one that a killed run left before its first line was complete.

    Raises:
        ConfigError: the file is no journal, or its first line is damaged.
    """
    head = file.read_at(0, _HEAD_BYTES)
    is_journal = _JOURNAL_HEAD.match(head) is not None
    # Any other file may have a first line of any length.
    line = next(file.lines(), b"") if is_journal else head
    manifest = _content(line)
    if isinstance(manifest, dict):
        return len(line), manifest
    if is_journal and not line.endswith(b"\n"):
        return None
    raise ConfigError(
        f"{file.path}: no journal of a labeling job, or its first line is damaged; its results cannot be used, and it "
        "is unchanged; move or delete it, or choose another output"
    )


def _results(file: LockedFile, count: int, start: int) -> Iterator[tuple[JournalLine, RowResult]]:
    """Yields the results of the lines from byte `start` on, before the first damaged one.

    Raises:
        ConfigError: a line has a valid checksum, but is no result of one of `count` rows.
    """
    for first, end, content in _good_lines(file, start):
        match content:
            # A failure of one text is from the job of a CVAT task, as an older version wrote it.
            case [int() as index, ({"label": dict()} | {"failed": str() | [str(), str(), str()]}) as result] if (
                0 <= index < count and not isinstance(index, bool)
            ):
                yield JournalLine(index, first, end - first), result
            case _:
                raise ConfigError(f"{file.path}: byte {first}: not a result of this job; move or delete the file")


def _good_lines(file: LockedFile, start: int) -> Iterator[tuple[int, int, Any]]:
    """Yields (start, end, content) of each line from byte `start` on, before the first damaged one."""
    end = start
    for line in file.lines(start):
        content = _content(line)
        if content is None:
            return
        yield end, end + len(line), content
        end += len(line)


def _result(file: LockedFile, offset: int, length: int) -> RowResult:
    # As text: `json.loads` looks for the encoding of bytes, which takes as long as a short line.
    result: RowResult = json.loads(str(file.read_at(offset, length)[9:], "utf-8", "surrogatepass"))[1]
    text = result.get("failed")
    return failed(RowFailure("INTERNAL", "", text)) if isinstance(text, str) else result


def _line(content: Any) -> bytes:
    text = _encode(content).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _content(line: bytes) -> Any:
    """Returns the JSON of a line; None when the line is damaged."""
    if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(line[9:-1]):
        return None
    try:
        return json.loads(line[9:])
    except (ValueError, RecursionError):
        return None
