"""The terminal of whoever runs a command: lines, and a bar that they do not tear. No torch."""

import io
import sys
from typing import Any, TextIO

from tqdm import tqdm


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)


class Console:
    """Prints lines above the bar, where there is one. Everything for people goes to stderr; results go to stdout."""

    def __init__(self, stream: TextIO | None = None) -> None:
        # A job whose stderr was closed (`2>&-`) has none at all.
        self.stream = stream or sys.stderr or io.StringIO()
        self.is_terminal = self.stream.isatty()

    @classmethod
    def silent(cls) -> "Console":
        """A screen that nobody sees: one process of several speaks for all."""
        return cls(_Nowhere())

    def say(self, line: str) -> None:
        """One line."""
        tqdm.write(line, file=self.stream)

    def bar(self, total: int, initial: int, unit: str) -> "tqdm[Any]":
        """A bar; not shown where the stream is no terminal."""
        return tqdm(
            total=total,
            initial=initial,
            unit=unit,
            file=self.stream,
            disable=not self.is_terminal,
            dynamic_ncols=True,
            smoothing=0.1,
        )
