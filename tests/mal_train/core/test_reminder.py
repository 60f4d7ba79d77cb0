"""A reminder comes when nothing happened for an interval, and not otherwise."""

import threading

from mal_train.core.reminder import Reminder

LONG_S = 60.0


def test_a_reminder_comes_again_and_again_while_nothing_happens() -> None:
    calls = threading.Semaphore(0)
    with Reminder(0.001, calls.release):
        assert all(calls.acquire(timeout=LONG_S) for _ in range(3))


def test_no_reminder_comes_while_something_happens_or_at_the_end() -> None:
    calls: list[None] = []
    with Reminder(LONG_S, lambda: calls.append(None)) as reminder:
        for _ in range(3):
            reminder.postpone()
    assert calls == []
