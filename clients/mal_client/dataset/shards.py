"""Splits one job among processes that do not communicate, and reads their journals as one.

Shard i of n holds every n-th image, starting with the i-th. Each process labels its shard into a journal beside the
output; when all journals are complete, one process writes the file from them, byte for byte as a single run would. A
job array needs a folder that all processes share, and nothing else. From parquet to parquet, a shard holds every n-th
row group instead, and its process writes a part of the output itself.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mal_train.core.coco.journal import NO_ROW, JournalReader, RowResult, journal_path
from mal_train.core.coco.parquet_schema import shard_part_name
from mal_train.core.errors import ConfigError
from mal_train.core.fingerprint import differences

resource: Any = None
try:
    import resource
except ModuleNotFoundError:
    resource = None  # Windows, which has no such limit

SHARD_KEY = "shard"
"""Key of the shard in the manifest of a journal."""

LISTED = 10
SPARE_FILES = 256


@dataclass(frozen=True)
class Shard:
    """Shard `index` (from 0) of `count`."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"shard {self}: index {self.index}; it must be from 0 to {self.count - 1}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parses INDEX/COUNT. Raises ConfigError if the text is not a valid shard.

        >>> Shard.parse("3/16")
        Shard(index=3, count=16)
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if match is None:
            raise ConfigError(f"shard {text!r}; INDEX/COUNT is needed, from 0/16 to 15/16 for 16 shards")
        return cls(int(match[1]), int(match[2]))

    def has_image(self, index: int) -> bool:
        """Returns whether the image at this index of the file belongs to the shard."""
        return index % self.count == self.index

    @property
    def part_name(self) -> str:
        """File name of the shard in the folder of a job from parquet to parquet.

        >>> Shard(3, 16).part_name
        'part-00003-of-00016.parquet'
        """
        return shard_part_name(self.index, self.count)

    def journal_path(self, output_json: Path) -> Path:
        """Returns the journal of the shard: `out.json.ledger.3-of-16` beside `out.json`."""
        path = journal_path(output_json)
        return path.with_name(f"{path.name}.{self.index}-of-{self.count}")


class ShardJournals:
    """Journals of all shards of a job, read as one and locked meanwhile. A context manager.

    Args:
        output_json: output of the job.
        count: number of shards.
        rows: number of annotations of the file.

    Attributes:
        manifest: of the job, without the shard; the same in all journals.

    Raises:
        ConfigError: a shard is missing, or the journals belong to different jobs.
        OutputError: a shard is being labeled.
    """

    def __init__(self, output_json: Path, count: int, rows: int) -> None:
        self._shards = [Shard(index, count) for index in range(count)]
        paths = [shard.journal_path(output_json) for shard in self._shards]
        missing = [str(shard) for shard, path in zip(self._shards, paths, strict=True) if not path.is_file()]
        if missing:
            raise ConfigError(
                f"{output_json}: no results of {_listed(missing)}; run mal-client label with this --output and "
                f"--shard {missing[0]}"
            )
        _allow_open_files(count)
        self._readers: list[JournalReader] = []
        self._reader_index = array("i", [NO_ROW]) * rows
        self._offsets = array("q", [NO_ROW]) * rows
        self._lengths = array("i", [0]) * rows
        self.manifest: dict[str, Any] = {}
        with ExitStack() as stack:
            for shard, path in zip(self._shards, paths, strict=True):
                self._read(shard, stack.enter_context(JournalReader(path)))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def result(self, index: int) -> RowResult:
        """Returns the result of a row, which must have one."""
        if self._reader_index[index] == NO_ROW:
            raise LookupError(f"row {index} has no result")
        return self._readers[self._reader_index[index]].result(self._offsets[index], self._lengths[index])

    def refuse_gaps(self, rows_to_label: Iterable[tuple[int, int]]) -> None:
        """Raises ConfigError with the shards that lack results.

        Args:
            rows_to_label: (index, index of its image) of each row that must have a result.
        """
        gaps = Counter(
            image % len(self._shards) for index, image in rows_to_label if self._reader_index[index] == NO_ROW
        )
        if gaps:
            names = [f"{self._shards[shard]} ({count} boxes)" for shard, count in sorted(gaps.items())]
            raise ConfigError(f"incomplete: {_listed(names)}; run the mal-client label command of each again")

    def remove(self) -> None:
        """Deletes the journals of a job whose file is written."""
        for reader in self._readers:
            reader.remove()

    def _read(self, shard: Shard, reader: JournalReader) -> None:
        manifest = dict(reader.manifest)
        actual = manifest.pop(SHARD_KEY, None)
        if actual != str(shard):
            raise ConfigError(f"{reader.path}: holds shard {actual}, not {shard}")
        self.manifest = self.manifest or manifest
        different = differences(manifest, self.manifest)
        if different:
            raise ConfigError(
                f"{reader.path}: belongs to another job than {self._readers[0].path.name}: {'; '.join(different)}; "
                "label that shard again with --restart"
            )
        for index, offset, length in reader.lines(len(self._offsets)):
            self._reader_index[index] = len(self._readers)
            self._offsets[index], self._lengths[index] = offset, length
        self._readers.append(reader)


def _allow_open_files(count: int) -> None:
    """Raises the limit of open files of this process, which is often 1024, to hold all journals open at once."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"shard{'s' if len(names) > 1 else ''} {', '.join(names[:LISTED])}{more}"
