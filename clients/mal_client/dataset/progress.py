"""Shows how far a job is: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from mal_client.types import DatasetResult, Progress

LINE_EVERY_S = 5.0
JUMP_EVERY_S = 0.1


class ProgressDisplay:
    """Context manager; call it with each `Progress`.

    Args:
        what: the job in a word, for example "label".
        stream: where to write; the bar appears when it is a terminal.
        clock: monotonic seconds.
        counts_boxes: False for a job on images alone.
    """

    def __init__(
        self,
        what: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        counts_boxes: bool = True,
    ) -> None:
        self._what = what
        self._counts_boxes = counts_boxes
        # A job whose stderr was closed (`2>&-`) has none at all.
        self._stream = stream or sys.stderr or io.StringIO()
        self._clock = clock
        self._started = self._last_line = clock()
        self._bar: tqdm[Any] | None = None
        self._last_jump = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> None:
        """Shows the state, at most one plain line in LINE_EVERY_S seconds, and always the last."""
        if self._stream.isatty():
            self._show_bar(progress)
            return
        is_last = progress.images_done >= progress.images_total
        if is_last or self._clock() - self._last_line >= LINE_EVERY_S:
            self._last_line = self._clock()
            print(self._line(progress), file=self._stream, flush=True)

    def notice(self, text: str) -> None:
        """Says something once."""
        tqdm.write(f"mal-client: {text}", file=self._stream)

    def _show_bar(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=progress.images_total,
                initial=progress.images_before,
                desc=self._what,
                unit="image",
                file=self._stream,
            )
        if self._counts_boxes:
            self._bar.set_postfix_str(_boxes(progress), refresh=False)
        self._jump(self._bar, progress.images_before - self._bar.initial)
        self._bar.update(progress.images_done - self._bar.n)

    def _jump(self, bar: tqdm[Any], images: float) -> None:
        """Moves the bar over what an unfinished run left, which is not to count into its rate."""
        bar.initial += images
        bar.n += images
        bar.last_print_n += images
        if images and self._clock() - self._last_jump >= JUMP_EVERY_S:
            self._last_jump = self._clock()
            bar.refresh()

    def _line(self, progress: Progress) -> str:
        passed_s = max(1e-9, self._clock() - self._started)
        rate = (progress.images_done - progress.images_before) / passed_s
        left_s = (progress.images_total - progress.images_done) / rate if rate > 0 else 0.0
        boxes = f" {_boxes(progress)}," if self._counts_boxes else ""
        return (
            f"{self._what}: {progress.images_done}/{progress.images_total} images,{boxes} "
            f"{rate:.1f} images/s, {left_s:.0f} s left"
        )


class JsonLog:
    """As `ProgressDisplay`, for programs: one JSON object a line, each with an `event`.

    Args:
        stream: where to write.
        clock: monotonic seconds.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = clock()
        self._last_line = -LINE_EVERY_S

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._write("stopped", error=type(error).__name__, message=str(error))

    def __call__(self, progress: Progress) -> None:
        """The state: at most one line in LINE_EVERY_S seconds, and always the last."""
        passed_s = self._clock() - self._started
        if progress.images_done >= progress.images_total or passed_s - self._last_line >= LINE_EVERY_S:
            self._last_line = passed_s
            self._write(
                "progress",
                images_done=progress.images_done,
                images_total=progress.images_total,
                boxes_done=progress.boxes_done,
                boxes_failed=progress.boxes_failed,
            )

    def notice(self, text: str) -> None:
        """Something that is said once."""
        self._write("notice", message=text)

    def result(self, result: DatasetResult) -> None:
        """How a labeling job ended."""
        self._write(
            "done",
            output=str(result.output),
            labeled=result.labeled,
            copied=result.copied,
            failed=result.failed_count,
            errors_file=None if result.errors_file is None else str(result.errors_file),
            final=result.is_final,
        )

    def _write(self, event: str, **what: Any) -> None:
        line = {"event": event, "seconds": round(self._clock() - self._started, 3), **what}
        print(json.dumps(line), file=self._stream, flush=True)


def _boxes(progress: Progress) -> str:
    miou = "" if progress.running_miou is None else f", mIoU {progress.running_miou:.3f}"
    return f"{progress.boxes_done} boxes, {progress.boxes_failed} failed{miou}"
