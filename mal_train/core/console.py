"""Terminal output of a command: lines, and a progress bar that they do not tear. No torch.

Messages for users go to stderr; results go to stdout.
"""

import io
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, TextIO

from tqdm import tqdm

LINE_EVERY_S: Final = 10.0
DETAILS_EVERY_S: Final = 0.5
REDRAW_EVERY_S: Final = 0.1


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
        """Prints one line."""
        tqdm.write(line, file=self.stream)

    def progress(self, total: int, unit: str, label: str = "", **options: Any) -> "ProgressBar":
        """Returns a progress bar on this console; `options` are those of `ProgressBar`."""
        return ProgressBar(self, total, unit, label, **options)


class ProgressBar:
    """Progress with rate and time left: a tqdm bar on a terminal, plain lines elsewhere. A context manager.

    >>> with Console(io.StringIO()).progress(20, "image", "label", clock=iter(range(9)).__next__) as bar:
    ...     bar.update(20, "40 boxes")
    ...     print(bar.console.stream.getvalue().strip())
    label: image 20/20, 20.00 image/s, 00:00 left, 40 boxes

    Args:
        console: the output.
        total: number of items of the job.
        unit: name of one item.
        label: name of the job or of its current phase; may be set later.
        initial: items that were done before; they do not count into the rate.
        line_every_s: least number of seconds between two plain lines. The last item always prints a line.
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
        self.console = console
        self.total = total
        self.label = label
        self.done = initial
        self._unit = unit
        self._line_every_s = line_every_s
        self._clock = clock
        self._rate_from = initial
        self._rate_since = self._shown_at = clock()
        self._details_at = float("-inf")
        self._bar: tqdm[Any] | None = None
        if console.is_terminal:
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=label,
                unit=unit,
                file=console.stream,
                dynamic_ncols=True,
                smoothing=0.1,
                miniters=0,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, done: int, details: str | Callable[[], str] = "") -> None:
        """Shows that `done` items are done.

        Args:
            done: items of the job, with those that were done before.
            details: text behind rate and time left. A function is called only when its text is shown, on a terminal at
                most every `DETAILS_EVERY_S` seconds: to read a loss waits for the device.
        """
        self.done = done
        now = self._clock()
        if self._bar is not None:
            self._bar.set_description_str(self.label, refresh=False)
            if isinstance(details, str) or now - self._details_at >= DETAILS_EVERY_S:
                self._details_at = now
                self._bar.set_postfix_str(_text(details), refresh=False)
            self._bar.update(done - self._bar.n)
        elif done >= self.total or now - self._shown_at >= self._line_every_s:
            self._shown_at = now
            self.console.print(self._line(now, _text(details)))

    def advance(self) -> None:
        """Shows that one more item is done."""
        self.update(self.done + 1)

    def restart_rate(self, done: int) -> None:
        """Measures the rate from `done` items and from now on; call `update` next."""
        self.done = self._rate_from = done
        now = self._rate_since = self._clock()
        if self._bar is None:
            return
        self._bar.initial = self._bar.n = self._bar.last_print_n = done
        self._bar.start_t = self._bar.last_print_t = time.time()  # tqdm's own clock
        # tqdm redraws 0.1 s after `last_print_t` at the earliest, and so never when this is called more often.
        if now - self._shown_at >= REDRAW_EVERY_S:
            self._shown_at = now
            self._bar.refresh()

    def close(self) -> None:
        """Ends the bar; the last state stays on the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, now: float, details: str) -> str:
        parts = [f"{self.label}: " if self.label else "", f"{self._unit} {self.done}/{self.total}"]
        if self.done > self._rate_from and now > self._rate_since:
            item_s = (now - self._rate_since) / (self.done - self._rate_from)
            left = tqdm.format_interval(int(item_s * (self.total - self.done)))
            parts.append(f", {_rate(item_s, self._unit)}, {left} left")
        return "".join(parts) + (f", {details}" if details else "")


def _text(details: str | Callable[[], str]) -> str:
    return details if isinstance(details, str) else details()


def _rate(item_s: float, unit: str) -> str:
    """Formats a rate as items a second, or as seconds an item where those exceed one, as tqdm does.

    >>> _rate(0.5, "batch"), _rate(42.7, "batch")
    ('2.00 batch/s', '42.70 s/batch')
    """
    return f"{1 / item_s:.2f} {unit}/s" if item_s < 1 else f"{item_s:.2f} s/{unit}"
