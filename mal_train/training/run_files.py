"""What a run leaves for machines to read: status.json (one JSON object a line), metrics.csv and TensorBoard events.

status.json follows TAO's layout, except that a run that succeeds says SUCCESS and every failure says FAILURE.
"""

import csv
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any, Literal

from mal_train.core.errors import OutputError
from mal_train.core.masks.images import RgbImage
from mal_train.core.metrics.report import EvaluationReport

Status = Literal["STARTED", "RUNNING", "SUCCESS", "FAILURE"]
Figures = Mapping[str, float | None]

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
)


class StatusFile:
    """Appends lines to <folder>/status.json; each is on disk when the call returns."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "status.json"
        self._kpi: dict[str, float | None] = {}

    def write(
        self,
        status: Status,
        message: str,
        *,
        kpi: Figures | None = None,
        progress: Mapping[str, object] | None = None,
    ) -> None:
        """One line. `kpi` figures stay on later lines until replaced; `progress` stands on this one only.

        Raises:
            OutputError: the line could not be written.
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
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error


def note_failure(folder: Path, message: str) -> None:
    """Says FAILURE in <folder>/status.json where a run ended without saying how: it was killed."""
    path = folder / "status.json"
    if not path.is_file():
        return
    _cut_torn_line(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines and json.loads(lines[-1])["status"] in {"STARTED", "RUNNING"}:
        StatusFile(folder).write("FAILURE", message)


def _cut_torn_line(path: Path) -> None:
    """Takes off what stands behind the last line break: a process was killed while it wrote that line."""
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


class MetricsFile:
    """Rows of METRIC_COLUMNS in a CSV file, and the same figures as TensorBoard events.

    Args:
        folder: gets metrics.csv and the event files.
        append: keep earlier rows (a resumed run) instead of starting anew; but not half a row, left by a kill.
    """

    def __init__(self, folder: Path, *, append: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  half a second, and only training needs it

        path = folder / "metrics.csv"
        try:
            if append and path.exists():
                _cut_torn_line(path)
            has_rows = append and path.exists() and path.stat().st_size > 0
            self._file: IO[str] = path.open("a" if append else "w", encoding="utf-8", newline="")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        self._rows = csv.DictWriter(self._file, METRIC_COLUMNS, restval="")
        if not has_rows:
            self._rows.writeheader()
        self._events = SummaryWriter(str(folder))

    def add(self, kind: Literal["train", "val"], epoch: int, step: int, figures: Figures) -> None:
        """One row; figures that are None stay empty. OutputError when it cannot be written."""
        known = {name: value for name, value in figures.items() if value is not None}
        shown = {name: f"{value:.6g}" for name, value in known.items()}
        try:
            self._rows.writerow({"kind": kind, "epoch": epoch, "step": step, **shown})
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._file.name}: cannot be written: {error.strerror}") from error
        for name, value in known.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def add_picture(self, name: str, picture: RgbImage, step: int) -> None:
        """A picture (h, w, 3) uint8 among the TensorBoard events."""
        self._events.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Everything on disk."""
        self._file.close()
        self._events.close()


def read_metrics(folder: Path) -> list[dict[str, float | str]]:
    """The rows of metrics.csv by rising step, empty cells left out.

    A run that was killed and went on has steps twice; the later row counts.
    """
    found: dict[tuple[str, int], dict[str, float | str]] = {}
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            figures = {name: float(value) for name, value in row.items() if name != "kind" and value}
            found[row["kind"], int(row["step"])] = {"kind": row["kind"], **figures}
    return [found[key] for key in sorted(found, key=lambda key: key[1])]


def figures_of(report: EvaluationReport) -> dict[str, float | None]:
    """The figures that curves and status.json carry, by name; mIoU is the mean over instances."""
    return {
        "mIoU": report.overall.miou,
        **{f"mIoU_{name}": group.miou for name, group in report.by_size.items()},
        "mIoU_class": report.class_miou,
        "AP@1": report.ap_at_1.get("AP"),
        "AP@score": report.ap_at_score.get("AP"),
    }


def one_line(report: EvaluationReport) -> str:
    """The figures as one line for people."""
    shown = [f"{name} {value:.3f}" for name, value in figures_of(report).items() if value is not None]
    text = ", ".join(shown) or "no mask could be compared"
    skipped = ", ".join(f"{n} {reason}" for reason, n in report.skipped.items())
    return f"{text} over {report.overall.count} masks" + (f"; not counted: {skipped}" if skipped else "")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as TAO's status lines write them.

    >>> duration(65.4)
    '0:01:05'
    """
    return str(timedelta(seconds=round(seconds)))
