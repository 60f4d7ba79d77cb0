import io
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mal_train.commands.common import task_folder
from mal_train.config.spec import Spec
from mal_train.core.atomic_io import TEMPORARY_SUFFIX
from mal_train.core.console import Console
from mal_train.core.errors import OutputError
from mal_train.distributed.env import TUNER
from mal_train.training.progress import Progress
from mal_train.training.run_files import METRIC_COLUMNS, MetricsFile, StatusFile, StatusReader


def test_a_status_line_repeats_earlier_metrics(tmp_path: Path) -> None:
    status = StatusFile(tmp_path)
    status.write("RUNNING", "a", kpi={"train_loss": 1.0}, progress={"epoch": 1})
    status.write("RUNNING", "b", kpi={"mIoU": 0.5})
    status.write("SUCCESS", "c")
    lines = [json.loads(line) for line in status.path.read_text().splitlines()]
    assert [line.get("epoch") for line in lines] == [1, None, None]
    assert lines[-1]["kpi"] == {"train_loss": 1.0, "mIoU": 0.5}
    assert {"date", "time", "status", "verbosity", "message"} <= lines[-1].keys()


def test_a_status_reader_returns_each_complete_line_once(tmp_path: Path) -> None:
    reader = StatusReader(tmp_path)
    assert reader.new_lines() == []
    status = StatusFile(tmp_path)
    status.write("STARTED", "a")
    with status.path.open("a") as file:
        file.write('not JSON\n{"status": "RUNN')
    assert [line["message"] for line in reader.new_lines()] == ["a"]
    assert reader.new_lines() == []
    with status.path.open("a") as file:
        file.write('ING", "message": "b"}\n')
    assert [line["message"] for line in reader.new_lines()] == ["b"]


def test_a_status_reader_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "status.json").symlink_to("/etc/hostname")
    with pytest.raises(OutputError):
        StatusReader(tmp_path).new_lines()


def test_a_trial_waits_for_a_former_run_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_train.commands.common.LOCK_POLL_S", 0.01)
    spec = Spec(results_dir=str(tmp_path))
    with task_folder(spec, "train"), pytest.raises(OutputError), task_folder(spec, "train"):
        pass
    former = task_folder(spec, "train")
    former.__enter__()
    monkeypatch.setenv(TUNER, "1")
    ending = threading.Timer(0.2, former.__exit__, (None, None, None))
    ending.start()
    with task_folder(spec, "train"):
        ending.join()
    monkeypatch.setattr("mal_train.commands.common.SAVE_GRACE_S", 0.05)
    with task_folder(spec, "train"), pytest.raises(OutputError), task_folder(spec, "train"):
        pass


def test_a_status_file_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"status\.json"):
        StatusFile(tmp_path / "nowhere").write("STARTED", "a")


@pytest.mark.parametrize("name", [".lock", "experiment.yaml", "status.json", "metrics.csv"])
def test_no_file_of_a_run_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    folder, victim = tmp_path / "train", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("victim")
    (folder / name).symlink_to(victim)
    spec = Spec(results_dir=str(tmp_path))
    with pytest.raises(OutputError), task_folder(spec, "train"):
        MetricsFile(folder, append=False)
    assert victim.read_text() == "victim"


def test_a_run_removes_the_temporary_files_of_a_killed_one(tmp_path: Path) -> None:
    left = tmp_path / "train" / f".model_epoch_000_step_00010.malckpt{TEMPORARY_SUFFIX}"
    left.parent.mkdir()
    left.touch()
    with task_folder(Spec(results_dir=str(tmp_path)), "train"):
        assert not left.exists()


def test_a_resumed_run_keeps_the_earlier_rows(tmp_path: Path) -> None:
    for append in (False, True):
        metrics = MetricsFile(tmp_path, append=append)
        metrics.add("train", 1, 10, {"loss": 0.5, "mIoU": None})
        metrics.close()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[1] == lines[2] == "train,1,10,,0.5" + "," * (len(METRIC_COLUMNS) - 5)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_lines_show_rate_and_remaining_time() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(Console(stream), clock)
    trainer: Any = SimpleNamespace(num_training_batches=100, max_epochs=2, current_epoch=0)
    module: Any = SimpleNamespace()
    progress.on_train_start(trainer, module)
    progress.on_train_batch_start(trainer, module, None, 0)
    clock.now = 500.0  # the first batch compiles
    for batch in range(42):
        progress.on_train_batch_end(trainer, module, None, None, batch)
        clock.now += 2.0
    lines = stream.getvalue().splitlines()
    assert "500.0 s" in lines[0]
    assert lines[1].startswith("epoch 1/2: batch 5/200, 2.00 s/batch, 06:30 left")
    assert len(lines) == 11


def test_lines_are_printed_while_the_first_batch_runs_and_not_afterwards() -> None:
    stream = io.StringIO()
    progress = Progress(Console(stream), line_every_s=0.01)
    trainer: Any = SimpleNamespace(num_training_batches=100, max_epochs=2, current_epoch=0)
    module: Any = SimpleNamespace()
    progress.on_train_start(trainer, module)
    progress.on_train_batch_start(trainer, module, None, 0)
    while stream.getvalue().count("first batch:") < 2:
        time.sleep(0.001)
    running = threading.active_count()
    progress.on_train_batch_end(trainer, module, None, None, 0)
    assert threading.active_count() == running - 1


def test_a_run_resumed_inside_an_epoch_counts_from_its_first_batch() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(Console(stream), clock)
    trainer: Any = SimpleNamespace(num_training_batches=100, max_epochs=3, current_epoch=1)
    progress.on_train_start(trainer, module := cast(Any, SimpleNamespace()))
    for batch in range(40, 57):
        progress.on_train_batch_start(trainer, module, None, batch)
        clock.now += 2.0
        progress.on_train_batch_end(trainer, module, None, None, batch)
    *_, line = stream.getvalue().splitlines()
    # 157 of 300 batches are done, 17 of them in this run, at two seconds per batch.
    assert line.startswith("epoch 2/3: batch 157/300, 2.00 s/batch, 04:46 left")
