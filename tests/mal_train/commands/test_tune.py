"""`mal-train tune`: searches with real trainings, the files that it writes, and settings that it refuses."""

import html
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mal_train.cli import main
from mal_train.commands.tune import tune
from mal_train.config.spec import load_spec
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.locked_file import no_follow, try_lock
from mal_train.tuning.tuner import TuningFailed
from tests.mal_train.training.runs import SMALL
from tests.mal_train.tuning.studies import program
from tests.paths import ROOT
from tests.scenes import write_scenes

MARGINS = [[0.0, 1.2], [0.0, 0.5]]
SPACE = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "train.margin_rate": {"choices": MARGINS}}


def spec_file(folder: Path, *overrides: str, masks: bool = True, **tune_section: Any) -> Path:
    """Writes scenes, and the spec of a search over them; returns the file."""
    parts = {"train": write_scenes(folder / "train", images=2, masks=False, seed=1)}
    parts["val"] = write_scenes(folder / "val", images=2, masks=masks, seed=2)
    paths = [
        f"dataset.{name}_{kind}='{path}'"
        for name, pair in parts.items()
        for kind, path in zip(("ann_path", "img_dir"), pair, strict=True)
    ]
    spec = load_spec(None, [*SMALL, *paths, "train.board_size=0", f"results_dir='{folder}'", *overrides])
    data = spec.model_dump(mode="json", exclude={"tune"}) | {"tune": {"space": SPACE, "trials": 2, **tune_section}}
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def until(condition: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_ended(training: Path) -> bool:
    """Returns True when no process holds the lock of a training's folder any more."""
    file = no_follow(training / ".lock", os.O_RDWR)
    try:
        return try_lock(file)
    finally:
        os.close(file)


@pytest.mark.promise("training", "A search that is killed resumes its half trials from their checkpoints")
def test_a_killed_search_ends_its_training_and_the_same_command_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # to compile the step would take longer than the training
    arguments = ["tune", "-e", str(spec_file(tmp_path, "train.num_epochs=6", masks=False, trials=1))]
    training = tmp_path / "tune" / "mal" / "trials" / "0000" / "train"
    command = [sys.executable, "-m", "mal_train.cli", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        until(lambda: list(training.glob("model_*.malckpt")))
        process.kill()
    until(lambda: has_ended(training))
    assert not (training / "report.html").exists()  # it did not get to the end
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert "resuming from" in (training.parent / "log.txt").read_text()
    assert (training / "report.html").exists()
    assert re.search(r"objective proxy.*no masks", first.err)
    assert re.search(r"best: trial 1, box_proxy 0\.\d{4}", first.out)
    best = load_spec(tmp_path / "tune" / "mal" / "best.yaml", [])
    assert best.results_dir == str(tmp_path)
    assert 1e-4 <= best.train.lr <= 1e-2
    assert list(best.train.margin_rate) in MARGINS
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert "starts on" not in again.err


def test_the_page_and_the_spec_of_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = spec_file(tmp_path, trials=12, pruner="none")
    result = tune(load_spec(path, []), Console(), program=program(t0003="fail"))
    folder = tmp_path / "tune" / "mal"
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)  # no other file
    for text in ("parallel coordinates of 11 lines", "mIoU by trial", "PED-ANOVA", "train.margin_rate", "best.yaml"):
        assert text in page
    assert page.count("<polyline") == 11 + 1
    assert "exit code 2: dataset.crop_size" in page
    assert result.agreement.count == 11
    assert result.agreement.spearman == pytest.approx(1.0)
    assert [number for number, _ in result.failed] == [3]
    best = load_spec(folder / "best.yaml", [])
    assert best.train.lr == pytest.approx(result.value)
    assert best.tune == load_spec(None, []).tune
    assert f"# Trial {result.best} of the study mal" in (folder / "best.yaml").read_text()
    # The overrides to copy give the same training.
    copied = html.unescape(page[page.index("<pre>mal-train") + 5 : page.index("</pre>")]).replace("\\\n", " ")
    _, _, _, _, *overrides = shlex.split(copied)
    assert load_spec(path, overrides).train == best.train
    kept = [file.parent.parent.name for file in folder.glob("trials/*/train/*.malckpt")]
    assert kept == [f"{result.best:04d}"]
    assert "12 of 12 trials done" in capsys.readouterr().err


def test_all_checkpoints_are_kept_if_the_spec_says_so(tmp_path: Path) -> None:
    path = spec_file(tmp_path, keep_checkpoints="all")
    tune(load_spec(path, []), Console.silent(), program=program())
    assert len(list((tmp_path / "tune" / "mal").glob("trials/*/train/*.malckpt"))) == 2


def test_a_search_with_a_failed_trial_ends_with_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spec_file(tmp_path)
    monkeypatch.setattr("mal_train.commands.tune.tune.__kwdefaults__", {"program": program(t0000="fail")})
    assert main(["tune", "-e", str(path)]) == 3
    assert "trial 0 failed: exit code 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "section", "named"),
    [
        (["dataset.val_ann_path=''"], {}, "dataset.val_ann_path"),
        (["dataset.train_img_dir=nowhere"], {}, "dataset.train_img_dir"),
        (["dataset.load_mask=false"], {}, "dataset.load_mask"),
        ([], {"objective": "ap"}, "tune.objective"),
        ([], {"space": {}}, "tune.space"),
        ([], {"space": {"model.arch": {"choices": ["vit-micro/16", "vit-nano/16"]}}}, "model.arch: 'vit-nano/16'"),
        (["model.arch=vit-nano/16"], {}, "model.arch: 'vit-nano/16'"),
        ([], {"space": {"train.lrr": {"low": 1, "high": 2}}}, "train.lr"),
        ([], {"devices": [[]]}, "tune.devices"),
        ([], {"storage": "redis://host"}, "tune.storage"),
    ],
)
def test_a_search_that_cannot_begin_starts_no_trial(
    overrides: list[str], section: dict[str, Any], named: str, tmp_path: Path
) -> None:
    path = spec_file(tmp_path, *overrides, masks=False, **section)
    with pytest.raises(ConfigError) as caught:
        tune(load_spec(path, []), Console.silent(), program=program())
    assert named in str(caught.value)
    assert not (tmp_path / "tune" / "mal" / "trials").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("encryption_key: null", "encryption_key: hunter2"),
        ("train_img_dir: .*", "train_img_dir: https://127.0.0.1/images?sig=hunter2"),
        ("space:", "space:\n    dataset.train_img_dir: {choices: ['https://127.0.0.1/images?sig=hunter2']}"),
    ],
)
def test_a_secret_in_the_spec_is_not_repeated_in_the_specs_of_trials(before: str, after: str, tmp_path: Path) -> None:
    path = spec_file(tmp_path)
    path.write_text(re.sub(before, after, path.read_text()))
    with pytest.raises(ConfigError) as caught:
        tune(load_spec(path, []), Console.silent(), program=program())
    assert "hunter2" not in str(caught.value)
    assert not any("hunter2" in file.read_text() for file in tmp_path.rglob("*.yaml") if file != path)


@pytest.mark.parametrize("trials", [1, 2])
def test_a_search_without_a_complete_trial_fails_and_has_a_page_of_all_trials(tmp_path: Path, trials: int) -> None:
    path = spec_file(tmp_path, trials=trials)
    with pytest.raises(TuningFailed):
        tune(load_spec(path, []), Console.silent(), program=program(rest="fail"))
    page = (tmp_path / "tune" / "mal" / "report.html").read_text()
    assert page.count("exit code 2: dataset.crop_size") == trials


def test_another_spec_does_not_continue_a_study(tmp_path: Path) -> None:
    path = spec_file(tmp_path)
    tune(load_spec(path, []), Console.silent(), program=program())
    with pytest.raises(ConfigError, match=r"train\.batch_size 8 instead of 4"):
        tune(load_spec(path, ["train.batch_size=8"]), Console.silent(), program=program())
    # More trials of the same study, with other devices and paths, are no change.
    moved = [f"results_dir='{tmp_path}/moved'", f"tune.storage='sqlite:///{tmp_path}/tune/study.db'"]
    tune(load_spec(path, ["tune.trials=3", "tune.cpu_trials=2", *moved]), Console.silent(), program=program())
    assert [file.name for file in (tmp_path / "moved" / "tune" / "mal" / "trials").iterdir()] == ["0002"]


def test_without_optuna_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "mal_train.commands.tune")
    assert main(["tune", "-e", str(spec_file(tmp_path))]) == ConfigError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert "[train,tune]" in line
