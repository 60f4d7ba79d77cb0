"""Parts of a dataset hold every row once, and depend on the row groups and the number of boxes alone."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal_train.core.coco.parquet_parts import divide, tasks_of
from mal_train.core.coco.parquet_reader import RowGroup

GROUPS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 500)), max_size=6)


def row_groups(counts: list[tuple[int, int]]) -> list[RowGroup]:
    return [RowGroup(Path("a.parquet"), index, rows, boxes) for index, (rows, boxes) in enumerate(counts)]


@given(GROUPS, st.integers(1, 600))
def test_every_row_is_in_one_part_and_parts_are_in_order(counts: list[tuple[int, int]], boxes: int) -> None:
    parts = divide(row_groups(counts), boxes)
    rows = [(part.row_group, row) for part in parts for row in range(part.start, part.stop)]
    assert rows == [(group, row) for group, (count, _) in enumerate(counts) for row in range(count)]
    assert [part.number for part in parts] == list(range(len(parts)))
    assert [part.name for part in parts] == sorted(part.name for part in parts)


def test_a_part_has_about_the_boxes_that_are_asked_for() -> None:
    parts = divide(row_groups([(100, 1000), (10, 100), (3, 9)]), 50)
    assert [part.stop - part.start for part in parts] == [5] * 20 + [5] * 2 + [3]


@pytest.mark.parametrize("boxes", [1, 10**6])
def test_an_image_is_never_divided_and_a_part_never_crosses_row_groups(boxes: int) -> None:
    assert len(divide(row_groups([(1, 1000), (2, 1000)]), boxes)) == (3 if boxes == 1 else 2)


@given(GROUPS, st.integers(1, 9), st.data())
def test_tasks_hold_neighboring_parts_of_one_row_group(
    counts: list[tuple[int, int]], size: int, data: st.DataObject
) -> None:
    parts = divide(row_groups(counts), 20)
    left = [part for part in parts if data.draw(st.booleans())]
    tasks = tasks_of(left, size)
    assert [part for task in tasks for part in task] == left
    for task in tasks:
        assert 1 <= len(task) <= size
        assert [part.number for part in task] == list(range(task[0].number, task[0].number + len(task)))
        assert len({part.row_group for part in task}) == 1
