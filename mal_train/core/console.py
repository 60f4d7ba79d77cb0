"""Terminal output of a command: lines, and a progress bar that they do not tear. No torch.

Messages for users go to stderr; results go to stdout.
"""

import io
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TextIO

from tqdm import tqdm

LINE_EVERY_S: Final = 8.0
REDRAW_EVERY_S: Final = 0.25


def escape_control(text: str) -> str:
    r"""Returns text with an escape for each character that a terminal would obey instead of show.

    Line breaks and tabs stay. Text from outside, such as the name of a file or a category, could otherwise move the
    cursor, change the title or clipboard, or reverse the order of letters.

    >>> print(escape_control("a\x1b[2J\u202eb é"))
    a\x1b[2J\u202eb é
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def escape_unencodable() -> None:
    r"""Lets stdout and stderr write an escape, such as \xe9, for each character that their encoding lacks.

    Under PYTHONIOENCODING=ascii or some locales, one name of a file would otherwise end a command after its work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_result(text: str) -> None:
    """Prints to stdout with control characters escaped (`escape_control`)."""
    print(escape_control(text), flush=True)


class _NullStream(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)


class Console:
    """A stream for messages to the user, stderr by default. Lines appear above the progress bar, if one is shown."""

    def __init__(self, stream: TextIO | None = None) -> None:
        # A job whose stderr was closed (`2>&-`) has none at all.
        self.stream = stream or sys.stderr or io.StringIO()
        self.is_terminal = self.stream.isatty()

    @classmethod
    def silent(cls) -> "Console":
        """Returns a console that discards everything, for all processes of a group but the first."""
        return cls(_NullStream())

    def print(self, line: str) -> None:
        """Prints one line; control characters are escaped (`escape_control`)."""
        line = escape_control(line)
        if self.is_terminal:
            tqdm.write(line, file=self.stream)
        else:  # tqdm would erase and redraw a bar that is not drawn
            print(line, file=self.stream, flush=True)

    def progress(self, total: int, unit: str, label: str = "", **options: Any) -> "ProgressBar":
        """Returns a progress bar on this console; `options` are those of `ProgressBar`."""
        return ProgressBar(self, total, unit, label, **options)


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """Progress with rate and time left: a tqdm bar on a terminal, plain lines elsewhere. A context manager.

    >>> with Console(io.StringIO()).progress(20, "image", "label", clock=iter(range(9)).__next__) as bar:
    ...     bar.update_to(20, lambda: "40 boxes")
    ...     print(bar.fp.getvalue().strip())
    label: image 20/20, 10.00 image/s, 00:00 left, 40 boxes

    Args:
        console: the output.
        total: number of items of the job.
        unit: name of one item.
        label: name of the job or of its current phase.
        initial: items that were done before; they do not count into the rate.
        line_every_s: least number of seconds between two plain lines. The last item prints a line in any case.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        unit: str,
        label: str = "",
        *,
        initial: int = 0,
        line_every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_terminal = console.is_terminal
        self._items = total
        self._details: Callable[[], str] | None = None
        super().__init__(
            total=total,
            initial=initial,
            desc=escape_control(label),
            unit=unit,
            file=console.stream,
            leave=console.is_terminal,
            dynamic_ncols=console.is_terminal,
            mininterval=REDRAW_EVERY_S if console.is_terminal else line_every_s,
            miniters=0,
            smoothing=0.1,
            delay=0 if console.is_terminal else 1e-9,  # no line before the first item
        )
        # Only the constructor needs the delay; later it could suppress a line after `restart_rate`.
        self.delay = 0
        self._time = clock
        self.start_t = self.last_print_t = clock()

    def update(self, n: float | None = 1) -> bool | None:
        """Counts `n` more items; returns True if the progress was shown. The last item always shows it."""
        is_shown = super().update(n)
        if not is_shown and self.n >= self._items:
            self.refresh()
            return True
        return is_shown

    def update_to(self, done: int, details: Callable[[], str] | None = None, label: str | None = None) -> None:
        """Shows that `done` items are done.

        Args:
            done: items of the job, with those that were done before.
            details: returns the text behind rate and time left; called only when it is shown.
            label: replaces the label.
        """
        self._details = details
        if label is not None:
            label = escape_control(label)
            self.desc = f"{label}: " if self._is_terminal else label
        self.update(done - self.n)

    def restart_rate(self, done: int, *, postpone_line: bool = False) -> None:
        """Measures the rate from `done` items and from now on; call `update_to` next.

        Args:
            done: items of the job, with those that were done before.
            postpone_line: print no plain line before `line_every_s` from now.
        """
        self.initial = self.n = self.last_print_n = done
        # The rate of the bar is a moving average, which needs no restart.
        if not self._is_terminal:
            self.start_t = self._time()
            if postpone_line:
                self.last_print_t = self.start_t

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draws the bar or prints a line; tqdm calls it."""
        if self._details is not None and msg is None:
            self.postfix = escape_control(self._details())
        if self._is_terminal:
            super().display(msg, pos)
        elif msg is None:
            self.fp.write(f"{self._line()}\n")

    def _line(self) -> str:
        parts = [f"{self.desc}: " if self.desc else "", f"{self.unit} {self.n}/{self._items}"]
        elapsed_s, items = self._time() - self.start_t, self.n - self.initial
        if items > 0 and elapsed_s > 0:
            left = self.format_interval(int(elapsed_s / items * (self._items - self.n)))
            parts.append(f", {_rate(elapsed_s / items, self.unit)}, {left} left")
        return "".join(parts) + (f", {self.postfix}" if self.postfix else "")


def _rate(item_s: float, unit: str) -> str:
    """Formats a rate as items a second, or as seconds an item where those exceed one, as tqdm does.

    >>> _rate(0.5, "batch"), _rate(42.7, "batch")
    ('2.00 batch/s', '42.70 s/batch')
    """
    return f"{1 / item_s:.2f} {unit}/s" if item_s < 1 else f"{item_s:.2f} s/{unit}"
