"""Reports the progress of a job on a COCO file: a bar or lines for users, JSON lines for programs."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

from mal_client.types import DatasetResult, Progress
from mal_train.core.console import Console, ProgressBar
from mal_train.core.numbers import counted

LINE_EVERY_S: Final = 5.0


class ProgressDisplay:
    """Progress bar on a terminal, or one line every `LINE_EVERY_S` seconds elsewhere.

    A context manager; call it with each `Progress`.

    Args:
        label: name of the job, for example "label".
        stream: the output, stderr by default.
        clock: monotonic seconds.
        counts_boxes: False for a job on images alone.
        failed: word for the boxes that `Progress.boxes_failed` counts.
    """

    def __init__(
        self,
        label: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        counts_boxes: bool = True,
        failed: str = "failed",
    ) -> None:
        self._label = label
        self._failed = failed
        self._console = Console(stream)
        self._clock = clock
        self._counts_boxes = counts_boxes
        self.bar: ProgressBar | None = None
        self._images_before: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, progress: Progress) -> None:
        """Shows the state of the job."""
        if self.bar is None:
            self.bar = self._console.progress(
                progress.images_total, "image", self._label, line_every_s=LINE_EVERY_S, clock=self._clock
            )
        if progress.images_before != self._images_before:
            # The first image of this run also opens the connection; those of an earlier run cost nothing.
            self._images_before = progress.images_before
            self.bar.restart_rate(progress.images_done)
        self.bar.update_to(
            progress.images_done, partial(_boxes, progress, self._failed) if self._counts_boxes else None
        )

    def notice(self, text: str) -> None:
        """Prints one message."""
        self._console.print(f"mal-client: {text}")


class JsonLog:
    """Counterpart of `ProgressDisplay` for programs: one JSON object a line, each with an `event`.

    Args:
        stream: the output, stderr by default.
        clock: monotonic seconds.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr or io.StringIO()
        self._clock = clock
        self._started_at = clock()
        self._last_line_s = -LINE_EVERY_S

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._write("stopped", error=type(error).__name__, message=str(error))

    def __call__(self, progress: Progress) -> None:
        """Writes the state of the job, at most every `LINE_EVERY_S` seconds, and always the last one."""
        elapsed_s = self._clock() - self._started_at
        if progress.images_done >= progress.images_total or elapsed_s - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = elapsed_s
            self._write(
                "progress",
                images_done=progress.images_done,
                images_total=progress.images_total,
                boxes_done=progress.boxes_done,
                boxes_failed=progress.boxes_failed,
            )

    def notice(self, text: str) -> None:
        """Writes one message."""
        self._write("notice", message=text)

    def result(self, result: DatasetResult, shown: Callable[[Path], str] = str) -> None:
        """Writes the result of a labeling job; `shown` returns the name of a written file."""
        self._write(
            "done",
            output=shown(result.output),
            labeled=result.labeled,
            copied=result.copied,
            crowds=result.crowds,
            flags=dict(result.flags),
            failed=result.failed_count,
            errors_file=None if result.errors_file is None else shown(result.errors_file),
            final=result.is_final,
        )

    def _write(self, event: str, **fields: Any) -> None:
        line = {"event": event, "seconds": round(self._clock() - self._started_at, 3), **fields}
        print(json.dumps(line), file=self._stream, flush=True)


def _boxes(progress: Progress, failed: str) -> str:
    miou = "" if progress.running_miou is None else f", mIoU {progress.running_miou:.3f}"
    return f"{counted(progress.boxes_done, 'box')}, {progress.boxes_failed} {failed}{miou}"
