"""Shares one job among processes that know nothing of each other, and joins what they answered.

A shard is every so-manieth image of the file, labeled into a ledger of its own beside the output; when all ledgers are
full, one process writes the file from them, with the bytes that a single run would have written. Nobody coordinates:
a job array needs a folder that all processes see, and nothing else.
"""

from __future__ import annotations

import re
import resource
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mal_client.dataset.journal import NOWHERE, Answer, LedgerReader, journal_path
from mal_train.core.errors import ConfigError
from mal_train.core.fingerprint import differences

SHARD_KEY = "shard"
"""Of a ledger's manifest: which part of the job it holds."""

LISTED = 10


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 0) of `count`."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"shard {self}: the parts of {self.count} are numbered from 0 to {self.count - 1}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `3/16`. Raises ConfigError."""
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if found is None:
            raise ConfigError(f"shard {text!r}: PART/PARTS is needed, for example 0/16 to 15/16")
        return cls(int(found[1]), int(found[2]))

    def has_image(self, place: int) -> bool:
        """Whether the image at this place in the file belongs to it; neighbors go to different parts."""
        return place % self.count == self.index

    def journal_path(self, output_json: Path) -> Path:
        """Where its answers are kept: `out.json.ledger.3-of-16` beside `out.json`."""
        path = journal_path(output_json)
        return path.with_name(f"{path.name}.{self.index}-of-{self.count}")


class ShardLedgers:
    """The ledgers of all parts of a job, read as one. A context manager that holds them while it is open.

    Args:
        output_json: what the parts were made for.
        count: number of parts.
        rows: annotations of the file.

    Attributes:
        manifest: of the job, the same in all ledgers.

    Raises:
        ConfigError: a part is missing, or the parts are not of one job.
        OutputError: a part is still being labeled.
    """

    def __init__(self, output_json: Path, count: int, rows: int) -> None:
        self._shards = [Shard(index, count) for index in range(count)]
        self._paths = [shard.journal_path(output_json) for shard in self._shards]
        missing = [str(shard) for shard, path in zip(self._shards, self._paths, strict=True) if not path.is_file()]
        if missing:
            others = ", and so for the others" if len(missing) > 1 else ""
            raise ConfigError(
                f"{output_json}: {_listed('part', missing)} not labeled yet; run mal-client label with this "
                f"--output and --shard {missing[0]}{others}"
            )
        _allow_open_files(count)
        self._files: list[LedgerReader] = []
        self._file_at = array("i", [NOWHERE]) * rows
        self._offsets = array("q", [NOWHERE]) * rows
        self._lengths = array("i", [0]) * rows
        self.manifest: dict[str, Any] = {}
        with ExitStack() as stack:
            for at, path in enumerate(self._paths):
                self._files.append(stack.enter_context(LedgerReader(path)))
                self._read(at)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def answer(self, at: int) -> Answer | None:
        """The answer for a place; None when there is none."""
        if self._file_at[at] == NOWHERE:
            return None
        return self._files[self._file_at[at]].answer(self._offsets[at], self._lengths[at])

    def refuse_gaps(self, asked: Iterable[tuple[int, int]]) -> None:
        """Raises ConfigError naming the parts that have not answered all of their boxes.

        Args:
            asked: (place of the annotation, place of its image) for each that must have an answer.
        """
        gaps = Counter(image % len(self._shards) for at, image in asked if self._file_at[at] == NOWHERE)
        if gaps:
            names = [f"{self._shards[part]} ({count} boxes)" for part, count in sorted(gaps.items())]
            raise ConfigError(f"{_listed('part', names)} not complete: run mal-client label for it again")

    def remove(self) -> None:
        """Deletes the ledgers: the file is written."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _read(self, file_at: int) -> None:
        reader = self._files[file_at]
        manifest = dict(reader.manifest)
        shard = manifest.pop(SHARD_KEY, None)
        if shard != str(self._shards[file_at]):
            raise ConfigError(f"{reader.path}: is part {shard} of a job, not {self._shards[file_at]}")
        self.manifest = self.manifest or manifest
        different = differences(manifest, self.manifest)
        if different:
            raise ConfigError(
                f"{reader.path}: is of another job than {self._paths[0].name}: {'; '.join(different)}. Label that part "
                "again with --restart"
            )
        for at, offset, length in reader.places():
            self._file_at[at], self._offsets[at], self._lengths[at] = file_at, offset, length


def _allow_open_files(count: int) -> None:
    """Raises this process's limit where so many ledgers at once would exceed it; the usual one is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{what}{'s' if len(names) > 1 else ''} {', '.join(names[:LISTED])}{more}"
