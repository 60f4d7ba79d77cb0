"""Refuses a COCO file in parquet in which two rows have one id, for processes that read only some of its row groups.

The ranges of ids that the footers state prove most files; of the others, the columns of the ids alone are read.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mal_train.core.coco.annotations import JsonId, is_id
from mal_train.core.coco.json_values import as_json
from mal_train.core.coco.parquet_reader import ParquetDataset, RowGroup
from mal_train.core.coco.parquet_schema import ANNOTATIONS, ID_COLUMNS, IMAGES
from mal_train.core.errors import BadDataset
from mal_train.core.storage.addresses import Location, base_name

IDS_PER_PASS: Final = 1 << 25
"""Ids that are compared at once, in 512 MiB with the copy that sorting makes; more are compared in several passes."""

_LISTED: Final = 5
_KINDS: Final = {IMAGES: "image", ANNOTATIONS: "annotation"}

Keys = NDArray[np.int64]


class _Range(NamedTuple):
    """Ids of a row group.

    Attributes:
        group: the row group.
        low: smallest id.
        high: largest id.
        rows: number of rows.
        is_complete: the ids of all rows are integers, and the bounds are known.
    """

    group: RowGroup
    low: int
    high: int
    rows: int
    is_complete: bool


def refuse_repeated_ids(dataset: ParquetDataset) -> None:
    """Raises BadDataset if an id is used by two images or by two annotations; names both places.

    A row group whose ids lie apart from those of all others is not read: a process checks its own rows itself.
    """
    for member, ranges in _ranges(dataset).items():
        doubtful = _overlapping(ranges)
        if doubtful:
            repeated = _repeated(dataset, member, doubtful)
            if repeated:
                _refuse(dataset, member, doubtful, repeated)


def _ranges(dataset: ParquetDataset) -> dict[str, list[_Range]]:
    """Returns the ids of each row group that has some, by their list, as the footers state them."""
    ranges: dict[str, list[_Range]] = {IMAGES: [], ANNOTATIONS: []}
    for path, groups in _by_file(dataset.row_groups).items():
        with dataset.open_file(path) as file:
            meta = file.metadata
        names = [meta.row_group(0).column(n).path_in_schema for n in range(meta.num_columns)]
        for group, (member, column) in product(groups, ID_COLUMNS.items()):
            one = _range(meta.row_group(group.index), group, names, member, column)
            if one.rows:
                ranges[member].append(one)
    return ranges


def _range(meta: Any, group: RowGroup, names: Sequence[str], member: str, column: str) -> _Range:
    ids, index = (meta.column(names.index(name)) for name in (column, "index"))
    rows = group.annotations
    if member == IMAGES:
        rows = group.rows - (index.statistics.null_count if index.statistics is not None else 0)
    stated = ids.statistics
    if stated is None or not stated.has_min_max or not stated.has_null_count:
        return _Range(group, 0, 0, rows, is_complete=False)
    return _Range(group, stated.min, stated.max, rows, is_complete=ids.num_values - stated.null_count == rows)


def _by_file(groups: Iterable[RowGroup]) -> dict[Location, list[RowGroup]]:
    files: dict[Location, list[RowGroup]] = {}
    for group in groups:
        files.setdefault(group.path, []).append(group)
    return files


def _overlapping(ranges: Sequence[_Range]) -> list[_Range]:
    """Returns the ranges that share an id with another one, as far as their bounds tell."""
    if any(not one.is_complete for one in ranges):
        return list(ranges) if len(ranges) > 1 else []
    ordered = sorted(ranges, key=lambda one: one.low)
    shared: set[int] = set()
    last = 0
    for number in range(1, len(ordered)):
        if ordered[number].low <= ordered[last].high:
            shared |= {last, number}
        if ordered[number].high > ordered[last].high:
            last = number
    return [ordered[number] for number in sorted(shared)]


def _repeated(dataset: ParquetDataset, member: str, ranges: Sequence[_Range]) -> set[int]:
    """Returns keys that several rows have; those of ids that are no integers may be equal by chance."""
    passes = -(-sum(one.rows for one in ranges) // IDS_PER_PASS)
    repeated: set[int] = set()
    for number in range(passes):
        keys = _keys(dataset, member, ranges)
        found = np.concatenate([part if passes == 1 else part[part % passes == number] for part in keys])
        found.sort()
        repeated.update(np.unique(found[1:][found[1:] == found[:-1]])[:_LISTED].tolist())
    return repeated


def _keys(dataset: ParquetDataset, member: str, ranges: Sequence[_Range]) -> Iterator[Keys]:
    """Yields a key for each id of each row group: the id itself, or 64 bits of the hash of one that is no integer."""
    rows = {one.group: one.rows for one in ranges}
    others: list[RowGroup] = []
    for path, groups in _by_file(rows).items():
        with dataset.open_file(path) as file:
            for group in groups:
                column = file.read_row_group(group.index, columns=[ID_COLUMNS[member]]).column(0).combine_chunks()
                ids = (column if member == IMAGES else column.flatten().field("id")).drop_null()
                if len(ids) == rows[group]:
                    yield ids.to_numpy(zero_copy_only=False)
                else:
                    others.append(group)
    if others:
        yield np.array([_key(value) for _, _, value in _ids(dataset, member, others)], dtype=np.int64)


def _ids(dataset: ParquetDataset, member: str, groups: Iterable[RowGroup]) -> Iterator[tuple[RowGroup, int, JsonId]]:
    """Yields row group, position and id of each row that has an id."""
    for group, rows in dataset.by_row_group(groups, with_annotations=member == ANNOTATIONS):
        for row in rows:
            values = row.annotations if member == ANNOTATIONS else [] if row.index is None else [(row.index, row.image)]
            for position, value in values:
                found: Any = value.get("id") if isinstance(value, dict) else None
                if is_id(found):
                    yield group, position, found


def _key(value: JsonId) -> int:
    """Returns the key of an id; ids that are equal, such as 1 and 1.0, have the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _refuse(dataset: ParquetDataset, member: str, ranges: Sequence[_Range], keys: set[int]) -> None:
    places: dict[JsonId, list[str]] = {}
    for group, position, value in _ids(dataset, member, [one.group for one in ranges]):
        if _key(value) in keys:
            places.setdefault(value, []).append(f"{base_name(group.path)} {member}[{position}]")
    repeated = {value: found for value, found in places.items() if len(found) > 1}
    if repeated:
        shown = list(repeated.items())[:_LISTED]
        listed = ", ".join(f"{as_json(value)} ({', '.join(found[:2])})" for value, found in shown)
        raise BadDataset(
            f"{dataset.name}: {_KINDS[member]} id {listed} used more than once; ids must be unique: renumber them"
        )
