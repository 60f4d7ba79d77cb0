"""One share of a COCO file in parquet: row groups that a process reads, labels and writes without the others.

Share i of n holds the row groups i, i + n, i + 2n, …. Its rows are numbered from 0 in the order in which they are read.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.annotations import read_annotation
from mal_train.core.coco.output import PROVENANCE_KEY
from mal_train.core.coco.parquet_ids import refuse_repeated_ids
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_records import ImageRow
from mal_train.core.coco.parquet_schema import ANNOTATIONS, IMAGES, Head, is_parquet
from mal_train.core.coco.parquet_writer import PartWriter
from mal_train.core.coco.stream import CocoHead, HeadBuilder, OnAnnotation, RowTransform
from mal_train.core.errors import BadDataset, ConfigError
from mal_train.core.settings import COCO_RULES, RowRules
from mal_train.core.storage.addresses import Location, redact


def share_of(source: Location, output: Location, index: int = 0, count: int = 1) -> "ParquetShare | None":
    """Returns the share that a job from parquet to parquet reads, by default the whole; None for other forms.

    Raises:
        As `ParquetShare`.
    """
    return ParquetShare(source, index, count) if is_parquet(source) and is_parquet(output) else None


def head_builder(dataset: ParquetDataset, rules: RowRules = COCO_RULES) -> HeadBuilder:
    """Returns the builder of the head of a dataset, with its categories and no images.

    Raises:
        BadDataset: the categories are no list.
    """
    builder = HeadBuilder(dataset.path, rules)
    for name, value in dataset.head.members.items():
        rows = [] if name in (IMAGES, ANNOTATIONS) else value
        builder.add_member(name, iter(rows) if isinstance(rows, list) else rows, lambda *_: None)
    builder.check_complete()
    return builder


class ParquetShare:
    """Row groups `index`, `index` + `count`, … of a COCO file in parquet. Opening it reads the footers alone.

    Args:
        path: path or address of a file, or of a folder of parts.
        index: number of the share, from 0.
        count: number of shares.

    Attributes:
        is_whole: there is one share, which holds all rows.
        note: returns the note for the metadata of the written part; called after its last row.

    Raises:
        BadDataset: see `ParquetDataset`, or parts are missing.
        ConfigError: there are fewer row groups than shares, or pyarrow is not installed.
    """

    def __init__(self, path: Location, index: int = 0, count: int = 1) -> None:
        self._dataset = ParquetDataset(path)
        self._dataset.check_complete()
        groups, boxes = len(self._dataset.row_groups), self._dataset.head.annotations
        if count > 1 and count > groups:
            raise ConfigError(
                f"{redact(path)}: row groups {groups}, shards {count}; use at most {groups} shards, or write "
                f"smaller row groups: mal-client convert --from coco --row-group-boxes {max(1, boxes // (2 * count))}"
            )
        self.is_whole = count == 1
        self.note: Callable[[], Mapping[str, Any]] | None = None
        self._row_groups = self._dataset.row_groups[index::count]

    def scan(self, on_annotation: OnAnnotation, rules: RowRules = COCO_RULES) -> CocoHead:
        """Parses the rows and passes every annotation to `on_annotation`, with its number in this share.

        The counterpart of `scan_coco`. Compares the ids with those of other shares (`parquet_ids`), too.

        Raises:
            BadDataset: a row group cannot be used, or an id or the position of a row is used more than once. For the
                share that holds the whole file, also if a row is missing.
        """
        if not self.is_whole:
            refuse_repeated_ids(self._dataset)
        builder = head_builder(self._dataset, rules)
        images, annotations = array("q"), array("q")
        for row in self._dataset.rows(self._row_groups):
            if row.index is not None:
                builder.add_images([row.image], row.index)
                images.append(row.index)
            for position, value in row.annotations:
                _check_place(row, position, value, self._dataset.name)
                on_annotation(len(annotations), builder.add_annotation(value, position))
                annotations.append(position)
        builder.reject_duplicate_ids()
        self._check_positions(IMAGES, images, self._dataset.head.images)
        self._check_positions(ANNOTATIONS, annotations, self._dataset.head.annotations)
        return replace(builder.build(self._dataset.sha256), share=self)

    def _check_positions(self, name: str, positions: Sequence[int], count: int) -> None:
        """Raises BadDataset for positions that do not make up a list of `count` rows, or could not be some of it."""
        found = np.unique(np.array(positions, dtype=np.int64)).tolist()
        is_unique = len(found) == len(positions)
        is_inside = not found or (found[0] >= 0 and found[-1] < count)
        if not (is_unique and is_inside and (len(found) == count or not self.is_whole)):
            raise BadDataset(
                f"{self._dataset.name}: {name}: the positions of {len(positions)} rows are not those of a list of "
                f"{count}; a part is missing, or there are parts of several runs"
            )

    def write_transformed(
        self, head: CocoHead, output: Path, transform: RowTransform, provenance: Mapping[str, Any]
    ) -> None:
        """Writes the share as one part, in which every annotation is replaced by the result of `transform`.

        The counterpart of `stream.write_transformed`. Each row group becomes one row group, or several if it grows
        beyond the size of one.

        Raises:
            BadDataset: the input changed after the scan, or a row exceeds its limit; an existing output is unchanged.
            OutputError: folder missing, no permission, disk full; an existing output is unchanged.
        """
        of_file = self._dataset.head
        members = {name: value for name, value in of_file.members.items() if name != PROVENANCE_KEY}
        members[PROVENANCE_KEY] = dict(provenance)
        with atomic_write(output) as file, PartWriter(file) as writer:
            number = 0
            for _, rows in self._dataset.by_row_group(self._row_groups):
                for row in rows:
                    writer.add(ImageRow(row.index, row.image, list(_transformed(row, head, transform, number))))
                    number += len(row.annotations)
                writer.end_row_group()
            note = None if self.note is None else self.note()
            writer.finish(Head(members, of_file.images, of_file.annotations), note)


def _transformed(row: ImageRow, head: CocoHead, transform: RowTransform, number: int) -> Iterator[tuple[int, Any]]:
    for at, (position, value) in enumerate(row.annotations, number):
        yield position, transform(at, value, read_annotation(value, position, head.images, head.rules))


def _check_place(row: ImageRow, position: int, value: Any, name: str) -> None:
    """Raises BadDataset for an annotation that is not in the row of its image: it would be read without its image."""
    if row.index is None or not isinstance(value, dict):
        return
    image_id = row.image.get("id") if isinstance(row.image, dict) else None
    if value.get("image_id") != image_id:
        raise BadDataset(
            f"{name}: annotations[{position}]: in the row of images[{row.index}], which is not its image; write the "
            "file again with mal-client convert --from coco"
        )
