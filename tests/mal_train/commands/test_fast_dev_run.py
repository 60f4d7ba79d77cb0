"""`mal-train train --fast-dev-run`: every recipe goes through every phase, and a phase that fails is an error."""

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from mal_train.cli import main
from mal_train.commands.default_spec import SPECS
from mal_train.commands.fast_dev_run import EPOCHS, STEPS_PER_EPOCH, FastDevRun, shortened
from mal_train.commands.train import fast_dev_run
from mal_train.core.coco.annotations import read_coco
from mal_train.core.coco.left_out import LeftOut
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset, ConfigError, NonFiniteTraining
from mal_train.core.masks.rle import encode_mask
from mal_train.data.annotations import TrainingBoxes
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint
from mal_train.training.module import MalModule
from mal_train.training.step import LossWeights, StepLosses
from tests.mal_train.training.runs import plain_mean_field, spec_of
from tests.scenes import write_scenes

SMALL = (
    *("model.arch=vit-micro/16", "model.mask_head_hidden_channel=8", "model.mask_head_out_channel=8"),
    *("dataset.crop_size=32", "dataset.test_crop_size=32", "dataset.min_obj_size=100", "dataset.num_workers_per_gpu=0"),
    *("train.num_gpus=1", "train.batch_size=4", "train.pretrained_model_path=null", "train.crf_num_iter=3"),
)
"""Overrides by which a recipe runs in seconds, without its starting weights; docs/training.md names them."""
PHASES = ["data", "network", "step 1", "step 2", "step 3", "step 4", "losses", "teacher"]
VALIDATED = ["validation", "thresholds", "calibration", "checkpoint", "report"]


def boxes_of(n_masked: int) -> TrainingBoxes:
    """Returns six boxes on two images, of which the last ones have masks."""
    mask = encode_mask(np.ones((9, 9), dtype=np.bool_))
    positions = np.zeros((6, 4))
    positions[:, 0] = range(6)
    return TrainingBoxes(
        paths=(Path("a.png"), Path("b.png")),
        size_wh=np.array([[9, 9], [9, 9]]),
        image_of_box=np.array([0, 0, 0, 0, 1, 1]),
        boxes_xywh=positions,
        total=6,
        left_out=LeftOut(),
        masks=(*[None] * (6 - n_masked), *[mask] * n_masked) if n_masked else (),
    )


@pytest.fixture(autouse=True)
def _plain_mean_field(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_mean_field(monkeypatch)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("scenes")
    return {
        "train": write_scenes(folder / "train", images=20, seed=1),
        "val": write_scenes(folder / "val", images=50, seed=2),
    }


def paths(scenes: dict[str, tuple[Path, Path]], results: Path) -> list[str]:
    return [f"results_dir='{results}'"] + [
        f"dataset.{part}_{name}='{path}'"
        for part, files in scenes.items()
        for name, path in zip(("ann_path", "img_dir"), files, strict=True)
    ]


@pytest.mark.parametrize("name", [*SPECS, "demo"])
def test_a_recipe_goes_through_every_phase(
    name: str, scenes: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = Path(__file__).parents[3] / "mal_train" / "specs" / f"{name}.yaml"
    arguments = ["train", "-e", str(spec), "--fast-dev-run", *SMALL, *paths(scenes, tmp_path)]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.strip().endswith(f": {', '.join(PHASES + VALIDATED)}")
    folder = tmp_path / "train-fast-dev-run"
    assert (folder / "report.html").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    masks = name.startswith("small-cpu-round")  # their supervision is pseudo
    assert ("mask" in line(err, "losses")) == masks
    assert ("crf" in line(err, "losses")) != masks
    fits = name not in {"tao", "demo"}
    assert ("not fitted" not in line(err, "thresholds")) == fits
    assert ("not fitted" not in line(err, "calibration")) == fits


def line(text: str, phase: str) -> str:
    """Returns the line of a phase."""
    return next(one for one in text.splitlines() if one.startswith(f"fast-dev-run: {phase} ("))


def test_a_dev_run_leaves_a_real_run_alone_and_resumes_nothing(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    given = spec_of(scenes, tmp_path, "train.resume_training_checkpoint_path=/no/such/file", "publish_to=s3://b/p")
    spec = shortened(given)
    assert spec.task_dir("train") != given.task_dir("train")
    assert spec.publish_to == ""
    real = given.task_dir("train")
    real.mkdir()
    (real / "model_epoch_000_step_00001.malckpt").write_bytes(b"a real run")
    for _ in range(2):
        fast_dev_run(spec, Console.silent())
        checkpoint = load_checkpoint(spec.task_dir("train") / "mal_model_latest.malckpt", None)
        assert checkpoint.provenance["steps"] == EPOCHS * STEPS_PER_EPOCH
    assert [path.name for path in real.iterdir()] == ["model_epoch_000_step_00001.malckpt"]


def test_the_first_step_is_inside_the_ramps_and_the_last_has_the_full_weights(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = shortened(spec_of(scenes, tmp_path, "train.loss_mil_step=1000", "train.loss_crf_step=4000"))
    fast_dev_run(spec, Console())
    err = capsys.readouterr().err
    assert "weights: MIL 2, CRF 0.25;" in line(err, "step 1")
    assert "weights: MIL 4, CRF 0.5;" in line(err, "step 4")


def test_every_process_of_a_dev_run_gets_the_flag(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], int]] = []

    def launch(argv: list[str], count: int) -> int:
        started.append((argv, count))
        return 0

    monkeypatch.setattr("mal_train.distributed.launch.launch", launch)
    spec = tmp_path / "spec.yaml"
    spec.write_text("train: {num_gpus: 2}")
    assert main(["train", "-e", str(spec), "--fast-dev-run", *paths(scenes, tmp_path)]) == 0
    [(argv, count)] = started
    assert "--fast-dev-run" in argv
    assert count == 2


def test_a_network_that_does_not_change_is_an_error(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = shortened(spec_of(scenes, tmp_path, "train.lr=0"))
    with pytest.raises(ConfigError, match=r"^train\.lr"):
        fast_dev_run(spec, Console())
    assert capsys.readouterr().err.strip().endswith(f"failed; phases that ran: {', '.join(PHASES[:-1])}")


def test_steps_without_a_finite_gradient_are_an_error(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = MalModule.training_step
    monkeypatch.setattr(MalModule, "training_step", lambda *given: step(*given) * torch.nan)
    with pytest.raises(NonFiniteTraining):
        fast_dev_run(shortened(spec_of(scenes, tmp_path)), Console.silent())


def test_a_loss_that_is_never_computed_is_an_error(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MalModule, "loss_weights", lambda *_: LossWeights(4.0, 0.0))
    with pytest.raises(ConfigError, match=r"^train\.loss_crf_weight"):
        fast_dev_run(shortened(spec_of(scenes, tmp_path)), Console.silent())


@pytest.mark.parametrize("first", ["mil", "mask"])
def test_a_loss_of_any_accumulated_batch_counts(first: str, tmp_path: Path) -> None:
    spec = spec_of({}, tmp_path, "train.loss_crf_weight=0", "train.batch_size=2")
    run, module = FastDevRun(spec, Console.silent(), 1), Mock(spec=MalModule)
    run.few_boxes(boxes_of(2))
    module.loss_weights.return_value = LossWeights(4.0, 0.0)
    zero = {name: torch.zeros(()) for name in StepLosses._fields}
    for global_step, name in enumerate((first, {"mil": "mask", "mask": "mil"}[first])):
        module.last_losses = StepLosses(**{**zero, name: torch.ones(())})
        trainer: Any = SimpleNamespace(global_step=global_step)
        run.on_train_batch_end(trainer, module, None, None, global_step)
    run._check_losses()
    assert run.phases[-1] == "losses"


def test_a_validation_that_labels_nothing_is_an_error(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    spec = shortened(spec_of({**scenes, "val": (scenes["val"][0], empty)}, tmp_path, validate=True))
    with pytest.raises(BadDataset, match=r"^dataset\.val_ann_path"):
        fast_dev_run(spec, Console.silent())


def test_the_validation_keeps_a_few_masks_of_each_image(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    coco = read_coco(scenes["val"][0])
    crowded = dataclasses.replace(
        coco, annotations=[dataclasses.replace(row, image_id=0) for row in coco.annotations[:20]] + coco.annotations
    )
    few = FastDevRun(spec_of(scenes, tmp_path), Console.silent(), 1).few_masks(crowded)
    counts = Counter(row.image_id for row in few.annotations)
    assert counts[0] == 8
    assert counts.total() == 80
    assert set(few.images) == set(counts)


@pytest.mark.parametrize(("n_masked", "expected"), [(0, [0, 1, 2, 3]), (2, [0, 1, 4, 5]), (5, [0, 1, 2, 3])])
def test_half_of_the_boxes_have_masks_as_far_as_there_are(n_masked: int, expected: list[int], tmp_path: Path) -> None:
    boxes = boxes_of(n_masked)
    few = FastDevRun(spec_of({}, tmp_path, "train.batch_size=2"), Console.silent(), 1).few_boxes(boxes)
    assert few.boxes_xywh[:, 0].tolist() == expected
    assert [boxes.paths[boxes.image_of_box[index]] for index in expected] == [few.paths[i] for i in few.image_of_box]
