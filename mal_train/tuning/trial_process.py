"""One trial: a process `mal-train train` with an output folder of its own, watched through its status.json."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mal_train.core.errors import OutputError, Terminated
from mal_train.core.numbers import finite_number
from mal_train.distributed.env import TUNER
from mal_train.distributed.launch import SAVE_GRACE_S
from mal_train.training.run_files import VALIDATED, StatusReader

PROGRAM = (sys.executable, "-m", "mal_train.cli")
SAVED = Terminated.exit_code
"""Exit code of a training that SIGTERM ended after it had saved."""
INTERRUPTED = (SAVED, 130, -signal.SIGTERM, -signal.SIGINT)
"""Exit codes of a training that a signal ended, before or after it could save."""
MAX_REASON = 500
"""Maximum number of characters of a failure's reason."""


@dataclass(frozen=True)
class Validation:
    """The metrics of a training after an epoch; None for those that are not finite."""

    epoch: int
    metrics: Mapping[str, float | None]


class TrialProcess:
    """A running training.

    Args:
        spec: file with the spec of the training.
        folder: folder of the trial, in which <folder>/train is the output folder of the training.
        threads: threads of the process for computation on the CPU; None leaves them to it.
        program: command that runs `mal-train`.
        clock: monotonic seconds.

    Raises:
        OutputError: the folder cannot be written, or the process not started.
    """

    def __init__(
        self,
        spec: Path,
        folder: Path,
        *,
        threads: int | None = None,
        program: Sequence[str] = PROGRAM,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._clock = folder / "log.txt", clock
        self._status = StatusReader(folder / "train")
        self._kill_at: float | None = None
        self.began = clock()
        environment = {**os.environ, TUNER: str(os.getpid())}
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        try:
            with self._log.open("ab") as log:
                # A session of its own: Ctrl-C reaches the tuner alone, which decides.
                self._process = subprocess.Popen(
                    [*program, "train", "-e", str(spec)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise OutputError(f"{folder}: the trial cannot be started: {error.strerror}") from error

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.began

    def validations(self) -> list[Validation]:
        """Returns the validations since the last call, in order."""
        return [
            Validation(int(line["epoch"]), _finite(line.get("kpi") or {}))
            for line in self._status.new_lines()
            if line.get("message") == VALIDATED and isinstance(line.get("epoch"), int)
        ]

    def stop(self) -> None:
        """Asks the training to save and end: SIGTERM, and SIGKILL if it does not end within `SAVE_GRACE_S`."""
        if self._kill_at is None:
            self._kill_at = self._clock() + SAVE_GRACE_S
            self._process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int | None:
        """Returns the exit code, -n after signal n; None while the process runs."""
        code = self._process.poll()
        if code is None and self._kill_at is not None and self._clock() > self._kill_at:
            self.kill()
        return code

    def kill(self) -> None:
        """Kills the process and those that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def failure(self, code: int) -> str:
        """Returns why the training failed: its last message and its exit code."""
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{ending}: {_last_message(self._log)}"


def _finite(metrics: Mapping[str, object]) -> dict[str, float | None]:
    return {name: finite_number(value) for name, value in metrics.items()}


def _last_message(log: Path) -> str:
    """Returns the last error line of a log, else its last line."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return "no log"
    lines = [line for line in lines if line] or ["the log is empty"]
    errors = [line.removeprefix("mal-train: ") for line in lines if line.startswith("mal-train: ")]
    return (errors or lines)[-1][:MAX_REASON]
