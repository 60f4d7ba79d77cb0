"""Training in two processes, over gloo on the CPU."""

import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mal_train.commands.train import train
from mal_train.core.console import Console
from mal_train.data.datamodule import BoxDataset
from mal_train.distributed.env import DistributedEnv
from mal_train.distributed.process_group import init_process_group
from mal_train.training import module as training_module
from mal_train.training.checkpoints import LATEST, newest_checkpoint
from tests.mal_train.training.forked import exit_codes, train_together, training_processes, wait_for
from tests.mal_train.training.runs import assert_same, overrides_of, plain_mean_field, spec_of, statuses, weights
from tests.scenes import write_scenes

Scenes = dict[str, tuple[Path, Path]]
BY_STEP = ("train.checkpoint_interval_unit=step", "train.checkpoint_interval=1")


@pytest.fixture(autouse=True)
def _plain_mean_field(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_mean_field(monkeypatch)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    """Returns scenes with 11 boxes: the last batches of an epoch have two boxes and one."""
    folder = tmp_path_factory.mktemp("scenes")

    def without_one(coco: dict[str, Any]) -> None:
        del coco["annotations"][-1]

    return {
        "train": write_scenes(folder / "train", images=6, masks=False, seed=1, change=without_one),
        "val": write_scenes(folder / "val", images=2, seed=2),
    }


def open_listeners() -> set[str]:
    """Returns the addresses on which this process listens for other machines, as /proc/net shows them in hex."""
    own = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, _, state, *_ = line.split()[1:]
            is_loopback = address.startswith(("0100007F", f"{1 << 24:032X}")) or "FFFF00000100007F:" in address
            if state == "0A" and f"socket:[{line.split()[9]}]" in own and not is_loopback:
                found.add(address)
    return found


def listen(rank: int, store: str) -> None:
    """Joins a group of two processes; exits with 1 if that opens a port to other machines."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    before = open_listeners()
    with init_process_group(DistributedEnv(rank, 2, store=store), cuda=False) as group:
        is_open = group.any(bool(open_listeners() - before))
    sys.exit(int(is_open))


def test_processes_of_one_machine_listen_on_no_interface_but_loopback(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=listen, args=(rank, str(tmp_path / "store"))) for rank in range(2)]
    for process in ranks:
        process.start()
    assert exit_codes(ranks) == [0, 0]


def newest(results: Path) -> Path:
    path = newest_checkpoint(results / "train")
    assert path is not None
    return path


def test_two_processes_make_the_steps_of_one_process_with_twice_the_batch_size(scenes: Scenes, tmp_path: Path) -> None:
    # The learning rate scales with processes as with batch size, so both runs have the same rate.
    common = ("model.vit_dpr=0", "train.num_epochs=2")
    one = train(spec_of(scenes, tmp_path / "one", *common, "train.batch_size=4"), Console.silent()).checkpoint
    assert train_together(overrides_of(scenes, tmp_path / "two", *common, "train.batch_size=2"), tmp_path) == [0, 0]
    assert newest(tmp_path / "two").name == one.name == "model_epoch_001_step_00006.malckpt"
    a, b = weights(one), weights(newest(tmp_path / "two"))
    # Where a gradient is about 0, AdamW turns its rounding error into a full step; this concerns few entries.
    differences = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert float(differences.mean()) < 1e-6
    assert float((differences > 1e-4).float().mean()) < 1e-3


def test_all_processes_have_the_same_student_and_teacher(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = training_module.MalModule.on_train_batch_start

    def recorded(self: Any, batch: Any, batch_idx: int) -> None:
        state = {name: value.clone() for name, value in self.network.state_dict().items()}
        torch.save(state, tmp_path / f"{self.group.rank}-{self.global_step}.pt")
        start(self, batch, batch_idx)

    monkeypatch.setattr(training_module.MalModule, "on_train_batch_start", recorded)
    assert (
        train_together(overrides_of(scenes, tmp_path, "train.num_epochs=1", "train.batch_size=2"), tmp_path) == [0] * 2
    )
    for step in range(3):
        first, second = (torch.load(tmp_path / f"{rank}-{step}.pt", weights_only=True) for rank in range(2))
        assert_same(first, second)


def test_only_rank_0_writes_and_prints(scenes: Scenes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train_together(overrides_of(scenes, tmp_path, "train.num_epochs=1", validate=True), tmp_path) == [0, 0]
    printed = capfd.readouterr()
    assert statuses(tmp_path).count("STARTED") == statuses(tmp_path).count("SUCCESS") == 1
    assert printed.err.count("11 of 11 boxes") == 1
    written = [line for line in printed.err.splitlines() if line.startswith("wrote ")]
    assert sorted(Path(line).name for line in written) == ["model_epoch_000_step_00002.malckpt", "report.html"]
    assert printed.out.count("checkpoint: ") == 1
    assert sorted(path.name for path in (tmp_path / "train").glob("*.malckpt")) == [
        LATEST,
        "model_epoch_000_step_00002.malckpt",
    ]


@pytest.mark.promise(
    "training",
    "kill -9 of one of two training processes ends both; repeated, they give the same weights",
)
def test_a_killed_process_ends_the_other_and_the_resumed_run_ends_with_the_same_weights(
    scenes: Scenes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = (*BY_STEP, "train.batch_size=2", "train.num_epochs=5", "dataset.num_workers_per_gpu=1")
    assert train_together(overrides_of(scenes, tmp_path / "complete", *common), tmp_path) == [0, 0]
    cut = overrides_of(scenes, tmp_path / "cut", *common)
    with training_processes(cut, tmp_path) as ranks:
        wait_for(lambda: len(list((tmp_path / "cut" / "train").glob("model_*"))) >= 4)
        os.kill(ranks[1].pid or 0, signal.SIGKILL)
        assert exit_codes(ranks) == [1, -signal.SIGKILL]
    checkpoint = newest(tmp_path / "cut").name
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mal-train: ")]
    assert "another process" in line
    assert statuses(tmp_path / "cut")[-1] == "FAILURE"
    assert train_together(cut, tmp_path) == [0, 0]
    print(f"killed after {checkpoint}; the next run ended with {newest(tmp_path / 'cut').name}")
    assert_same(weights(newest(tmp_path / "complete")), weights(newest(tmp_path / "cut")))


def test_sigterm_to_one_process_saves_once_and_ends_both_with_143(
    scenes: Scenes, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training_module.MalModule.training_step

    def terminated(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 2 and self.group.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    common = ("train.batch_size=1", "train.accum_grad_batches=2", "train.num_epochs=2")
    assert train_together(overrides_of(scenes, tmp_path / "complete", *common), tmp_path) == [0, 0]
    cut = overrides_of(scenes, tmp_path / "cut", *common)
    with monkeypatch.context() as patch:
        patch.setattr(training_module.MalModule, "training_step", terminated)
        capfd.readouterr()
        assert train_together(cut, tmp_path) == [143, 143]
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("mal-train: ")]
    assert f"terminated after saving {newest(tmp_path / 'cut')};" in line
    assert "Traceback" not in err
    assert newest(tmp_path / "cut").name == "model_epoch_000_step_00003.malckpt"
    assert train_together(cut, tmp_path) == [0, 0]
    assert_same(weights(newest(tmp_path / "complete")), weights(newest(tmp_path / "cut")))


def test_a_non_finite_gradient_in_one_process_is_skipped_in_both(
    scenes: Scenes, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training_module.MalModule.training_step

    def broken(self: Any, batch: Any, batch_idx: int) -> Tensor:
        loss = step(self, batch, batch_idx)
        return loss * float("nan") if self.group.rank == 1 and self.global_step >= 2 else loss

    monkeypatch.setattr(training_module.MalModule, "training_step", broken)
    common = (*BY_STEP, "train.batch_size=2", "train.num_epochs=9")
    assert train_together(overrides_of(scenes, tmp_path, *common), tmp_path) == [5, 5]
    err = capfd.readouterr().err
    assert len(re.findall(r"^step \d+: ", err, re.MULTILINE)) == 10
    assert err.count("mal-train: ") == 1
    assert all(torch.isfinite(value).all() for value in weights(newest(tmp_path)).values())


def test_unreadable_images_of_all_processes_are_counted_together(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    annotations, images = write_scenes(tmp_path / "scenes", images=12)
    for number in (0, 11):  # one for each process
        (images / f"{number}.png").write_bytes(b"not an image")
    overrides = overrides_of({"train": (annotations, images)}, tmp_path, "train.batch_size=12")
    assert train_together(overrides, tmp_path) == [2, 2]
    err = capfd.readouterr().err
    assert len(re.findall(r"^image skipped: .*\.png", err, re.MULTILINE)) == 2
    assert err.count("mal-train: 2 of 12 ") == 1


def test_processes_that_read_different_boxes_are_refused(
    scenes: Scenes, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_train.data.annotations.TrainingBoxes.digest", lambda self: str(os.getpid()))
    assert train_together(overrides_of(scenes, tmp_path), tmp_path) == [2, 2]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mal-train: ")]
    assert "dataset.train_ann_path" in line


def test_a_random_seed_is_the_same_in_all_processes(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = BoxDataset.__getitem__

    def recorded(self: BoxDataset, key: Any) -> Any:
        (tmp_path / f"{os.environ['RANK']}.seed").write_text(str(self.seed))
        return cut(self, key)

    monkeypatch.setattr(BoxDataset, "__getitem__", recorded)
    overrides = overrides_of(scenes, tmp_path, "train.num_epochs=1", "train.seed=-1")
    assert train_together(overrides, tmp_path) == [0, 0]
    assert (tmp_path / "0.seed").read_text() == (tmp_path / "1.seed").read_text()


def test_recorded_losses_are_means_over_the_processes(scenes: Scenes, tmp_path: Path) -> None:
    common = ("model.vit_dpr=0", "train.num_epochs=1")
    train(spec_of(scenes, tmp_path / "one", *common, "train.batch_size=12"), Console.silent())
    assert train_together(overrides_of(scenes, tmp_path / "two", *common, "train.batch_size=6"), tmp_path) == [0, 0]
    losses = [
        float((tmp_path / name / "train/metrics.csv").read_text().splitlines()[1].split(",")[4])
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_running_statistics_are_averaged_before_the_teacher_copies_them(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = training_module.MalModule.on_train_start

    def with_statistics(self: Any) -> None:
        for half in (self.network.student, self.network.teacher):
            half.register_buffer("statistic", torch.tensor([float(self.group.rank)]), persistent=False)
        start(self)

    def recorded(self: Any) -> None:
        state = [float(half.statistic) for half in (self.network.student, self.network.teacher)]
        (tmp_path / f"{self.group.rank}.txt").write_text(str(state))

    monkeypatch.setattr(training_module.MalModule, "on_train_start", with_statistics)
    monkeypatch.setattr(training_module.MalModule, "on_train_end", recorded)
    assert train_together(overrides_of(scenes, tmp_path, "train.num_epochs=1"), tmp_path) == [0, 0]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["[0.5, 0.5]"] * 2
