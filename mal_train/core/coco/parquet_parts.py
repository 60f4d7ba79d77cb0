"""Divides a COCO file in parquet into parts: a few neighboring images of a row group, and one output file each.

A part is read, labeled and written without the others, so that processes of several machines can share a file. Parts
depend on the input and on the number of boxes alone, and are the same however many processes label them.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from mal_train.core.coco.parquet_reader import RowGroup
from mal_train.core.coco.parquet_schema import SUFFIX

PREFIX: Final = "part-"


class Part(NamedTuple):
    """Rows `start` to `stop` of a row group.

    Attributes:
        number: counts the parts of the dataset, in its order.
        row_group: index in the row groups of the dataset.
        start: first row in the row group.
        stop: row behind the last one.
    """

    number: int
    row_group: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the file of the part; names are in the order of the dataset."""
        return part_name(self.number)


def part_name(number: int) -> str:
    """Returns the name of the file of a part.

    >>> part_name(12)
    'part-000000012.parquet'
    """
    return f"{PREFIX}{number:09d}{SUFFIX}"


def is_part_name(name: str) -> bool:
    """Returns True for a name that `part_name` gives.

    >>> is_part_name("part-000000012.parquet"), is_part_name("part-00000-of-00016.parquet")
    (True, False)
    """
    number = name.removeprefix(PREFIX).removesuffix(SUFFIX)
    return number.isdecimal() and part_name(int(number)) == name


def divide(row_groups: Sequence[RowGroup], boxes: int) -> list[Part]:
    """Returns the parts of a dataset.

    Parts of a row group have equally many images, whose number follows from the mean of the row group.

    Args:
        row_groups: all of the dataset.
        boxes: boxes of a part, about.
    """
    parts: list[Part] = []
    for index, group in enumerate(row_groups):
        wanted = max(1, min(group.rows, round(group.annotations / boxes)))
        rows = max(1, -(-group.rows // wanted))
        for start in range(0, group.rows, rows):
            parts.append(Part(len(parts), index, start, min(start + rows, group.rows)))
    return parts


def tasks_of(parts: Sequence[Part], size: int) -> list[list[Part]]:
    """Groups parts, in their order, into tasks of up to `size` neighbors in a row group, which are read together."""
    tasks: list[list[Part]] = []
    for part in parts:
        last = tasks[-1] if tasks else []
        is_next = last and (last[-1].number + 1, last[-1].row_group) == (part.number, part.row_group)
        if is_next and len(last) < size:
            last.append(part)
        else:
            tasks.append([part])
    return tasks
