"""Read-ahead: order, parallel reads, bounds of items and bytes, errors, and takers that never come."""

import threading
import time
from collections.abc import Callable

import pytest

from mal_train.core.storage.read_ahead import ReadAhead

WAIT_S = 30.0


def ahead(items: range, read: Callable[[int], bytes], **options: int) -> ReadAhead[int, bytes]:
    return ReadAhead(items, read, len, lambda item: item, **options)


def noting(items: list[int]) -> Callable[[int], bytes]:
    def read(item: int) -> bytes:
        items.append(item)
        return b"x"

    return read


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_items_come_in_order_with_their_content() -> None:
    with ahead(range(100), lambda item: b"%d" % item) as items:
        assert [(item, items.take(item)) for item in items] == [(n, b"%d" % n) for n in range(100)]


def test_reads_run_in_parallel() -> None:
    barrier = threading.Barrier(4, timeout=WAIT_S)

    def read(item: int) -> bytes:
        barrier.wait()
        return b"%d" % item

    with ahead(range(8), read, readers=4) as items:
        assert [items.take(item) for item in items] == [b"%d" % n for n in range(8)]


def test_no_more_items_are_read_than_allowed() -> None:
    started: list[int] = []
    with ahead(range(100), noting(started), max_items=5, readers=2) as items:
        first = next(items)
        until(lambda: len(started) == 5)
        time.sleep(0.05)
        assert len(started) == 5
        assert items.take(first) == b"x"


def test_bytes_ahead_are_bounded() -> None:
    held: list[int] = []
    with ahead(range(50), lambda _: bytes(10), max_bytes=100, readers=4) as items:
        for item in items:
            time.sleep(0.001)
            held.append(items.held_bytes())
            items.take(item)
    assert max(held) <= 100 + 4 * 10
    assert items.held_bytes() == 0


def test_content_that_nobody_takes_blocks_no_other_item() -> None:
    with ahead(range(20), lambda item: bytes(100), max_bytes=100, readers=2) as items:
        drawn = list(items)
        assert [len(items.take(item)) for item in reversed(drawn[3:])] == [100] * 17


def test_error_of_a_read_is_raised_by_take_alone() -> None:
    def read(item: int) -> bytes:
        if item == 1:
            raise KeyError(item)
        return b"x"

    with ahead(range(3), read) as items:
        drawn = list(items)
        with pytest.raises(KeyError):
            items.take(drawn[1])
        assert items.take(drawn[0]) == items.take(drawn[2]) == b"x"


def test_error_of_a_size_is_raised_by_take_and_the_reader_goes_on() -> None:
    def size_of(content: int) -> int:
        if content == 1:
            raise ValueError(content)
        return 1

    with ReadAhead(range(9), lambda item: item, size_of, lambda item: item, readers=1) as items:
        drawn = list(items)
        until(lambda: items.held_bytes() == len(drawn) - 1)
        with pytest.raises(ValueError, match="1"):
            items.take(1)
        assert [items.take(item) for item in range(2, 9)] == [*range(2, 9)]


def test_second_take_reads_again() -> None:
    reads: list[int] = []
    with ahead(range(1), noting(reads)) as items:
        (item,) = items
        assert items.take(item) == items.take(item) == b"x"
    assert reads == [0, 0]


def test_threads_end_when_it_is_closed() -> None:
    before = threading.active_count()
    with ahead(range(3), lambda _: b"x"):
        pass
    until(lambda: threading.active_count() <= before)
