"""The tuner: trials as processes, their results, pruning, failures, signals, and tuners that share a study.

The trainings are stand-ins (`trainer.py`), so that each takes a fraction of a second.
"""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState

from mal_train.config.spec import Spec
from mal_train.core.console import Console
from mal_train.core.errors import OutputError, Terminated
from mal_train.tuning import study as study_module
from mal_train.tuning import trial_process, tuner
from mal_train.tuning.objective import Objective
from mal_train.tuning.study import SharedStudy
from mal_train.tuning.tuner import TuningFailed
from tests.mal_train.tuning.studies import program, spec_with, study_of, tuner_of
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "POLL_S", 0.02)
    monkeypatch.setattr(tuner, "STUDY_EVERY_S", 0.1)


def states(study: SharedStudy) -> list[str]:
    return [trial.state.name for trial in study.trials()]


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def when(condition: Callable[[], object], action: Callable[[], object]) -> None:
    """Runs an action in a thread as soon as the condition is true."""

    def wait() -> None:
        until(condition)
        action()

    threading.Thread(target=wait, daemon=True).start()


def has_lines(file: Path, count: int) -> bool:
    return file.exists() and len(file.read_text().splitlines()) == count


def reason(trial: FrozenTrial) -> str:
    return str(trial.user_attrs["reason"])


def test_each_trial_is_a_training_with_its_values_and_a_folder_of_its_own(tmp_path: Path) -> None:
    spec = spec_with("train.batch_size=7")
    study = study_of(spec, tmp_path)
    output = io.StringIO()
    tuner_of(study, spec, tmp_path, program=program(), console=Console(output)).run()
    assert states(study) == ["COMPLETE"] * 3
    for number, trial in enumerate(study.trials()):
        folder = tmp_path / "trials" / f"{number:04d}"
        written = yaml.safe_load((folder / "spec.yaml").read_text())
        assert written["train"]["lr"] == trial.params["train.lr"] == pytest.approx(trial.value)
        assert (written["train"]["batch_size"], written["train"]["gpu_ids"]) == (7, [])
        assert written["results_dir"] == str(folder)
        assert written["tune"] == Spec().tune.model_dump(mode="json")
        assert trial.intermediate_values == pytest.approx({e: trial.params["train.lr"] * e / 4 for e in range(1, 5)})
        assert trial.user_attrs["metrics"]["box_proxy"] == pytest.approx((trial.value or 0) / 2)
        assert trial.user_attrs["exit_code"] == 0
    assert "3 of 3 trials done" in output.getvalue()


def test_trials_run_at_the_same_time_on_the_given_devices(tmp_path: Path) -> None:
    spec = spec_with("tune.trials=2")
    study = study_of(spec, tmp_path)
    signals: list[int] = []
    running = tuner.Tuner(
        study,
        spec,
        Objective("miou"),
        [(1,), (2, 5)],
        folder=tmp_path,
        console=Console.silent(),
        signals=signals,
        program=program(rest="hang"),
    )
    when(lambda: len(list(tmp_path.glob("trials/*/train/status.json"))) == 2, lambda: signals.append(signal.SIGTERM))
    with pytest.raises(Terminated):
        running.run()
    written = [yaml.safe_load((tmp_path / "trials" / name / "spec.yaml").read_text()) for name in ("0000", "0001")]
    assert [(spec["train"]["gpu_ids"], spec["train"]["num_gpus"]) for spec in written] == [([1], 1), ([2, 5], 2)]


def test_a_trial_below_the_median_is_pruned_and_its_record_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "STARTUP_TRIALS", 2)
    spec = spec_with("tune.trials=3")
    study = study_of(spec, tmp_path)
    # The stand-in waits after its first epoch, so only the pruner can end it.
    tuner_of(study, spec, tmp_path, program=program(t0002="hang bad")).run()
    assert states(study) == ["COMPLETE", "COMPLETE", "PRUNED"]
    pruned = study.trials()[2]
    assert pruned.user_attrs["exit_code"] == 143
    assert pruned.intermediate_values.keys() == {1}
    assert pruned.user_attrs["metrics"]["mIoU"] == pruned.value == pruned.intermediate_values[1]
    assert (tmp_path / "trials" / "0002" / "train" / "status.json").exists()


def test_a_pruned_trial_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "STARTUP_TRIALS", 2)
    monkeypatch.setattr(trial_process, "SAVE_GRACE_S", 0.3)
    spec = spec_with("tune.trials=3")
    study = study_of(spec, tmp_path)
    tuner_of(study, spec, tmp_path, program=program(t0002="hang stubborn bad")).run()
    assert states(study)[2] == "PRUNED"
    assert study.trials()[2].user_attrs["exit_code"] == -signal.SIGKILL


@pytest.mark.parametrize(
    ("behavior", "named"),
    [("fail", "exit code 2: dataset.crop_size"), ("crash", "SIGKILL"), ("empty", "mIoU"), ("nan", "mIoU")],
)
def test_a_failed_trial_is_marked_with_its_reason_and_the_study_goes_on(
    behavior: str, named: str, tmp_path: Path
) -> None:
    spec = spec_with()
    study = study_of(spec, tmp_path)
    tuner_of(study, spec, tmp_path, program=program(t0001=behavior)).run()
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    failed = study.trials()[1]
    assert failed.user_attrs["ended"] == "failed"
    assert named in reason(failed)
    assert len(study.counted()) == 3


def test_a_study_ends_when_all_trials_fail(tmp_path: Path) -> None:
    spec = spec_with("tune.trials=100")
    study = study_of(spec, tmp_path)
    with pytest.raises(TuningFailed) as caught:
        tuner_of(study, spec, tmp_path, program=program(rest="fail")).run()
    assert caught.value.exit_code == 1
    assert "dataset.crop_size" in str(caught.value)
    assert states(study) == ["FAIL"] * tuner.ALL_FAILED


def test_values_that_contradict_each_other_fail_the_trial_without_a_training(tmp_path: Path) -> None:
    # Each value alone is valid beside the other field's default.
    low, high = "train.crf_value_low_thres: {choices: [0.6]}", "train.crf_value_high_thres: {choices: [0.5]}"
    spec = spec_with(f"tune.space={{{low}, {high}}}", "tune.trials=1")
    study = study_of(spec, tmp_path)
    with pytest.raises(TuningFailed):
        tuner_of(study, spec, tmp_path, program=program()).run()
    assert "crf_value_low_thres 0.6" in reason(study.trials()[0])
    assert not (tmp_path / "trials").exists()


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_the_trials_and_the_same_study_continues_in_their_folders(
    number: signal.Signals, error: type[BaseException], tmp_path: Path
) -> None:
    spec = spec_with()
    study = study_of(spec, tmp_path)
    signals: list[int] = []
    running = tuner_of(study, spec, tmp_path, program=program(t0001="hang"), signals=signals)
    status = tmp_path / "trials/0001/train/status.json"
    when(status.exists, lambda: signals.append(number))
    with pytest.raises(error):
        running.run()
    assert states(study) == ["COMPLETE", "FAIL", "WAITING"]
    assert study.trials()[1].user_attrs["ended"] == "interrupted"
    assert len(study.done()) == 1
    tuner_of(study, spec, tmp_path, program=program()).run()
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    repeated = study.trials()[2]
    assert repeated.params == study.trials()[1].params
    assert (repeated.user_attrs["folder"], repeated.user_attrs["attempt"]) == ("0001", 2)
    assert len((tmp_path / "trials/0001/starts.txt").read_text().split()) == 2
    # The first epoch is in status.json twice.
    assert repeated.intermediate_values.keys() == {1, 2, 3, 4}


def test_a_training_that_signals_from_elsewhere_end_fails_after_three_attempts_without_a_new_epoch(
    tmp_path: Path,
) -> None:
    spec = spec_with("tune.trials=1")
    study = study_of(spec, tmp_path)
    with pytest.raises(TuningFailed):
        tuner_of(study, spec, tmp_path, program=program(rest="preempted")).run()
    assert [trial.user_attrs["ended"] for trial in study.trials()] == [*["interrupted"] * 3, "failed"]
    assert "interrupted 3 times" in reason(study.trials()[3])
    assert [trial.number for trial in study.counted()] == [3]


def test_a_tuner_that_is_stopped_again_and_again_fails_no_trial(tmp_path: Path) -> None:
    spec = spec_with("tune.trials=1")
    study = study_of(spec, tmp_path)
    starts = tmp_path / "trials/0000/starts.txt"
    for attempt in range(1, study_module.MAX_ATTEMPTS + 2):
        signals: list[int] = []
        running = tuner_of(study, spec, tmp_path, program=program(rest="hang"), signals=signals)
        when(partial(has_lines, starts, attempt), partial(signals.append, signal.SIGTERM))
        with pytest.raises(Terminated):
            running.run()
    assert {trial.user_attrs.get("ended") for trial in study.trials()} == {"interrupted", None}
    tuner_of(study, spec, tmp_path, program=program()).run()
    assert [trial.state for trial in study.counted()] == [TrialState.COMPLETE]


def test_a_folder_of_another_study_is_not_continued(tmp_path: Path) -> None:
    spec = spec_with()
    (tmp_path / "trials" / "0000").mkdir(parents=True)
    study = study_of(spec, tmp_path)
    with pytest.raises(OutputError):
        tuner_of(study, spec, tmp_path, program=program()).run()
    assert study.counted() == []
    assert [trial.user_attrs["ended"] for trial in study.trials()] == ["canceled"]
    assert list((tmp_path / "trials" / "0000").iterdir()) == []


TUNE = """
import os, sys, time
from pathlib import Path
from mal_train.core.console import Console
from mal_train.tuning import tuner
from tests.mal_train.tuning.studies import program, spec_with, study_of, tuner_of
tuner.POLL_S, tuner.STUDY_EVERY_S = 0.02, 0.2
folder, storage, behavior = Path(sys.argv[1]), *sys.argv[2:]
spec = spec_with("tune.trials=5", "tune.pruner=none")
study = study_of(spec, folder, storage)
(folder / f"ready.{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
tuner_of(study, spec, folder, program=program(rest=behavior), console=Console()).run()
"""


def tuner_process(folder: Path, storage: str, behavior: str = "good") -> "subprocess.Popen[bytes]":
    """Starts a tuner of a study of five trials; it begins when the folder has the file `go`."""
    command = [sys.executable, "-c", TUNE, str(folder), storage, behavior]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_two_tuners_share_the_trials_of_one_study(storage: str, tmp_path: Path) -> None:
    processes = [tuner_process(tmp_path, storage) for _ in range(2)]
    until(lambda: len(list(tmp_path.glob("ready.*"))) == 2 or any(process.poll() for process in processes), 120)
    (tmp_path / "go").touch()
    for process in processes:
        _, printed = process.communicate(timeout=120)
        assert process.returncode == 0, printed.decode()
    study = study_of(spec_with("tune.trials=5"), tmp_path, storage)
    counted = study.counted()
    assert [trial.state for trial in counted] == [TrialState.COMPLETE] * 5
    assert len({trial.params["train.lr"] for trial in counted}) == 5
    assert len({trial.user_attrs["owner"] for trial in counted}) == 2


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_the_trials_of_a_killed_tuner_are_repeated(storage: str, tmp_path: Path) -> None:
    spec = spec_with()
    (tmp_path / "go").touch()
    with tuner_process(tmp_path, storage, "hang") as process:
        until((tmp_path / "trials/0000/train/status.json").exists, 120)
        process.kill()
    training = int((tmp_path / "trials/0000/starts.txt").read_text())
    os.kill(training, signal.SIGTERM)  # the real one asks the kernel for this signal
    study = study_of(spec, tmp_path, storage)
    tuner_of(study, spec, tmp_path, program=program()).run()
    assert [trial.user_attrs.get("ended") for trial in study.trials()] == ["interrupted", None, None, None]
    assert [trial.state for trial in study.counted()] == [TrialState.COMPLETE] * 3
    assert study.trials()[1].user_attrs["folder"] == "0000"
