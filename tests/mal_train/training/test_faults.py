"""Faults during a training: signals to process groups, full shared memory, stops during accumulation."""

import ctypes
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mal_train.commands.train import train
from mal_train.core.console import Console
from mal_train.core.errors import Terminated
from mal_train.distributed.env import DistributedEnv, read_distributed_env
from mal_train.distributed.process_group import ProcessGroup
from mal_train.training import module as training_module
from mal_train.training.checkpoints import CheckpointCallback, PreemptionHandler, newest_checkpoint
from mal_train.training.run_files import StatusFile, note_failure
from tests.mal_train.training.forked import exit_codes, train_together, training_processes
from tests.mal_train.training.runs import assert_same, overrides_of, plain_mean_field, spec_of, statuses, weights
from tests.scenes import write_scenes

Scenes = dict[str, tuple[Path, Path]]
CLONE_NEWNS = 0x00020000


@pytest.fixture(autouse=True)
def _plain_mean_field(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_mean_field(monkeypatch)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return {"train": write_scenes(tmp_path_factory.mktemp("scenes"), images=4, masks=False, seed=1)}


@pytest.mark.parametrize(
    ("number", "size"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGINT, 2)]
)
def test_a_signal_to_the_process_group_does_not_end_the_loader_processes(
    number: signal.Signals, size: int, scenes: Scenes, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    capfd: pytest.CaptureFixture[str] = request.getfixturevalue("capfd")
    step = training_module.MalModule.training_step

    def signaled(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 1 and self.group.rank == size - 1:
            os.killpg(0, number)
        return step(self, batch, batch_idx)

    def in_one_group() -> Any:
        env = read_distributed_env()
        if env.rank == 0:
            os.setpgid(0, 0)
            (tmp_path / "group").write_text(str(os.getpid()))
        else:
            while not (tmp_path / "group").exists() or not (tmp_path / "group").read_text():
                pass
            os.setpgid(0, int((tmp_path / "group").read_text()))
        return env

    cut = overrides_of(scenes, tmp_path, "train.batch_size=1", "dataset.num_workers_per_gpu=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_module.MalModule, "training_step", signaled)
        patch.setattr("mal_train.commands.train.read_distributed_env", in_one_group)
        assert train_together(cut, tmp_path, size) == [143 if number is signal.SIGTERM else 130] * size
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert "DataLoader" not in err
    assert statuses(tmp_path)[-1] == "FAILURE"
    if number is signal.SIGTERM:
        (line,) = [line for line in err.splitlines() if line.startswith("mal-train: ")]
        assert str(newest_checkpoint(tmp_path / "train")) in line


@pytest.mark.parametrize("kib", [16, 160])  # too small for a lock, and large enough for the first batch only
def test_full_shared_memory_ends_the_training_with_exit_code_4(
    kib: int, scenes: Scenes, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small /dev/shm")

    def with_little_shared_memory() -> Any:
        if ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
            os._exit(77)
        commands = f"mount --make-rprivate / && mount -t tmpfs -o size={kib}k tmpfs /dev/shm"
        if subprocess.run(commands, shell=True, check=False).returncode:
            os._exit(77)
        return read_distributed_env()

    monkeypatch.setattr("mal_train.commands.train.read_distributed_env", with_little_shared_memory)
    overrides = overrides_of(scenes, tmp_path, "dataset.crop_size=64", "dataset.num_workers_per_gpu=1")
    with training_processes(overrides, tmp_path, 1) as ranks:
        codes = exit_codes(ranks)
    if codes == [77]:
        pytest.skip("this machine does not allow mounts")
    assert codes == [4]
    err = capfd.readouterr().err
    assert "mal-train: /dev/shm: full" in err
    assert "dataset.num_workers_per_gpu" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("accumulate", [2, 3])
def test_sigterm_during_accumulation_is_handled_after_the_step(
    accumulate: int, scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training_module.MalModule.training_step

    def terminated(self: Any, batch: Any, batch_idx: int) -> Tensor:
        # The first batch of the second step.
        if self.global_step == 1 and batch_idx == accumulate:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    common = ("train.batch_size=1", f"train.accum_grad_batches={accumulate}", "train.num_epochs=2")
    assert train_together(overrides_of(scenes, tmp_path / "complete", *common), tmp_path, 1) == [0]
    cut = overrides_of(scenes, tmp_path / "cut", *common)
    with monkeypatch.context() as patch:
        patch.setattr(training_module.MalModule, "training_step", terminated)
        assert train_together(cut, tmp_path, 1) == [143]
    kept = newest_checkpoint(tmp_path / "cut" / "train")
    assert kept is not None
    assert kept.name == "model_epoch_000_step_00002.malckpt"
    assert train_together(cut, tmp_path, 1) == [0]
    newest = [newest_checkpoint(tmp_path / name / "train") for name in ("complete", "cut")]
    assert_same(*(weights(path) for path in newest if path is not None))


def test_the_largest_seed_of_the_schema_is_accepted(scenes: Scenes, tmp_path: Path) -> None:
    overrides = overrides_of(scenes, tmp_path, "train.num_epochs=1", f"train.seed={2**32 - 1}", "model.vit_dpr=0.5")
    assert train_together(overrides, tmp_path, 1) == [0]


@pytest.mark.parametrize(("benchmark", "deterministic"), [(False, True), (True, False)])
def test_cudnn_settings_apply_during_training_only(
    benchmark: bool, deterministic: bool, scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    backend = torch.backends.cudnn
    before = backend.benchmark, backend.deterministic
    step = training_module.MalModule.training_step

    def recorded(self: Any, batch: Any, batch_idx: int) -> Tensor:
        seen.append((backend.benchmark, backend.deterministic))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(training_module.MalModule, "training_step", recorded)
    switches = [f"train.cudnn.benchmark={benchmark}".lower(), f"train.cudnn.deterministic={deterministic}".lower()]
    train(spec_of(scenes, tmp_path, "train.num_epochs=1", *switches), Console.silent())
    assert set(seen) == {(benchmark, deterministic)}
    assert (backend.benchmark, backend.deterministic) == before


def test_a_killed_run_is_recorded_as_a_failure_once(tmp_path: Path) -> None:
    note_failure(tmp_path, "killed")
    assert not (tmp_path / "status.json").exists()
    status = StatusFile(tmp_path)
    status.write("RUNNING", "Training loop.")
    note_failure(tmp_path, "killed")
    note_failure(tmp_path, "killed")
    lines = [json.loads(line) for line in status.path.read_text().splitlines()]
    assert [line["status"] for line in lines] == ["RUNNING", "FAILURE"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_of_several_processes_ignores_signals_after_an_error(world_size: int, tmp_path: Path) -> None:
    group = ProcessGroup(DistributedEnv(world_size=world_size))
    handler = PreemptionHandler(CheckpointCallback(tmp_path, 1, print, group=group))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Terminated), handler.handle_signals():
            raise Terminated("saved")
        assert signal.getsignal(signal.SIGTERM) is (before if world_size == 1 else signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGTERM, before)
