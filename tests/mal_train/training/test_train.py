"""Complete training runs of a very small network."""

import csv
import json
import os
import signal
import threading
from multiprocessing import popen_fork
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mal_train.commands.common import task_folder
from mal_train.commands.train import TrainResult, train
from mal_train.config.spec import Spec
from mal_train.core.console import Console
from mal_train.core.errors import (
    BadDataset,
    CheckpointError,
    ConfigError,
    NonFiniteTraining,
    OutputError,
    Terminated,
    Truncated,
    WrongKey,
)
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import generate_identity, parse_key, write_identity
from mal_train.training import module as training_module
from mal_train.training.checkpoints import LATEST, newest_checkpoint, point_latest_to
from tests.mal_train.training.runs import assert_same, plain_mean_field, spec_of, statuses, weights
from tests.scenes import write_scenes


@pytest.fixture(autouse=True)
def _plain_mean_field(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_mean_field(monkeypatch)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("scenes")
    return {
        "train": write_scenes(folder / "train", images=4, masks=False, seed=1),
        "val": write_scenes(folder / "val", images=3, seed=2),
    }


def run(spec: Spec) -> TrainResult:
    return train(spec, Console())


def rows(results: Path) -> list[dict[str, str]]:
    with (results / "train" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_checkpoints_metrics_and_a_status(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    result = run(spec_of(scenes, tmp_path, "train.checkpoint_interval=2", validate=True))
    folder = tmp_path / "train"
    names = sorted(path.name for path in folder.glob("*.malckpt"))
    assert names == [LATEST, "model_epoch_001_step_00004.malckpt", "model_epoch_002_step_00006.malckpt"]
    assert (folder / LATEST).resolve() == result.checkpoint == folder / "model_epoch_002_step_00006.malckpt"
    assert statuses(tmp_path)[0] == "STARTED"
    assert statuses(tmp_path)[-1] == "SUCCESS"
    assert statuses(tmp_path).count("SUCCESS") == 1
    kinds = [(row["kind"], row["epoch"]) for row in rows(tmp_path)]
    assert kinds == [("train", "1"), ("val", "1"), ("train", "2"), ("val", "2"), ("train", "3"), ("val", "3")]
    assert result.report is not None
    assert float(rows(tmp_path)[-1]["mIoU"]) == pytest.approx(result.report.overall.miou, abs=1e-5)
    assert list(folder.glob("events.out.tfevents.*"))
    saved = load_checkpoint(result.checkpoint, None)
    assert saved.categories == [{"id": 1, "name": "ellipse"}]
    assert saved.provenance["epochs"] == 3
    assert saved.kind == "resume"
    for _, value in saved.weights.items():
        assert torch.isfinite(value).all()


def test_weights_depend_on_the_seed_only(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    first, again, other = (
        weights(run(spec_of(scenes, tmp_path / name, f"train.seed={seed}")).checkpoint)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert_same(first, again)
    assert not torch.equal(first["student.roi_head.mlp1.weight"], other["student.roi_head.mlp1.weight"])


def test_a_run_resumed_at_the_end_of_an_epoch_ends_with_the_same_weights(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    complete = run(spec_of(scenes, tmp_path / "complete", validate=True)).checkpoint
    first = tmp_path / "complete" / "train" / "model_epoch_000_step_00002.malckpt"
    rest = run(
        spec_of(scenes, tmp_path / "rest", f"train.resume_training_checkpoint_path='{first}'", validate=True)
    ).checkpoint
    assert rest.name == complete.name
    assert_same(weights(complete), weights(rest))


@pytest.mark.promise("training", "SIGTERM saves a training, and the same command resumes it")
def test_sigterm_saves_inside_an_epoch_and_the_same_command_resumes(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = run(spec_of(scenes, tmp_path / "complete")).checkpoint
    step = training_module.MalModule.training_step

    def killed_in_the_second_epoch(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    spec = spec_of(scenes, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(training_module.MalModule, "training_step", killed_in_the_second_epoch)
        with pytest.raises(Terminated) as caught:
            run(spec)
    assert caught.value.exit_code == 143
    assert newest_checkpoint(tmp_path / "cut" / "train") == tmp_path / "cut/train/model_epoch_001_step_00003.malckpt"
    assert statuses(tmp_path / "cut")[-1] == "FAILURE"
    assert_same(weights(complete), weights(run(spec).checkpoint))
    assert threading.current_thread() is threading.main_thread()


def test_a_finished_run_does_not_train_further(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    spec = spec_of(scenes, tmp_path)
    before = weights(run(spec).checkpoint)
    after = run(spec)
    assert_same(before, weights(after.checkpoint))
    assert statuses(tmp_path)[-1] == "SUCCESS"


def test_two_accumulated_batches_give_the_step_of_one_large_batch(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    # As in TAO, lr scales with batch_size but not with accumulation; the second run compensates for it.
    common = ["model.vit_dpr=0", "train.num_epochs=1", "train.warmup_epochs=0", "train.checkpoint_interval=1"]
    large = run(spec_of(scenes, tmp_path / "a", *common, "train.batch_size=8", "train.lr=1e-4")).checkpoint
    halves = run(
        spec_of(scenes, tmp_path / "b", *common, "train.batch_size=4", "train.accum_grad_batches=2", "train.lr=2e-4")
    ).checkpoint
    assert large.name == halves.name == "model_epoch_000_step_00001.malckpt"
    a, b = weights(large), weights(halves)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-4)


def test_fitted_thresholds_are_stored_in_the_checkpoint(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    fitted = load_checkpoint(run(spec_of(scenes, tmp_path / "a", validate=True)).checkpoint, None)
    given = load_checkpoint(
        run(spec_of(scenes, tmp_path / "b", "train.fit_thresholds=false", validate=True)).checkpoint, None
    )
    published = spec_of(scenes, tmp_path / "c", "compat=tao")
    assert given.labeler.mask_thres == (0.1, 0.1, 0.1)
    assert fitted.labeler.mask_thres != given.labeler.mask_thres
    assert not published.fits_thresholds


def test_checkpoints_are_encrypted_to_the_recipient(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    identity = tmp_path / "key.txt"
    recipient = write_identity(identity)
    short = ["train.num_epochs=1", f"encryption_key={recipient}"]
    result = run(spec_of(scenes, tmp_path / "run", *short))
    with pytest.raises(WrongKey):
        load_checkpoint(result.checkpoint, None)
    key = parse_key(f"file:{identity}", purpose="decryption", source="yaml")
    assert isinstance(load_checkpoint(result.checkpoint, key), Checkpoint)
    with pytest.raises(ConfigError, match="decryption_key: not given"):
        run(spec_of(scenes, tmp_path / "run", *short))
    run(spec_of(scenes, tmp_path / "run", *short, f"decryption_key='file:{identity}'", "train.num_epochs=2"))


def test_resuming_a_different_network_is_refused(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run(spec_of(scenes, tmp_path, "train.num_epochs=1"))
    with pytest.raises(ConfigError, match=r"model\.mask_head_num_convs 4\b.*\b5\b"):
        run(spec_of(scenes, tmp_path, "model.mask_head_num_convs=5"))
    assert statuses(tmp_path)[-1] == "FAILURE"


@pytest.mark.promise(
    "training", "Non-finite gradients are skipped, then stop a training; the last good checkpoint stays"
)
def test_non_finite_gradients_are_skipped_and_then_stop_training(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training_module.MalModule.training_step

    def broken_from_step(first: int, last: int) -> Any:
        def broken(self: Any, batch: Any, batch_idx: int) -> Tensor:
            loss = step(self, batch, batch_idx)
            seen = self.seen = getattr(self, "seen", -1) + 1
            return loss * float("nan") if first <= seen < last else loss

        return broken

    monkeypatch.setattr(training_module.MalModule, "training_step", broken_from_step(1, 3))
    result = run(spec_of(scenes, tmp_path / "some"))
    assert result.skipped_steps == 2
    monkeypatch.setattr(training_module.MalModule, "training_step", broken_from_step(2, 99))
    with pytest.raises(NonFiniteTraining) as caught:
        run(spec_of(scenes, tmp_path / "all", "train.num_epochs=9"))
    assert caught.value.exit_code == 5
    kept = newest_checkpoint(tmp_path / "all" / "train")
    assert kept is not None
    assert all(torch.isfinite(value).all() for value in weights(kept).values())


def test_an_unreadable_image_does_not_stop_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = write_scenes(tmp_path / "scenes", images=4)
    (images / "2.png").write_bytes(b"not an image")
    run(spec_of({"train": (annotations, images)}, tmp_path, "train.num_epochs=1"))
    assert capsys.readouterr().err.count("2.png") == 1


def test_rows_of_both_sets_that_are_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def damage(coco: dict[str, Any]) -> None:
        coco["annotations"][0]["bbox"] = [0, 0, 0, 5]
        coco["annotations"][1]["image_id"] = 99
        coco["annotations"].append(5)
        coco["images"][1]["file_name"] = "gone.png"

    scenes = {name: write_scenes(tmp_path / name, images=3, change=damage) for name in ("train", "val")}
    (scenes["train"][1] / "2.png").write_bytes(b"not an image")
    with pytest.raises(BadDataset, match=r"IMAGE_FORMAT: .*2\.png"):
        run(spec_of(scenes, tmp_path, "train.num_epochs=1", validate=True))
    capsys.readouterr()
    write_scenes(tmp_path / "train", images=3, change=damage)
    run(spec_of(scenes, tmp_path, "train.num_epochs=1", validate=True))
    printed = capsys.readouterr().err
    for name, (annotations, images) in scenes.items():
        title = f"{annotations}: not {'trained on' if name == 'train' else 'measured'}: "
        lines = printed.partition(title)[2].splitlines()[1:]
        for line in (
            "BAD_BOX: annotation 0: ",
            "IMAGE_UNKNOWN: annotation 1: ",
            f"IMAGE_NOT_FOUND: annotation 10: {images / 'gone.png'}: ",
            "NOT_AN_OBJECT: annotations[6]: ",
        ):
            assert any(text.startswith(f"  {line}") for text in lines[:5])


@pytest.mark.promise("training", "Too many unreadable images stop a training")
def test_too_many_unreadable_images_stop_training(tmp_path: Path) -> None:
    annotations, images = write_scenes(tmp_path / "scenes", images=6)
    for number in range(3):
        (images / f"{number}.png").write_bytes(b"not an image")
    scenes = {"train": (annotations, images)}
    for workers in (0, 1):
        with pytest.raises(BadDataset, match=r"^\d of 6 .*\.png"):
            run(spec_of(scenes, tmp_path, f"dataset.num_workers_per_gpu={workers}"))


def test_no_thread_that_prints_exists_when_a_loader_process_is_forked(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is forked while a thread prints inherits the lock of the output and hangs at its first line."""
    before, forked = set(threading.enumerate()), list[list[threading.Thread]]()
    launch = popen_fork.Popen._launch  # type: ignore[attr-defined]

    def recorded(self: Any, process: Any) -> Any:
        forked.append([thread for thread in threading.enumerate() if thread not in before])
        return launch(self, process)

    monkeypatch.setattr(popen_fork.Popen, "_launch", recorded)
    run(spec_of(scenes, tmp_path, "train.num_epochs=2", "dataset.num_workers_per_gpu=2"))
    assert len(forked) == 2
    # TensorBoard's writes its file only, which a loader process never opens.
    assert all(type(thread).__module__.startswith("tensorboard.") for threads in forked for thread in threads)


def test_names_of_the_validation_set_that_are_spelled_otherwise_are_reported_once(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    annotations, images = scenes["val"]
    content = json.loads(annotations.read_text())
    for row in content["images"]:
        row["file_name"] = f"old/{row['file_name']}"
    renamed = tmp_path / "renamed.json"
    renamed.write_text(json.dumps(content))
    run(spec_of({**scenes, "val": (renamed, images)}, tmp_path, "train.num_epochs=2", validate=True))
    assert capfd.readouterr().err.count("3 images of another spelling") == 1


def test_libraries_print_nothing(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(spec_of(scenes, tmp_path, "train.num_epochs=1"))
    printed = capfd.readouterr()
    assert printed.out == ""
    starts = (
        "training on",
        "no CUDA",
        "starting from",
        "checkpoints are",
        "no validation",
        "first batch",
        "epoch",
        "wrote",
    )
    assert [line for line in printed.err.splitlines() if not line.startswith(starts)] == []


def test_the_output_files_do_not_contain_the_key(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    _, secret = generate_identity()
    run(spec_of(scenes, tmp_path, "train.num_epochs=1").model_copy(update={"encryption_key": secret}))
    for path in (tmp_path / "train").iterdir():
        assert secret.encode() not in path.read_bytes()


def test_the_newest_checkpoint_is_found_without_the_latest_link(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("model_epoch_002_step_00030", "model_epoch_010_step_00110", "model_epoch_010_step_00099"):
        (tmp_path / f"{name}.malckpt").write_text(name)
    assert newest_checkpoint(tmp_path) == tmp_path / "model_epoch_010_step_00110.malckpt"
    point_latest_to(tmp_path / "model_epoch_002_step_00030.malckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "model_epoch_002_step_00030.malckpt"


# A flipped bit in an unencrypted file is detected only if it breaks the layout.
@pytest.mark.promise("training", "A damaged newest checkpoint is reported, and training resumes from the one before")
@pytest.mark.parametrize(
    ("damage", "is_encrypted"), [("cut", False), ("empty", False), ("cut", True), ("empty", True), ("flipped", True)]
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    damage: str,
    is_encrypted: bool,
    scenes: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = []
    if is_encrypted:
        recipient = write_identity(tmp_path / "key.txt")
        keys = [f"encryption_key={recipient}", f"decryption_key='file:{tmp_path / 'key.txt'}'"]
    spec = spec_of(scenes, tmp_path, "train.num_epochs=2", *keys)
    path = run(spec).checkpoint
    key = parse_key(f"file:{tmp_path / 'key.txt'}", purpose="decryption", source="yaml") if is_encrypted else None
    expected = load_checkpoint(path, key).weights
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:-1000], "flipped": flipped, "empty": b""}[damage])
    capsys.readouterr()
    again = run(spec).checkpoint
    # The damaged file is reported, and written again at the end.
    lines = [line for line in capsys.readouterr().err.splitlines() if str(path) in line]
    assert len(lines) == 2
    assert lines[0] != lines[1] == f"wrote {path}"
    assert again == path
    assert_same(dict(expected), dict(load_checkpoint(again, key).weights))


def test_a_training_state_that_does_not_fit_this_run_is_refused_before_it_is_restored(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    spec = spec_of(scenes, tmp_path, "train.num_epochs=2")
    path = run(spec).checkpoint
    with pytest.raises(CheckpointError, match="training state"):
        run(spec_of(scenes, tmp_path, "train.num_epochs=3", "model.frozen_stages=[0]"))
    damaged = load_checkpoint(path, None)
    assert damaged.training is not None
    damaged.training["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(1)
    save_checkpoint(path, damaged, None)
    with pytest.raises(CheckpointError, match="exp_avg"):
        run(spec_of(scenes, tmp_path, "train.num_epochs=3"))


def test_training_does_not_restart_if_all_checkpoints_are_damaged(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    spec = spec_of(scenes, tmp_path, "train.num_epochs=1")
    path = run(spec).checkpoint
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Truncated):
        run(spec)


def test_two_runs_cannot_use_the_same_output_folder(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    spec = spec_of(scenes, tmp_path, "train.num_epochs=1")
    with task_folder(spec, "train"), pytest.raises(OutputError, match="another run"):
        run(spec)
    run(spec)
