"""What a server has measured so far in an evaluation, sealed by it, so that a broken one goes on instead of anew.

In memory a record outlives a broken stream; in a file also the end of this process. Whether the server takes it back is
the server's word: it does not after its weights or the options changed, nor after a restart without `resume_key`.
"""

from __future__ import annotations

import base64
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mal_client.dataset.journal import locked
from mal_train.core.errors import ConfigError, OutputError

WHAT = "mal-client evaluation records"


class EvaluationRecords:
    """Records by image, and the token that they belong to.

    Args:
        path: JSON lines, appended as records come, and held against other processes until `close`; None = memory alone.
        job: what is measured and how; a file of another job is refused.

    Raises:
        ConfigError: the file is of another job, or none of ours.
        OutputError: another process is at work on it, or it cannot be written.
    """

    def __init__(self, path: Path | None, job: dict[str, Any]) -> None:
        self.token = b""
        self.path = path
        self._job = job
        self._records: dict[str, tuple[str, bytes]] = {}
        self._file: int | None = None
        if path is not None:
            self._file = locked(path, "another evaluation keeps its records there; wait for it, or name another file")
            with ExitStack() as unlock:
                unlock.callback(self.close)
                self._read(path)
                unlock.pop_all()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, item_id: str, content: str = "") -> bytes:
        """The record of an image; empty when there is none, or when the image's content is another one now."""
        known, record = self._records.get(item_id, ("", b""))
        return record if known == content else b""

    def items(self) -> list[tuple[str, bytes]]:
        """(image, record) of all."""
        return [(item_id, record) for item_id, (_, record) in self._records.items()]

    def add(self, token: bytes, item_id: str, record: bytes, content: str = "") -> None:
        """Keeps a record. `content`: SHA-256 of the image's file, where this side has it."""
        if not record or self._records.get(item_id) == (content, record):
            return
        if self.token != token:
            self.clear()
            self.token = token
            self._append({"what": WHAT, "job": self._job, "token": _text(token)})
        self._records[item_id] = (content, record)
        self._append({"item": item_id, "content": content, "record": _text(record)})

    def clear(self) -> None:
        """Forgets everything: the server takes none of it back."""
        self.token = b""
        self._records.clear()
        if self._file is not None:
            os.ftruncate(self._file, 0)

    def close(self) -> None:
        """Ends the lock. A file with records stays for a later run, an empty one does not."""
        if self._file is None:
            return
        if self.path is not None and os.fstat(self._file).st_size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def _append(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        # A newline first: the last line of a run that was killed may be cut.
        data = b"\n" + json.dumps(row).encode()
        try:
            os.lseek(self._file, 0, os.SEEK_END)
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise OutputError(f"{path}: cannot be read: {error.strerror}") from error
        rows = [row for row in map(_parsed, lines) if row is not None]
        if any(lines) and (not rows or rows[0].get("what") != WHAT):
            raise ConfigError(f"{path}: holds no records of an evaluation; name another file")
        for row in rows:
            try:
                self._take(path, row)
            except (KeyError, TypeError, ValueError):
                text = json.dumps(row)
                raise ConfigError(
                    f"{path}: holds a line that is no record of an evaluation: {text[:80]}; delete the file or name "
                    "another"
                ) from None

    def _take(self, path: Path, row: dict[str, Any]) -> None:
        if "what" in row:
            if row.get("job") != self._job:
                raise ConfigError(
                    f"{path}: holds the records of another evaluation (other annotations, images or options); "
                    "delete it or name another file"
                )
            self.token = _bytes(row, "token")
        elif self.token:
            self._records[_string(row, "item")] = (_string(row, "content"), _bytes(row, "record"))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _string(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise TypeError(key)
    return str(row[key])


def _bytes(row: dict[str, Any], key: str) -> bytes:
    return base64.b64decode(_string(row, key), validate=True)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
