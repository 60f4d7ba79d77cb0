"""Runs the trials of a study: starts trainings on free devices, watches them, prunes them, and records how they end."""

import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from mal_train.config.spec import Spec
from mal_train.core.atomic_io import write_text
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError, MalError, OutputError, Terminated
from mal_train.core.yaml_config import dump
from mal_train.training.run_files import duration
from mal_train.tuning.objective import Objective
from mal_train.tuning.owner import machine_of
from mal_train.tuning.space import shown_values, trial_spec
from mal_train.tuning.storage import quiet_optuna
from mal_train.tuning.study import ATTEMPT, EXIT_CODE, FOLDER, HEARTBEAT_S, METRICS, OWNER, REASON, SECONDS, SharedStudy
from mal_train.tuning.trial_process import INTERRUPTED, PROGRAM, TrialProcess, Validation

POLL_S = 0.2
"""Seconds between two looks at the processes."""
STUDY_EVERY_S = 5.0
"""Seconds between two looks at the trials of other tuners."""
ALL_FAILED = 5
"""Failed trials after which a study without any other result ends."""

Device = tuple[int, ...]
"""GPUs of a trial; empty for the CPU."""


class TuningFailed(MalError):
    """A study all of whose trials failed. Exit code 1."""


@dataclass
class RunningTrial:
    """A trial of this tuner.

    Attributes:
        trial: Optuna's trial.
        process: its training.
        device: its GPUs.
        metrics: metrics of the newest validation.
        epochs: epochs whose validation was reported; a resumed training may repeat one.
        is_pruned: the pruner has ended it.
        is_lost: another tuner took it over.
    """

    trial: Trial
    process: TrialProcess
    device: Device
    metrics: dict[str, float | None] = field(default_factory=dict)
    epochs: set[int] = field(default_factory=set)
    is_pruned: bool = False
    is_lost: bool = False


class Tuner:
    """Runs trials until the study has as many as it needs.

    Args:
        study: the study.
        spec: the spec of the study; a trial changes the fields of `tune.space`.
        objective: the metric to maximize.
        devices: devices of the trials that run at a time.
        folder: output folder of the study.
        console: prints progress.
        on_end: called after each trial that ended.
        signals: numbers of signals that have arrived; appended to by a handler.
        threads: threads of each trial; None leaves them to it.
        program: command that runs `mal-train`.
    """

    def __init__(
        self,
        study: SharedStudy,
        spec: Spec,
        objective: Objective,
        devices: Sequence[Device],
        *,
        folder: Path,
        console: Console,
        on_end: Callable[[], object] = lambda: None,
        signals: Sequence[int] = (),
        threads: int | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self._study, self._spec, self._objective, self._folder = study, spec, objective, folder
        self._console, self._on_end, self._signals = console, on_end, signals
        self._threads, self._program = threads, program
        self._free, self._running = list(devices), list[RunningTrial]()
        self._next_heartbeat = self._next_look = 0.0
        self._may_start = True
        self._waiting_for = ""
        self._seconds: list[float] = []

    def run(self) -> None:
        """Runs the trials.

        Raises:
            TuningFailed: all trials failed.
            Terminated: SIGTERM arrived; the running trials were saved and queued again.
            KeyboardInterrupt: SIGINT arrived; likewise.
            MalError: the storage or the output folder cannot be used any more.
        """
        try:
            while self._step():
                time.sleep(POLL_S)
        except BaseException:  # whatever ends the tuner ends its trials, which nothing watches any more
            self._end_all()
            raise

    def _step(self) -> bool:
        """Does what is due; returns False when the study has all its trials."""
        if self._signals:
            self._interrupt(self._signals[0])
        for running in list(self._running):
            self._watch(running)
        now = time.monotonic()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + HEARTBEAT_S
            self._send_heartbeat()
        if now >= self._next_look:
            self._next_look = now + STUDY_EVERY_S
            self._queue_interrupted()
            self._may_start = True
        if self._may_start:
            self._start()
            self._may_start = False
            return bool(self._running) or self._must_wait()
        return True

    def _start(self) -> None:
        """Starts trials on the free devices, as long as the study needs more."""
        while self._free:
            trial = self._study.ask()
            if trial is None:
                return
            self._launch(trial, self._free[0])

    def _launch(self, trial: Trial, device: Device) -> None:
        """Starts the training of a trial. If its values contradict one another, the trial fails without one."""
        folder = self._folder / "trials" / str(trial.user_attrs[FOLDER])
        try:
            spec = trial_spec(self._spec, trial.params, str(folder), device)
        except ConfigError as error:
            self._fail(trial, str(error))
            return
        try:
            _create(folder, is_new=ATTEMPT not in trial.user_attrs)
            write_text(folder / "spec.yaml", f"# Trial {trial.number} of {self._folder}.\n{dump(spec)}")
            process = TrialProcess(folder / "spec.yaml", folder, threads=self._threads, program=self._program)
        except MalError as error:
            self._study.end(trial.number, "canceled", str(error))
            raise
        self._free.remove(device)
        self._running.append(RunningTrial(trial, process, device))
        place = f"GPU {', '.join(map(str, device))}" if device else "the CPU"
        verb = "continues" if ATTEMPT in trial.user_attrs else "starts"
        self._console.print(f"trial {trial.number} {verb} on {place}: {shown_values(trial.params)}")

    def _watch(self, running: RunningTrial) -> None:
        code = running.process.exit_code()  # before the validations, so that none of an ended process is missed
        for validation in running.process.validations():
            self._report(running, validation)
        if code is not None:
            self._running.remove(running)
            self._free.append(running.device)
            self._record(running, code)
            self._may_start = True
            self._on_end()

    def _report(self, running: RunningTrial, validation: Validation) -> None:
        """Reports a validation to the study, and ends the trial if its pruner says so."""
        trial = running.trial
        running.metrics = dict(validation.metrics)
        value = self._objective.value(running.metrics)
        if value is None or validation.epoch in running.epochs or running.is_lost or running.is_pruned:
            return
        running.epochs.add(validation.epoch)
        try:
            with quiet_optuna():
                trial.report(value, validation.epoch)
                trial.set_user_attr(METRICS, running.metrics)
                is_bad = trial.should_prune()
        except UpdateFinishedTrialError:
            self._lose(running)
            return
        last = validation.epoch >= self._epochs(trial)
        self._console.print(
            f"trial {trial.number}: {self._objective.metric} {value:.4f} after epoch {validation.epoch} of "
            f"{self._epochs(trial)}" + (", pruned" if is_bad and not last else "")
        )
        if is_bad and not last:
            running.is_pruned = True
            running.process.stop()

    def _epochs(self, trial: Trial) -> int:
        return int(trial.params.get("train.num_epochs", self._spec.train.num_epochs))

    def _record(self, running: RunningTrial, code: int) -> None:
        """Records how a trial ended."""
        trial, value = running.trial, self._objective.value(running.metrics)
        if running.is_lost:
            return
        if running.is_pruned:
            self._tell(running, code, TrialState.PRUNED)
        elif code in INTERRUPTED:
            failure = running.process.failure(code)
            self._study.end(trial.number, "interrupted", failure, tuner_was_stopped=bool(self._signals))
            self._console.print(f"trial {trial.number} was interrupted (exit code {code})")
            self._check_results()
        elif code != 0:
            self._fail(trial, running.process.failure(code))
        elif value is None:
            self._fail(trial, f"the last validation gave no {self._objective.metric}")
        else:
            self._tell(running, code, TrialState.COMPLETE, value)

    def _tell(self, running: RunningTrial, code: int, state: TrialState, value: float | None = None) -> None:
        trial, seconds = running.trial, running.process.seconds
        try:
            trial.set_user_attr(SECONDS, round(seconds, 1))
            trial.set_user_attr(EXIT_CODE, code)
            with quiet_optuna():
                self._study.optuna.tell(trial, value, state=state)
        except (UpdateFinishedTrialError, ValueError):  # ValueError: `tell` found that it has ended
            self._lose(running)
            return
        self._seconds.append(seconds)
        result = "pruned" if value is None else f"{self._objective.metric} {value:.4f}"
        self._console.print(f"trial {trial.number} took {seconds:.0f} s: {result}; {self._progress()}")

    def _progress(self) -> str:
        """Returns the state of the study as text: trials that are done, the best one, and the remaining time."""
        done, total = len(self._study.done()), self._spec.tune.trials
        best = self._study.best()
        at_a_time = len(self._free) + len(self._running)
        left = statistics.mean(self._seconds) * max(0, total - done) / max(1, at_a_time)
        text = "" if best is None else f", best {best.value:.4f} (trial {best.number})"
        return f"{done} of {total} trials done{text}" + (f", about {duration(left)} left" if done < total else "")

    def _fail(self, trial: Trial, reason: str) -> None:
        self._study.end(trial.number, "failed", reason)
        self._console.print(f"trial {trial.number} failed: {reason}")
        self._check_results()

    def _check_results(self) -> None:
        """Raises TuningFailed if all trials so far have failed, and there are enough to expect no other result."""
        trials = self._study.counted()
        enough = min(ALL_FAILED, self._spec.tune.trials)
        if len(trials) >= enough and all(trial.state is TrialState.FAIL for trial in trials):
            raise TuningFailed(
                f"{self._folder}: all {len(trials)} trials failed; the last one: "
                f"{trials[-1].user_attrs.get(REASON)}; report.html lists them, and trials/*/log.txt has their output"
            )

    def _send_heartbeat(self) -> None:
        lost = self._study.send_heartbeat([running.trial.number for running in self._running])
        for running in self._running:
            if running.trial.number in lost:
                self._lose(running)

    def _lose(self, running: RunningTrial) -> None:
        """Ends a trial that another tuner took over after this one sent no heartbeat for too long."""
        running.is_lost = True
        running.process.stop()
        self._console.print(f"trial {running.trial.number}: another tuner has taken it over")

    def _queue_interrupted(self) -> None:
        for trial in self._study.queue_interrupted():
            self._console.print(f"trial {trial.number} was interrupted, with its tuner on {_machine(trial)}")

    def _must_wait(self) -> bool:
        """Returns True while other tuners still run trials: they may die, and the report needs their results."""
        others = self._study.others()
        waiting_for = ", ".join(f"{trial.number} on {_machine(trial)}" for trial in others)
        if others and waiting_for != self._waiting_for:
            self._console.print(f"waiting for the trials of other tuners: {waiting_for}")
        self._waiting_for = waiting_for
        return bool(others) or self._study.has_queued()

    def _interrupt(self, number: int) -> None:
        self._console.print(f"{signal.Signals(number).name}: {len(self._running)} trials save and end")
        for running in self._running:
            running.process.stop()
        while self._running:
            for running in list(self._running):
                self._watch(running)
            time.sleep(POLL_S)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(f"{self._folder}: terminated; the same command resumes the study")

    def _end_all(self) -> None:
        """Ends all trials, and queues them again if the storage still answers."""
        for running in self._running:
            running.process.stop()
        while any(running.process.exit_code() is None for running in self._running):
            time.sleep(POLL_S)
        try:
            for running in self._running:
                self._study.end(running.trial.number, "interrupted", "the tuner stopped")
        except Exception as error:  # the first error is the one to report; the next run queues the trials
            self._console.print(f"the running trials were not queued again: {type(error).__name__}")
        self._running.clear()


def _machine(trial: FrozenTrial) -> str:
    return machine_of(str(trial.user_attrs.get(OWNER, ""))) or "an unknown machine"


def _create(folder: Path, *, is_new: bool) -> None:
    """Creates the folder of a trial; one that is continued may have it already.

    Raises:
        OutputError: the folder cannot be created, or a new trial would continue the training of another study.
    """
    try:
        folder.mkdir(parents=True, exist_ok=not is_new)
    except FileExistsError:
        raise OutputError(
            f"{folder}: already there, from another study; choose another tune.study or results_dir, or remove it"
        ) from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror}; choose another results_dir") from error
