"""A study that several tuners share: its trials, their number, and the repetition of the trials of a tuner that died.

Optuna's storage assigns the numbers of trials, so tuners agree on which ones count without talking to each other. A
tuner marks its running trials with a heartbeat. A trial whose tuner died is marked as failed, and queued again with the
same parameters and folder, so that its training resumes from its last checkpoint.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from mal_train.config.tune import TuneConfig
from mal_train.core.errors import ConfigError
from mal_train.core.fingerprint import differences
from mal_train.tuning.owner import is_dead, this_process
from mal_train.tuning.storage import quiet_optuna

HEARTBEAT_S = 15.0
"""Seconds between two heartbeats of a running trial."""
GRACE_S = 120.0
"""Seconds without a heartbeat after which the trial of another machine counts as interrupted."""
MAX_ATTEMPTS = 3
"""Interrupted attempts without a new epoch, after which a trial counts as failed: it may be what ends its tuner."""
STARTUP_TRIALS = 5
"""Trials before the median pruner compares."""

OWNER, HEARTBEAT, FOLDER, ATTEMPT, ENDED, REASON, METRICS, SECONDS, EXIT_CODE = (
    "owner",
    "heartbeat",
    "folder",
    "attempt",
    "ended",
    "reason",
    "metrics",
    "seconds",
    "exit_code",
)
"""Names of the attributes of a trial."""
EPOCH, WITHOUT_PROGRESS = "epoch", "attempts_without_progress"
"""Names of the attributes of a repeated trial: the last epoch reported before, and the attempts since it."""
SETUP = "setup"
"""Name of the attribute of a study: what all of its trials have in common."""

Ending = Literal["failed", "interrupted", "canceled"]
NOT_COUNTED = ("interrupted", "canceled")


class SharedStudy:
    """One tuner's view of a study.

    Args:
        storage: Optuna's storage.
        config: section `tune`.
        space: distribution of each field.
        setup: what all trials have in common, such as the objective and the other fields of the spec.
        parallel: True if several trials run at a time.
        clock: monotonic seconds.

    Raises:
        ConfigError: the storage has a study of this name with another setup.
    """

    def __init__(
        self,
        storage: BaseStorage,
        config: TuneConfig,
        space: Mapping[str, BaseDistribution],
        setup: Mapping[str, Any],
        *,
        parallel: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._config, self._space = storage, config, space
        self._parallel, self._clock = parallel, clock
        self._own_heartbeats = 0
        self._seen_heartbeats: dict[int, tuple[object, float]] = {}
        with quiet_optuna():
            self.optuna = optuna.create_study(
                storage=storage,
                study_name=config.study,
                direction="maximize",
                load_if_exists=True,
                pruner=_pruner(config),
            )
        self._study_id = storage.get_study_id_from_name(config.study)
        self._check_setup(setup)

    def trials(self) -> list[FrozenTrial]:
        """Returns all trials, those of other tuners included."""
        return self.optuna.get_trials(deepcopy=False)

    def counted(self) -> list[FrozenTrial]:
        """Returns the trials that count: not those that were interrupted, which another trial repeats."""
        return [trial for trial in self.trials() if _counts(trial)]

    def done(self) -> list[FrozenTrial]:
        """Returns the counted trials that have ended."""
        return [trial for trial in self.counted() if trial.state.is_finished()]

    def best(self) -> FrozenTrial | None:
        """Returns the complete trial with the highest value; None before the first."""
        complete = [trial for trial in self.trials() if trial.state is TrialState.COMPLETE]
        return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)

    def has_queued(self) -> bool:
        """Returns True if a trial waits for a tuner."""
        return any(trial.state is TrialState.WAITING for trial in self.trials())

    def ask(self) -> Trial | None:
        """Starts a trial: a queued one, or a new one; None if the study needs no more.

        Two tuners may start a last trial at the same time. The number decides: the later one is canceled.
        """
        trials = self.trials()
        is_queued = any(trial.state is TrialState.WAITING for trial in trials)
        if sum(map(_counts, trials)) >= self._config.trials and not is_queued:
            return None
        with quiet_optuna():
            trial = self.optuna.ask()
            trial.set_user_attr(OWNER, this_process())
            before = sum(_counts(each) and each.number < trial.number for each in self.trials())
            if before >= self._config.trials:
                self.end(trial.number, "canceled", "another tuner started the last trial")
                return None
            self.optuna.sampler = self._sampler(trial.number)
            for name, distribution in self._space.items():
                _suggest(trial, name, distribution)
        if FOLDER not in trial.user_attrs:
            trial.set_user_attr(FOLDER, f"{trial.number:04d}")
        return trial

    def set(self, number: int, name: str, value: Any) -> None:
        """Sets an attribute of a running trial. Raises UpdateFinishedTrialError if it has ended."""
        self._storage.set_trial_user_attr(self._trial_id(number), name, value)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def end(self, number: int, ending: Ending, reason: str, *, tuner_was_stopped: bool = False) -> bool:
        """Marks a trial as failed, and queues one that was interrupted again.

        Args:
            number: the trial.
            ending: how it ended.
            reason: why, for the report.
            tuner_was_stopped: a signal to the tuner interrupted the trial; such an attempt is not counted against it.

        Returns:
            False if the trial has ended already.
        """
        trial = self._storage.get_trial(self._trial_id(number))
        progress = _progress(trial, is_counted=not tuner_was_stopped)
        if ending == "interrupted" and progress[WITHOUT_PROGRESS] >= MAX_ATTEMPTS:
            ending, reason = "failed", f"interrupted {MAX_ATTEMPTS} times without a new epoch; the last time: {reason}"
        try:
            self.set(number, ENDED, ending)
            self.set(number, REASON, reason)
            self.optuna.tell(number, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):  # ValueError: `tell` found that it has ended
            return False
        # A tuner that died before it had drawn all parameters leaves nothing to repeat.
        if ending == "interrupted" and trial.params.keys() == self._space.keys():
            folder, attempt = trial.user_attrs.get(FOLDER, f"{number:04d}"), int(trial.user_attrs.get(ATTEMPT, 1)) + 1
            self.optuna.enqueue_trial(trial.params, user_attrs={FOLDER: folder, ATTEMPT: attempt, **progress})
        return True

    def send_heartbeat(self, numbers: Sequence[int]) -> list[int]:
        """Marks running trials of this tuner as alive; returns those that another tuner took over."""
        self._own_heartbeats += 1
        lost = []
        for number in numbers:
            try:
                self.set(number, HEARTBEAT, self._own_heartbeats)
            except UpdateFinishedTrialError:
                lost.append(number)
        return lost

    def queue_interrupted(self) -> list[FrozenTrial]:
        """Queues the trials of tuners that died again, and returns them."""
        with quiet_optuna():
            dead = [trial for trial in self.others() if self._is_interrupted(trial)]
            return [trial for trial in dead if self.end(trial.number, "interrupted", "its tuner ended")]

    def others(self) -> list[FrozenTrial]:
        """Returns the running trials of other tuners."""
        running = [trial for trial in self.trials() if trial.state is TrialState.RUNNING]
        return [trial for trial in running if trial.user_attrs.get(OWNER) != this_process()]

    def _is_interrupted(self, trial: FrozenTrial) -> bool:
        owner, heartbeat = str(trial.user_attrs.get(OWNER, "")), trial.user_attrs.get(HEARTBEAT)
        if is_dead(owner):
            return True
        # The clocks of two machines may differ, so the time is measured here since the heartbeat last changed.
        seen, since = self._seen_heartbeats.get(trial.number, (None, 0.0))
        if seen != (owner, heartbeat):
            self._seen_heartbeats[trial.number] = ((owner, heartbeat), self._clock())
            return False
        return self._clock() - since > GRACE_S

    def _check_setup(self, setup: Mapping[str, Any]) -> None:
        stored = self.optuna.user_attrs.get(SETUP)
        if stored is None:
            self.optuna.set_user_attr(SETUP, setup)
            return
        different = differences(setup, stored)
        if different:
            raise ConfigError(
                f"tune.study: {self._config.study}: the study in the storage began with other settings, and its values "
                f"cannot be compared: {'; '.join(different[:5])}; choose another tune.study or undo the change"
            )

    def _sampler(self, number: int) -> BaseSampler:
        """Returns the sampler of one trial. A seed for each trial: tuners and resumed runs must not repeat values."""
        seed = int(np.random.SeedSequence([self._config.seed, number]).generate_state(1)[0])
        if self._config.sampler == "random":
            return RandomSampler(seed=seed)
        # The liar keeps trials that run at the same time apart.
        return TPESampler(seed=seed, constant_liar=self._parallel)


def _progress(trial: FrozenTrial, *, is_counted: bool) -> dict[str, int]:
    """Returns the attributes `EPOCH` and `WITHOUT_PROGRESS` after an interrupted attempt."""
    before, last = int(trial.user_attrs.get(EPOCH, 0)), max(trial.intermediate_values, default=0)
    if last > before:
        return {EPOCH: last, WITHOUT_PROGRESS: 0}
    return {EPOCH: before, WITHOUT_PROGRESS: int(trial.user_attrs.get(WITHOUT_PROGRESS, 0)) + is_counted}


def _counts(trial: FrozenTrial) -> bool:
    return not (trial.state is TrialState.FAIL and trial.user_attrs.get(ENDED) in NOT_COUNTED)


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    elif isinstance(distribution, FloatDistribution):
        trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _pruner(config: TuneConfig) -> BasePruner:
    after = config.prune_after_epochs
    if config.pruner == "median":
        return MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=after)
    if config.pruner == "halving":
        return SuccessiveHalvingPruner(min_resource=max(1, after), reduction_factor=4)
    return NopPruner()
