"""Calls a function when nothing has happened for a while."""

import threading
from collections.abc import Callable


class Reminder:
    """Timer that calls a function when nothing has happened for a while, and again each time. A context manager.

    Args:
        interval_s: seconds.
        remind: called in a thread.
    """

    def __init__(self, interval_s: float, remind: Callable[[], object]) -> None:
        self._interval_s, self._remind = interval_s, remind
        self._happened = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="reminder", daemon=True)

    def __enter__(self) -> "Reminder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self.postpone()
        self._thread.join()

    def postpone(self) -> None:
        """Starts the interval again."""
        self._happened.set()

    def _run(self) -> None:
        while not self._is_over:
            if not self._happened.wait(self._interval_s):
                self._remind()
            self._happened.clear()
