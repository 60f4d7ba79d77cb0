"""The records of an unfinished evaluation, so that it can be resumed.

A record is what the server measured on one image, sealed by the server. In memory the records survive a broken stream;
in a file they also survive the end of this process. The server rejects them after its weights or the options have
changed, and after a restart without `resume_key`.
"""

from __future__ import annotations

import base64
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.fingerprint import differences
from mal_train.core.locked_file import LockedFile

FILE_TYPE = "mal-client evaluation records"
_HEAD = json.dumps({"what": FILE_TYPE}).encode()[:-1]
IN_USE = "in use by another evaluation; wait for it to end, or name another file"


class _Record(NamedTuple):
    content_sha256: str
    data: bytes


class EvaluationCheckpoint:
    """Records by item id, and the token of their evaluation.

    Args:
        path: a file of JSON lines, to which records are appended; locked against other processes until `close`. None:
            records are kept in memory only.
        job: settings and inputs of the evaluation; a file of another job is refused.

    Attributes:
        token: the server's token for the records; empty without records.

    Raises:
        ConfigError: the file belongs to another job, or is not a file of records.
        OutputError: another process uses the file, or it cannot be written.
    """

    def __init__(self, path: Path | None, job: dict[str, Any]) -> None:
        self.token = b""
        self.path = path
        self._job = job
        self._records: dict[str, _Record] = {}
        self._file: LockedFile | None = None
        if path is not None:
            self._file = LockedFile(path, IN_USE)
            with ExitStack() as unlock:
                unlock.callback(self.close)
                self._read(path, self._file)
                unlock.pop_all()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, item_id: str, content_sha256: str = "") -> bytes:
        """Returns the record of an image; empty where there is none, or the content of the image has changed."""
        record = self._records.get(item_id)
        return record.data if record is not None and record.content_sha256 == content_sha256 else b""

    def items(self) -> list[tuple[str, bytes]]:
        """Returns (item id, record) of every record."""
        return [(item_id, record.data) for item_id, record in self._records.items()]

    def add(self, token: bytes, item_id: str, data: bytes, content_sha256: str = "") -> None:
        """Adds a record; a new token discards the records of the old one.

        Args:
            token: the server's token for the record.
            item_id: id of the image.
            data: the record; empty data is ignored.
            content_sha256: SHA-256 of the image's file; empty where the file is on the server.

        Raises:
            OutputError: the file cannot be written.
        """
        record = _Record(content_sha256, data)
        if not data or self._records.get(item_id) == record:
            return
        if self.token != token:
            self.clear()
            self.token = token
            self._append({"what": FILE_TYPE, "job": self._job, "token": _to_text(token)})
        self._records[item_id] = record
        self._append({"item": item_id, "content": content_sha256, "record": _to_text(data)})

    def clear(self) -> None:
        """Discards every record and the token."""
        self.token = b""
        self._records.clear()
        if self._file is not None:
            self._file.truncate(0)

    def close(self) -> None:
        """Releases the file; deletes it if it is empty."""
        if self._file is None:
            return
        if self._file.size == 0:
            self._file.remove()
        self._file.close()
        self._file = None

    def _append(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        # A newline first: the last line of a killed process may be incomplete.
        line = b"\n" + json.dumps(row).encode()
        try:
            self._file.write_at(self._file.size, line)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _read(self, path: Path, file: LockedFile) -> None:
        # Each row begins with a line break, as the first one does, too.
        head = file.read_at(0, len(_HEAD) + 1).lstrip(b"\n")[: len(_HEAD)]
        rows = [row for row in map(_parse_line, file.lines()) if row is not None] if head == _HEAD else []
        # A process that was killed at its first row has left no record.
        is_ours = _HEAD.startswith(head) and (not rows or rows[0].get("what") == FILE_TYPE)
        if not is_ours:
            raise ConfigError(f"{path}: not a file of evaluation records; name another file")
        for number, row in enumerate(rows, start=1):
            try:
                self._read_row(path, row)
            except (KeyError, TypeError, ValueError):
                raise ConfigError(f"{path}: entry {number} is malformed; delete the file or name another one") from None

    def _read_row(self, path: Path, row: dict[str, Any]) -> None:
        if "what" in row:
            different = differences(row["job"], self._job)
            if different:
                raise ConfigError(
                    f"{path}: has the records of another evaluation: {'; '.join(different)}; delete the file or name "
                    "another one"
                )
            self.token = _read_bytes(row, "token")
        elif self.token:
            self._records[_read_string(row, "item")] = _Record(_read_string(row, "content"), _read_bytes(row, "record"))


def _to_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _read_string(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise TypeError(key)
    return str(row[key])


def _read_bytes(row: dict[str, Any], key: str) -> bytes:
    return base64.b64decode(_read_string(row, key), validate=True)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
