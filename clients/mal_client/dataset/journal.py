"""The answers of a bulk job on disk, in the order in which they came: what a killed run leaves to the next one.

One line each: the CRC-32 of the text after it, then JSON. The first line is the manifest, which says what job this is;
the others are `[place of the annotation, answer]`, and the last one for a place counts. A line is written when its
answer comes and never changed. Reading stops at the first damaged line, the last one of a killed run, and what follows
is cut off. The system call of each answer makes it safe from a killed process; the disk has it some seconds later.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.fingerprint import differences

SYNC_EVERY_S: Final = 5.0
"""A power cut costs at most the answers of so many seconds."""

NOWHERE: Final = -1

Answer = Mapping[str, Any]
"""`{"label": …}`, or `{"failed": …}`, which a later run asks again."""


def journal_path(output_json: Path) -> Path:
    """Where a job keeps its answers: `out.json.ledger` beside `out.json`, whatever link leads there."""
    target = Path(os.path.realpath(output_json))
    return target.with_name(f"{target.name}.ledger")


class LedgerReader:
    """A ledger that others have filled, held so that nobody writes it meanwhile. A context manager.

    Args:
        path: the file.

    Attributes:
        manifest: its first line.

    Raises:
        OutputError: another process is at work on it.
        ConfigError: it holds no manifest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = locked(path)
        first = next(_good_lines(self._file), None)
        if first is None or not isinstance(first[2], dict):
            os.close(self._file)
            raise ConfigError(f"{path}: no ledger of a labeling job, or a damaged one; label that part again")
        self.manifest: dict[str, Any] = first[2]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(place of an annotation, offset and length of its line), later answers to the same place after earlier."""
        lines = _good_lines(self._file)
        next(lines)
        for offset, end, (at, _) in lines:
            yield at, offset, end - offset

    def answer(self, offset: int, length: int) -> Answer:
        """The answer in a line."""
        return _answer(self._file, offset, length)


class Journal:
    """Answers by the place of their annotation; one process at a time. A context manager that ends its lock.

    Args:
        path: the file; made when it is not there.
        count: number of annotations.
        manifest: what the answers depend on; a ledger that was begun with another one is refused.
        restart: throw away what an earlier run left.
        clock: monotonic seconds.

    Attributes:
        label_count: places that need not be asked again.

    Raises:
        ConfigError: the earlier run was another job; `restart` is the remedy.
        OutputError: another process is at work on it, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        count: int,
        manifest: Mapping[str, Any],
        *,
        restart: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._clock = clock
        self._synced = clock()
        self._offsets = array("q", [NOWHERE]) * count
        self._lengths = array("i", [0]) * count
        self._is_failed = bytearray(count)
        self._end = 0
        self.label_count = 0
        self._file = locked(path)
        with ExitStack() as unlock:
            unlock.callback(self.close)
            if restart:
                os.ftruncate(self._file, 0)
            self._end = self._read(manifest)
            if not self._end:
                self._write(_line(manifest))
            unlock.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, answers: Mapping[int, Answer]) -> None:
        """Adds answers by place. Raises OutputError when the disk does not take them."""
        lines = {at: _line([at, answer]) for at, answer in answers.items()}
        offset = self._end
        self._write(b"".join(lines.values()))
        for at, line in lines.items():
            self._note(at, offset, len(line), is_failed="failed" in answers[at])
            offset += len(line)
        if self._clock() - self._synced > SYNC_EVERY_S:
            os.fsync(self._file)
            self._synced = self._clock()

    def answer(self, at: int) -> Answer | None:
        """The answer for a place; None when there is none."""
        if self._offsets[at] == NOWHERE:
            return None
        return _answer(self._file, self._offsets[at], self._lengths[at])

    def has_label(self, at: int) -> bool:
        """Whether a place has an answer that need not be asked again."""
        return self._offsets[at] != NOWHERE and not self._is_failed[at]

    def has_failure(self, at: int) -> bool:
        """Whether a place has an answer that is to be asked again."""
        return bool(self._is_failed[at])

    def close(self) -> None:
        """Ends the lock; the file stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Deletes the file: its job is done, or never began. The lock ends with `close`."""
        self.path.unlink(missing_ok=True)

    def _note(self, at: int, offset: int, length: int, *, is_failed: bool) -> None:
        self.label_count -= self.has_label(at)
        self._offsets[at], self._lengths[at], self._is_failed[at] = offset, length, is_failed
        self.label_count += self.has_label(at)

    def _read(self, manifest: Mapping[str, Any]) -> int:
        """Notes where the answers stand and cuts off what is damaged; the end of what is good."""
        lines = _good_lines(self._file)
        first = next(lines, None)
        if first is None:
            os.ftruncate(self._file, 0)
            return 0
        _, end, found = first
        _refuse_other_job(self.path, found, manifest)
        for offset, end_of_line, (at, answer) in lines:
            end = end_of_line
            self._note(at, offset, end - offset, is_failed="failed" in answer)
        os.ftruncate(self._file, end)
        return end

    def _write(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._end + written)
        except OSError as error:
            raise OutputError(
                f"{self.path}: not written ({error.strerror}); free some space and run the same command again: the "
                "answers so far are kept, and a file that was there before is unchanged"
            ) from error
        self._end += written


def locked(path: Path, held: str = "another run is writing this output; wait for it, or choose another output") -> int:
    """A descriptor of the file, made when it is not there, which this process alone holds until it closes it.

    Args:
        path: the file.
        held: what to say when another process holds it.

    Raises:
        OutputError: another process holds it, or it cannot be made or locked.
    """
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be made ({error.strerror}); choose an output that can be written to"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run before may have finished, and removed the file, between our two calls.
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BlockingIOError:
            os.close(file)
            raise OutputError(f"{path}: {held}") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(file)
            raise OutputError(f"{path}: cannot be locked ({error.strerror}); choose a local disk") from error
        os.close(file)


def _good_lines(descriptor: int) -> Iterator[tuple[int, int, Any]]:
    """(start, end, content) up to the first line that is damaged."""
    end = 0
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        for line in file:
            content = _content(line)
            if content is None:
                return
            yield end, end + len(line), content
            end += len(line)


def _answer(descriptor: int, offset: int, length: int) -> Answer:
    found: Answer = json.loads(os.pread(descriptor, length, offset)[9:])[1]
    return found


def _line(content: Any) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _content(line: bytes) -> Any:
    """What a line says; None when it is damaged."""
    if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(line[9:-1]):
        return None
    return json.loads(line[9:])


def _refuse_other_job(path: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Raises ConfigError naming what differs."""
    known: dict[str, Any] = json.loads(json.dumps(dict(wanted)))
    earlier = found if isinstance(found, dict) else {}
    different = differences(earlier, known)
    if different:
        raise ConfigError(
            f"{path}: holds the results of an unfinished run of another job: {'; '.join(different)}; finish that run, "
            "or give --restart (restart=True) to discard its results"
        )
