"""Machine-readable files of a run: status.json (one JSON object per line), metrics.csv and TensorBoard events.

status.json follows TAO's layout, except that the last line is SUCCESS or FAILURE for every run.
"""

import csv
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any, Literal

from mal_train.core.atomic_io import drop_partial_line
from mal_train.core.errors import OutputError
from mal_train.core.images.decoder import RgbImage
from mal_train.core.locked_file import no_follow
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.numbers import counted

Status = Literal["STARTED", "RUNNING", "SUCCESS", "FAILURE"]
VALIDATED = "Eval metrics generated."
"""Message of the line with the metrics of a validation; TAO's."""
MetricValues = Mapping[str, float | None]

METRIC_COLUMNS = (
    "kind",
    "epoch",
    "step",
    "lr",
    "loss",
    "loss_mil",
    "loss_crf",
    "loss_logit",
    "loss_mask",
    "seconds_per_step",
    "mIoU",
    "mIoU_small",
    "mIoU_medium",
    "mIoU_large",
    "mIoU_class",
    "AP@1",
    "AP@score",
    "tightness",
    "stability",
    "box_proxy",
)


class StatusFile:
    """The file <folder>/status.json; each line is on disk when `write` returns."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "status.json"
        self._kpi: dict[str, float | None] = {}

    def write(
        self,
        status: Status,
        message: str,
        *,
        kpi: MetricValues | None = None,
        progress: Mapping[str, object] | None = None,
    ) -> None:
        """Appends a line.

        Args:
            status: state of the run.
            message: description of the event.
            kpi: metrics by name; later lines repeat them until they are replaced.
            progress: further fields of this line.

        Raises:
            OutputError: the line cannot be written.
        """
        self._kpi.update(kpi or {})
        now = datetime.now()
        line: dict[str, Any] = {
            "date": f"{now.month}/{now.day}/{now.year}",
            "time": f"{now.hour}:{now.minute}:{now.second}",
            "status": status,
            "verbosity": "ERROR" if status == "FAILURE" else "INFO",
            "message": message,
            **(progress or {}),
        }
        if self._kpi:
            line["kpi"] = self._kpi
        try:
            with open(self.path, "a", encoding="utf-8", opener=no_follow) as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error


def note_failure(folder: Path, message: str) -> None:
    """Appends FAILURE to <folder>/status.json if the last line is of a running command, which was then killed."""
    path = folder / "status.json"
    if not path.is_file():
        return
    drop_partial_line(path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines and _status(lines[-1]) in {"STARTED", "RUNNING"}:
        StatusFile(folder).write("FAILURE", message)


class StatusReader:
    """Reads the lines that a run appends to <folder>/status.json."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "status.json"
        self._offset = 0

    def new_lines(self) -> list[dict[str, Any]]:
        """Returns the complete lines since the last call, in order; none before the file exists."""
        try:
            with open(self._path, "rb", opener=no_follow) as file:
                file.seek(self._offset)
                complete, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be read: {error.strerror}") from error
        self._offset += len(complete) + len(end)
        rows = map(_row, complete.decode("utf-8", errors="replace").splitlines())
        return [row for row in rows if row is not None]


def _status(line: str) -> object:
    """Returns the status of a line; None for a line that another program wrote."""
    return (_row(line) or {}).get("status")


def _row(line: str) -> dict[str, Any] | None:
    """Returns the object of a line; None for a line that another program wrote."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class MetricsFile:
    """The file metrics.csv with `METRIC_COLUMNS`, and TensorBoard events with the same values.

    Args:
        folder: folder of metrics.csv and the event files.
        append: keep the complete rows of an existing file (a resumed run) instead of replacing it.
    """

    def __init__(self, folder: Path, *, append: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  takes half a second, and only training needs it

        path = folder / "metrics.csv"
        try:
            if append and path.exists():
                drop_partial_line(path)
            has_rows = append and path.exists() and path.stat().st_size > 0
            self._file: IO[str] = open(path, "a" if append else "w", encoding="utf-8", newline="", opener=no_follow)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        self._rows = csv.DictWriter(self._file, METRIC_COLUMNS, restval="")
        if not has_rows:
            self._rows.writeheader()
        self._events = SummaryWriter(str(folder))

    def add(self, kind: Literal["train", "val"], epoch: int, step: int, values: MetricValues) -> None:
        """Appends a row; values that are None give empty cells. Raises OutputError if it cannot be written."""
        known = {name: value for name, value in values.items() if value is not None}
        cells = {name: f"{value:.6g}" for name, value in known.items()}
        try:
            self._rows.writerow({"kind": kind, "epoch": epoch, "step": step, **cells})
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._file.name}: cannot be written: {error.strerror}") from error
        for name, value in known.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def add_image(self, name: str, image: RgbImage, step: int) -> None:
        """Adds an image (h, w, 3) uint8 to the TensorBoard events."""
        self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        self._events.close()


def read_metrics(folder: Path) -> list[dict[str, float | str]]:
    """Returns the rows of metrics.csv in the order of their steps, without empty cells.

    A run that was killed and resumed may have two rows for a step; the later row is returned.
    """
    rows: dict[tuple[str, int], dict[str, float | str]] = {}
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = {name: float(value) for name, value in row.items() if name != "kind" and value}
            rows[row["kind"], int(row["step"])] = {"kind": row["kind"], **values}
    return [rows[key] for key in sorted(rows, key=lambda key: key[1])]


def validation_metrics(report: EvaluationReport) -> dict[str, float | None]:
    """Returns the metrics of metrics.csv and status.json, by name; mIoU is the mean over instances."""
    return {
        "mIoU": report.overall.miou,
        **{f"mIoU_{name}": group.miou for name, group in report.by_size.items()},
        "mIoU_class": report.class_miou,
        "AP@1": report.ap_at_1.get("AP"),
        "AP@score": report.ap_at_score.get("AP"),
    }


def summary_line(report: EvaluationReport) -> str:
    """Returns the metrics of a validation as one line of text."""
    metrics = [f"{name} {value:.3f}" for name, value in validation_metrics(report).items() if value is not None]
    text = ", ".join(metrics) or "no mask could be compared"
    skipped = ", ".join(f"{n} {reason}" for reason, n in report.skipped.items())
    return f"{text} over {counted(report.overall.count, 'mask')}" + (f"; skipped: {skipped}" if skipped else "")


def duration(seconds: float) -> str:
    """Formats seconds as H:MM:SS, as in TAO's status lines.

    >>> duration(65.4)
    '0:01:05'
    """
    return str(timedelta(seconds=round(seconds)))
