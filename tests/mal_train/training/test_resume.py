"""A run resumed from any step ends with the weights of an uninterrupted run, bit for bit."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mal_train.commands.train import train
from mal_train.core.console import Console, ProgressBar
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, sha256_of
from mal_train.training.checkpoints import LATEST
from tests.mal_train.training.runs import assert_same, plain_mean_field, spec_of
from tests.scenes import write_scenes

SEED = 20260
EPOCHS = 4


@pytest.fixture(autouse=True)
def _plain_mean_field(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_mean_field(monkeypatch)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of student and teacher, and the moments of the optimizer."""
    checkpoint = load_checkpoint(path, None)
    assert checkpoint.training is not None
    moments = {
        f"{name}-{key}": value
        for name, state in checkpoint.training["optimizer_states"][0]["state"].items()
        for key, value in state.items()
    }
    return {**checkpoint.weights, **moments}


@pytest.mark.promise(
    "training",
    "Training resumed at any step ends with the bits of an undisturbed run",
)
@pytest.mark.parametrize(
    ("count", "accumulate"), [(4, 1), (3, 2), pytest.param(32, 1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_resuming_at_random_steps_gives_the_state_of_an_uninterrupted_run(
    count: int, accumulate: int, tmp_path: Path, record: Callable[..., None]
) -> None:
    # 17 boxes in batches of 2: the last batch of an epoch is a small one; 36 batches in all.
    def without_one(coco: dict[str, list[object]]) -> None:
        del coco["annotations"][-1]

    scenes = {
        "train": write_scenes(tmp_path / "train", images=9, masks=False, seed=1, change=without_one),
        "val": write_scenes(tmp_path / "val", images=2, seed=2),
    }
    common = (f"train.num_epochs={EPOCHS}", "train.batch_size=2", f"train.accum_grad_batches={accumulate}")
    by_step = ("train.checkpoint_interval_unit=step", "train.checkpoint_interval=1")
    # Validations take longer than the steps, so only the long form has them.
    validated = count > 4
    train(spec_of(scenes, tmp_path / "complete", *common, *by_step, validate=validated), Console.silent())
    files = sorted(path for path in (tmp_path / "complete" / "train").glob("model_*"))
    steps = EPOCHS * -(-9 // accumulate)
    assert len(files) == steps
    expected = state_of(files[-1])
    stops = sorted(random.Random(SEED).sample(range(steps - 1), count))
    same = 0
    for stop in stops:
        resume = f"train.resume_training_checkpoint_path='{files[stop]}'"
        again = train(spec_of(scenes, tmp_path / str(stop), *common, resume, validate=validated), Console.silent())
        assert again.checkpoint.name == files[-1].name
        assert (tmp_path / str(stop) / "train" / LATEST).exists()
        assert_same(expected, state_of(again.checkpoint))
        same += 1
    record("resumed training", resumed=count, equal=same, steps=steps)
    assert same == count


class RecordingConsole(Console):
    """Records the progress bars."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.is_terminal = True
        self.bars: list[ProgressBar] = []
        self.first_batches: list[int] = []

    def progress(self, total: int, unit: str, label: str = "", **options: Any) -> ProgressBar:
        bar = super().progress(total, unit, label, **options)
        self.first_batches.append(options["initial"])
        self.bars.append(bar)
        return bar


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_the_progress_bar_of_a_resumed_run_starts_at_the_checkpoint(stop: int, tmp_path: Path) -> None:
    scenes = {"train": write_scenes(tmp_path / "train", images=3, masks=False, seed=1)}
    common = ("train.batch_size=2", "train.num_epochs=3")
    by_step = ("train.checkpoint_interval=1", "train.checkpoint_interval_unit=step")
    train(spec_of(scenes, tmp_path / "complete", *common, *by_step), Console.silent())
    (file,) = (tmp_path / "complete" / "train").glob(f"model_*_step_{stop:05}.malckpt")
    console = RecordingConsole()
    resume = f"train.resume_training_checkpoint_path='{file}'"
    train(spec_of(scenes, tmp_path / "rest", *common, resume), console)
    (bar,) = console.bars
    # Three batches per epoch.
    assert (console.first_batches, bar.n, bar.total) == ([stop], 9, 9)


def test_an_interval_in_steps_is_counted_across_epochs(tmp_path: Path) -> None:
    scenes = {"train": write_scenes(tmp_path / "train", images=3, masks=False, seed=1)}
    spec = spec_of(
        scenes,
        tmp_path,
        "train.batch_size=2",
        "train.num_epochs=3",
        "train.checkpoint_interval=4",
        "train.checkpoint_interval_unit=step",
    )
    train(spec, Console.silent())
    names = sorted(path.name for path in (tmp_path / "train").glob("model_*"))
    # Three steps per epoch: one inside the second epoch, and one at the end.
    assert names == [
        "model_epoch_001_step_00004.malckpt",
        "model_epoch_002_step_00008.malckpt",
        "model_epoch_002_step_00009.malckpt",
    ]


def test_a_resumed_run_keeps_the_lineage_of_its_starting_weights(tmp_path: Path) -> None:
    scenes = {"train": write_scenes(tmp_path / "train", images=2, masks=False, seed=1)}
    by_step = ("train.checkpoint_interval=1", "train.checkpoint_interval_unit=step")
    donor = train(spec_of(scenes, tmp_path / "donor", "train.num_epochs=1"), Console.silent()).checkpoint
    start = f"train.pretrained_model_path='{donor}'"
    train(spec_of(scenes, tmp_path / "complete", "train.num_epochs=2", *by_step, start), Console.silent())
    (file,) = (tmp_path / "complete" / "train").glob("model_*_step_00001.malckpt")
    resume = f"train.resume_training_checkpoint_path='{file}'"
    rest = train(spec_of(scenes, tmp_path / "rest", "train.num_epochs=2", resume), Console.silent()).checkpoint
    provenance = load_checkpoint(rest, None).provenance
    assert (provenance["starting_weights"], provenance["steps"]) == (donor.name, 2)
    assert [(step["starting_weights"], step["sha256"]) for step in provenance["lineage"]] == [
        ("random", sha256_of(donor))
    ]
