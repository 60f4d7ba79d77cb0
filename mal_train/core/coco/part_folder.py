"""Output of a job on the parts of a COCO file in parquet: a folder with a file for each part, and a journal beside it.

The journal notes each finished part, and stays after the last one. The same job labels only missing parts, and another
job is refused. A file that the journal does not have, of a process that was killed, is removed and written again.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from mal_train.core.atomic_io import remove_stale_temporaries
from mal_train.core.coco.journal import Journal, has_manifest, has_results, journal_path
from mal_train.core.coco.parquet_parts import Part, is_part_name
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_schema import SUFFIX
from mal_train.core.errors import BadDataset, ConfigError, OutputError

RESTART: Final = "inference.restart=true"


class PartCounts(NamedTuple):
    """Counts of finished parts.

    Attributes:
        rows: annotations.
        labeled: boxes with a mask.
        failed: boxes without one, by reason.
        crowds: crowd regions, which were copied.
    """

    rows: int
    labeled: int
    failed: Counter[str]
    crowds: int


class PartFolder:
    """Folder of the finished parts of a job, which no other process may change. A context manager.

    Args:
        path: the folder; created when it is missing.
        parts: all parts of the job.
        manifest: everything that the content of the parts depends on.
        restart: discard the parts of an earlier job.

    Attributes:
        path: the folder.
        parts: all parts of the job.
        journal: path of the journal.

    Raises:
        ConfigError: the folder has the parts of another job, or other parquet files.
        OutputError: another process uses the folder, or it cannot be written.
    """

    def __init__(
        self, path: Path, parts: Sequence[Part], manifest: Mapping[str, Any], *, restart: bool = False
    ) -> None:
        self.path, self.parts, self.journal = path, parts, journal_path(path)
        is_new = not has_manifest(self.journal)
        names = _parquet_names(path)
        foreign = [name for name in names if not is_part_name(name) or (is_new and not restart)]
        if foreign:
            raise ConfigError(
                f"{path}: has files that this job did not write, such as {foreign[0]}; choose another folder"
                + ("" if not is_part_name(foreign[0]) else f", or give {RESTART} to discard them")
            )
        # A job that ended before its first part, for example without a cluster, has nothing that another one discards.
        is_unused = not names and not has_results(self.journal)
        self._journal = Journal(
            self.journal, len(parts), manifest, restart=restart or is_unused, restart_option=RESTART
        )
        with ExitStack() as on_error:
            on_error.callback(self._journal.close)
            finished = {part.name for part in parts if self._journal.has_label(part.number)}
            _remove(path, [name for name in names if name not in finished])
            self._lost = finished - set(names)
            """Parts whose file was removed since."""
            on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def manifest_line(self) -> bytes:
        """Returns the first line of the journal, by which other machines recognize the job."""
        with self.journal.open("rb") as file:
            return file.readline()

    def is_finished(self, part: Part) -> bool:
        """Returns True for a part that needs no further attempt."""
        return self._journal.has_label(part.number) and part.name not in self._lost

    def missing(self) -> list[Part]:
        """Returns the parts that are not finished."""
        return [part for part in self.parts if not self.is_finished(part)]

    def add(self, part: int, content: Mapping[str, Any]) -> None:
        """Notes that the file of a part is written.

        Args:
            part: number of the part.
            content: its number of `rows`, of `labeled` boxes and of `crowds`, and that of `failed` boxes by reason.

        Raises:
            OutputError: the disk is full.
        """
        self._journal.append({part: {"label": dict(content)}})
        self._lost.discard(self.parts[part].name)

    def counts(self) -> PartCounts:
        """Returns the counts of the finished parts."""
        rows = labeled = crowds = 0
        failed: Counter[str] = Counter()
        for part in filter(self.is_finished, self.parts):
            result = self._journal.result(part.number)
            if result is not None:
                rows += result["label"]["rows"]
                labeled += result["label"]["labeled"]
                failed.update(result["label"]["failed"])
                crowds += result["label"].get("crowds", 0)  # earlier versions did not count them
        return PartCounts(rows, labeled, failed, crowds)

    def check_complete(self, dataset: ParquetDataset) -> None:
        """Raises BadDataset unless the files hold every row of the dataset once, as far as the footers tell."""
        written = ParquetDataset(self.path)
        written.check_complete()
        images, expected = (sum(group.rows for group in one.row_groups) for one in (written, dataset))
        if images != expected:
            raise BadDataset(f"{self.path}: has {images} of {expected} rows; start the command again with {RESTART}")


def _parquet_names(folder: Path) -> list[str]:
    """Creates a folder; returns the sorted names of its parquet files. Removes what killed processes left there."""
    try:
        folder.mkdir(exist_ok=True)
        remove_stale_temporaries(folder)
        return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == SUFFIX)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be used as a folder: {error.strerror}; choose another name") from error


def _remove(folder: Path, names: Sequence[str]) -> None:
    try:
        for name in names:
            (folder / name).unlink()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}; choose another folder") from error
