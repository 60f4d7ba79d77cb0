"""The study that tuners share: which trials count, which are repeated, and what may not change."""

import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, Trial, TrialState

from mal_train.core.errors import ConfigError
from mal_train.tuning import study as study_module
from mal_train.tuning.owner import is_dead, machine_of, this_process
from mal_train.tuning.study import GRACE_S, HEARTBEAT, OWNER, SharedStudy
from tests.mal_train.tuning.studies import spec_with, study_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(study: SharedStudy) -> Trial:
    trial = study.ask()
    assert trial is not None
    return trial


def as_other_tuner(study: SharedStudy, number: int, owner: str = "elsewhere/pid:[1]/7/99") -> None:
    study.set(number, OWNER, owner)


def dead_owner() -> str:
    """Returns the name of a process of this machine that has ended."""
    code = "from mal_train.tuning.owner import this_process; print(this_process())"
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


def test_a_process_is_alive_until_it_ends() -> None:
    assert not is_dead(this_process())
    assert is_dead(dead_owner())
    machine, process, start = this_process().rsplit("/", 2)
    assert is_dead(f"{machine}/{process}/{int(start) + 1}")  # the number was used again
    assert not is_dead(f"elsewhere/pid:[1]/{process}/{start}")
    assert not is_dead("")
    assert machine_of("elsewhere/pid:[1]/7/99") == "elsewhere"


def test_the_values_depend_on_the_seed_and_the_number_of_the_trial_alone(tmp_path: Path) -> None:
    def values(name: str, seed: int, *, restart: bool) -> list[float]:
        spec = spec_with(f"tune.seed={seed}", "tune.trials=4")
        (tmp_path / name).mkdir()
        study = study_of(spec, tmp_path / name)
        for _ in range(4):
            if restart:
                study = study_of(spec, tmp_path / name)
            trial = ask(study)
            study.optuna.tell(trial, trial.params["train.lr"])
        return [trial.params["train.lr"] for trial in study.trials()]

    first = values("a", 1, restart=False)
    assert values("b", 1, restart=True) == first
    assert values("c", 2, restart=False) != first
    assert len(set(first)) == 4


def test_no_trial_starts_when_enough_run_or_are_done(tmp_path: Path) -> None:
    study = study_of(spec_with("tune.trials=2"), tmp_path)
    study.optuna.tell(ask(study), 0.5)
    ask(study)
    assert study.ask() is None
    assert len(study.done()) == 1


def test_the_later_of_two_last_trials_is_canceled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_with("tune.trials=1")
    study, other = study_of(spec, tmp_path), study_of(spec, tmp_path)
    # Both tuners see an empty study before either starts its trial.
    first_look: list[list[FrozenTrial]] = [[]]
    monkeypatch.setattr(other, "trials", lambda: first_look.pop() if first_look else study.trials())
    first = ask(study)
    assert other.ask() is None
    monkeypatch.undo()
    assert [trial.user_attrs.get("ended") for trial in other.trials()] == [None, "canceled"]
    assert [trial.number for trial in other.counted()] == [first.number]


def test_a_trial_of_a_dead_process_of_this_machine_is_queued_at_once(tmp_path: Path) -> None:
    study = study_of(spec_with("tune.trials=1"), tmp_path)
    trial = ask(study)
    as_other_tuner(study, trial.number, dead_owner())
    assert [each.number for each in study.queue_interrupted()] == [trial.number]
    assert study.queue_interrupted() == []
    again = ask(study)
    assert again.params == trial.params
    assert (again.number, again.user_attrs["folder"], again.user_attrs["attempt"]) == (1, "0000", 2)
    assert study.ask() is None


def test_a_trial_of_another_machine_is_queued_when_its_heartbeat_stops(tmp_path: Path) -> None:
    clock = Clock()
    study = study_of(spec_with(), tmp_path, clock=clock)
    number = ask(study).number
    as_other_tuner(study, number)
    for heartbeat in range(3):
        study.set(number, HEARTBEAT, heartbeat)
        assert study.queue_interrupted() == []
        clock.now += GRACE_S - 1
    assert study.queue_interrupted() == []
    clock.now += 2
    assert [trial.number for trial in study.queue_interrupted()] == [number]


def test_a_tuner_learns_from_its_heartbeat_that_its_trial_was_taken_over(tmp_path: Path) -> None:
    spec = spec_with()
    study, other = study_of(spec, tmp_path), study_of(spec, tmp_path)
    trial = ask(study)
    assert study.send_heartbeat([trial.number]) == []
    assert other.end(trial.number, "interrupted", "taken")
    assert study.send_heartbeat([trial.number]) == [trial.number]
    assert not study.end(trial.number, "failed", "too late")
    assert study.trials()[0].user_attrs["reason"] == "taken"


def test_a_trial_without_values_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    study = study_of(spec_with("tune.trials=1"), tmp_path)
    started = study.optuna.ask()  # the tuner dies before it has drawn the values
    as_other_tuner(study, started.number, dead_owner())
    assert len(study.queue_interrupted()) == 1
    trial = ask(study)
    assert (trial.number, "attempt" in trial.user_attrs) == (1, False)


def test_a_trial_that_is_interrupted_again_and_again_fails(tmp_path: Path) -> None:
    study = study_of(spec_with("tune.trials=1"), tmp_path)
    for _ in range(study_module.MAX_ATTEMPTS):
        study.end(ask(study).number, "interrupted", "power cut")
    assert study.ask() is None
    (counted,) = study.counted()
    assert (counted.state, counted.user_attrs["ended"]) == (TrialState.FAIL, "failed")


def test_an_interrupted_trial_that_gains_epochs_never_fails(tmp_path: Path) -> None:
    study = study_of(spec_with("tune.trials=1", "tune.pruner=none"), tmp_path)
    for last in range(1, study_module.MAX_ATTEMPTS + 3):
        trial = ask(study)
        for epoch in range(1, last + 1):  # a resumed training reports its earlier epochs again
            trial.report(0.5, epoch)
        study.end(trial.number, "interrupted", "power cut")
    for _ in range(study_module.MAX_ATTEMPTS):
        assert study.counted() != []
        trial = ask(study)
        trial.report(0.5, last)
        study.end(trial.number, "interrupted", "power cut")
    assert study.ask() is None
    assert [trial.user_attrs["ended"] for trial in study.counted()] == ["failed"]


def test_a_stopped_tuner_is_not_counted_against_its_trials(tmp_path: Path) -> None:
    study = study_of(spec_with("tune.trials=1"), tmp_path)
    for _ in range(study_module.MAX_ATTEMPTS + 1):
        study.end(ask(study).number, "interrupted", "stopped", tuner_was_stopped=True)
    assert ask(study).user_attrs["attempt"] == study_module.MAX_ATTEMPTS + 2


@pytest.mark.parametrize("setup", [{"objective": "proxy"}, {"objective": "miou", "train.wd": 0.1}, {}])
def test_a_study_that_began_with_other_settings_is_refused(setup: dict[str, object], tmp_path: Path) -> None:
    study_of(spec_with(), tmp_path)
    with pytest.raises(ConfigError, match=r"tune\.study"):
        study_of(spec_with(), tmp_path, setup=setup)
    study_of(spec_with("tune.study=other"), tmp_path, setup=setup)


def test_pruned_trials_and_the_number_of_trials_may_grow(tmp_path: Path) -> None:
    study = study_of(spec_with("tune.trials=1"), tmp_path)
    trial = ask(study)
    trial.report(0.5, 1)
    study.optuna.tell(trial, state=TrialState.PRUNED)
    assert study.ask() is None
    assert study.best() is None
    grown = study_of(spec_with("tune.trials=2"), tmp_path)
    grown.optuna.tell(ask(grown), 0.4)
    best = grown.best()
    assert best is not None
    assert best.number == 1
    assert isinstance(grown.optuna, optuna.Study)
