"""What a run shows to people and machines: boards, TensorBoard, the page at the end, and how its status ends."""

import base64
import io
import json
import os
import re
import signal
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from mal_train.cli import main
from mal_train.commands.common import Task, task_folder
from mal_train.commands.train import TrainResult, train
from mal_train.commands.training_report import failures_by_category
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import read_coco
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset, ConfigError, MalError, NonFiniteTraining, OutOfDeviceMemory, OutputError
from mal_train.core.masks import rle
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.kernel.checkpoint.keys import generate_identity
from mal_train.training import module as training_module
from mal_train.training.panels import close_ups, typical
from mal_train.training.run_files import MetricsFile, StatusFile, note_failure, read_metrics
from tests.mal_train.training.runs import SMALL, plain_mean_field, spec_of
from tests.scenes import write_scenes

_, SECRET = generate_identity()


@pytest.fixture(scope="module", autouse=True)
def _plain_mean_field() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        plain_mean_field(patch)
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("scenes")
    return {
        "train": write_scenes(folder / "train", images=4, masks=False, seed=1),
        "val": write_scenes(folder / "val", images=3, seed=2),
    }


def run(spec: Spec) -> TrainResult:
    return train(spec, Console())


@pytest.fixture(scope="module")
def watched(scenes: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with validation, sealed with a secret key that stands in its spec."""
    results = tmp_path_factory.mktemp("watched")
    spec = spec_of(scenes, results, "train.board_size=4", validate=True)
    run(spec.model_copy(update={"encryption_key": SECRET}))
    return results / "train"


def test_every_validation_leaves_a_board_of_its_worst_masks(watched: Path) -> None:
    boards = sorted(path.name for path in (watched / "boards").iterdir())
    assert boards == ["epoch_001.png", "epoch_002.png", "epoch_003.png"]
    with Image.open(watched / "boards" / "epoch_003.png") as board:
        sheet = np.asarray(board)
    # Four pictures in one row, each with the mask's color and the box's.
    assert sheet.shape == (248, 830, 3)
    for color in ((64, 224, 255), (255, 214, 0)):
        assert (np.abs(sheet.astype(int) - color).sum(axis=2) < 30).any()


def test_tensorboard_shows_the_same_figures_as_the_csv_and_the_boards(watched: Path) -> None:
    events = EventAccumulator(str(watched), size_guidance={"images": 0})
    events.Reload()
    rows = read_metrics(watched)
    for tag, kind, column in (
        ("train/loss", "train", "loss"),
        ("train/lr", "train", "lr"),
        ("val/mIoU", "val", "mIoU"),
    ):
        expected = {row["step"]: row[column] for row in rows if row["kind"] == kind}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(expected, rel=1e-5)
    pictures = events.Images("val/worst_first")
    assert [picture.step for picture in pictures] == [2, 4, 6]
    with (
        Image.open(io.BytesIO(pictures[-1].encoded_image_string)) as shown,
        Image.open(watched / "boards" / "epoch_003.png") as board,
    ):
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(board))


def test_the_page_at_the_end_stands_alone_and_holds_every_section(watched: Path) -> None:
    page = (watched / "report.html").read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "The run",
        "Curves",
        "Metrics",
        "Quality of the score",
        "Worst masks",
        "Typical masks",
        "Failures by category",
        "Settings",
    ]
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page
    assert "license of the starting weights" in page
    assert page.count("<polyline") >= 6
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 12
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as picture:
        assert max(picture.size) == 240


def test_the_pages_figures_are_those_of_the_last_validation(watched: Path) -> None:
    page = (watched / "report.html").read_text()
    last = [row for row in read_metrics(watched) if row["kind"] == "val"][-1]
    assert f"<td>mIoU</td><td>{last['mIoU']:.3f}</td>" in page


def test_settings_are_told_without_the_secret(watched: Path) -> None:
    for path in (*watched.glob("*.*"), *watched.glob("events*")):
        assert SECRET.encode() not in path.read_bytes(), path
    experiment = yaml.safe_load((watched / "experiment.yaml").read_text())
    assert experiment["train"]["board_size"] == 4
    assert experiment["encryption_key"] == "<not written down>"
    assert "<td>train.batch_size</td><td>4</td><td>3</td>" in (watched / "report.html").read_text()


def test_the_crop_that_was_trained_on_is_told_where_the_spec_leaves_it_to_the_backbone(tmp_path: Path) -> None:
    spec = spec_of({}, tmp_path, "model.arch=vit-mae-huge/14", "dataset.crop_size=null")
    for task, told in (("train", 504), ("evaluate", None)):
        with task_folder(spec, cast(Task, task)) as (folder, _):
            assert yaml.safe_load((folder / "experiment.yaml").read_text())["dataset"]["crop_size"] == told


def test_a_run_without_validation_has_a_page_that_says_so(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run(spec_of(scenes, tmp_path, "train.num_epochs=1"))
    page = (tmp_path / "train" / "report.html").read_text()
    assert "There was no validation" in page
    assert not (tmp_path / "train" / "boards").exists()


def test_no_board_where_none_is_wanted(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run(spec_of(scenes, tmp_path, "train.num_epochs=1", "train.board_size=0", validate=True))
    assert not (tmp_path / "train" / "boards").exists()


def test_a_run_with_nothing_left_to_do_keeps_its_page(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    spec = spec_of(scenes, tmp_path, "train.num_epochs=1", validate=True)
    run(spec)
    before = (tmp_path / "train" / "report.html").read_bytes()
    run(spec)
    assert (tmp_path / "train" / "report.html").read_bytes() == before


def test_a_row_that_a_kill_cut_off_does_not_run_into_the_next(tmp_path: Path) -> None:
    with closing(MetricsFile(tmp_path, append=False)) as metrics:
        metrics.add("train", 1, 10, {"loss": 1.0})
    with (tmp_path / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("train,1,2")
    with closing(MetricsFile(tmp_path, append=True)) as metrics:
        metrics.add("train", 1, 20, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(10.0, 1.0), (20.0, 0.5)]


def test_a_status_line_that_a_kill_cut_off_hides_no_failure(tmp_path: Path) -> None:
    StatusFile(tmp_path).write("RUNNING", "Training loop in progress")
    with (tmp_path / "status.json").open("a", encoding="utf-8") as file:
        file.write('{"date": "11/2')
    note_failure(tmp_path, "a process of the training failed")
    lines = [json.loads(line) for line in (tmp_path / "status.json").read_text(encoding="utf-8").splitlines()]
    assert [line["status"] for line in lines] == ["RUNNING", "FAILURE"]


def test_curves_show_a_step_once_though_a_killed_run_wrote_it_twice(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, append=False)
    for step, loss in ((10, 3.0), (20, 2.0), (20, 1.5), (30, 1.0)):
        metrics.add("train", 1, step, {"loss": loss})
    metrics.add("val", 1, 20, {"mIoU": 0.5, "mIoU_large": None})
    metrics.close()
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"] == [(10, 3), (20, 1.5), (30, 1)]
    assert [row for row in rows if row["kind"] == "val"] == [{"kind": "val", "epoch": 1, "step": 20, "mIoU": 0.5}]


@pytest.fixture(scope="module")
def evaluated(scenes: dict[str, tuple[Path, Path]]) -> Evaluator:
    coco = read_coco(scenes["val"][0])
    evaluator = Evaluator(coco.category_names)
    for number, annotation in enumerate(coco.annotations):
        truth = rle.from_segmentation(annotation.raw["segmentation"], 80, 96)
        mask = rle.decode_mask(truth)
        mask[:, : 16 * number] = False
        evaluator.add(annotation, rle.encode_mask(mask), 0.5)
    return evaluator


class TestPictures:
    def test_compared_masks_come_lowest_iou_first(self, evaluated: Evaluator) -> None:
        ious = [pair.row.iou for pair in evaluated.compared]
        assert ious == sorted(ious)
        assert len(set(ious)) > 2

    def test_pictures_come_in_the_order_asked_for(
        self, scenes: dict[str, tuple[Path, Path]], evaluated: Evaluator
    ) -> None:
        coco = read_coco(scenes["val"][0])
        shown = close_ups(evaluated.compared, coco, scenes["val"][1])
        assert [
            f"annotation {pair.row.annotation_id} " in f"{entry.detail} "
            for pair, entry in zip(evaluated.compared, shown, strict=True)
        ] == [True] * 6

    def test_a_picture_that_has_gone_takes_only_its_own_masks_along(
        self, scenes: dict[str, tuple[Path, Path]], evaluated: Evaluator, tmp_path: Path
    ) -> None:
        coco = read_coco(scenes["val"][0])
        for number in (0, 2):
            (tmp_path / f"{number}.png").write_bytes((scenes["val"][1] / f"{number}.png").read_bytes())
        assert len(close_ups(evaluated.compared, coco, tmp_path)) == 4

    def test_typical_masks_lie_round_the_median(self, evaluated: Evaluator) -> None:
        assert list(typical(evaluated.compared, 2)) == evaluated.compared[2:4]
        assert list(typical(evaluated.compared, 99)) == evaluated.compared

    def test_failures_are_counted_by_category(self, evaluated: Evaluator) -> None:
        ((name, count, bad, share, empty),) = failures_by_category(evaluated.compared, {1: "ellipse"})
        ious = [pair.row.iou for pair in evaluated.compared]
        assert (name, count, bad) == ("ellipse", 6, sum(iou < 0.5 for iou in ious))
        assert share == bad / 6
        assert empty == sum(iou == 0.0 for iou in ious)
        assert 0 < empty < bad < 6


class TestStatus:
    """status.json as TAO's is, with an ending for every way in which a run can end."""

    def lines(self, results: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (results / "train" / "status.json").read_text().splitlines()]

    def test_a_run_tells_its_stages_in_order(self, watched: Path) -> None:
        lines = self.lines(watched.parent)
        epoch = ["Eval metrics generated.", "Training loop in progress", "Train metrics generated."]
        messages = [line["message"] for line in lines]
        assert messages[:2] == ["Starting MAL train.", "Starting Training Loop."]
        assert messages[-2:] == ["Training loop complete.", "Train finished successfully."]
        assert sorted(messages[2:-2]) == sorted(3 * epoch)
        assert [line["status"] for line in lines] == ["STARTED", *["RUNNING"] * 11, "SUCCESS"]

    def test_lines_have_the_fields_of_the_published_ones(self, watched: Path) -> None:
        for line in self.lines(watched.parent):
            assert {"date", "time", "status", "verbosity", "message"} <= line.keys()
            # Months, hours and the rest are not padded with zeros.
            assert re.fullmatch(r"[1-9]\d?/[1-9]\d?/\d{4}", line["date"])
            assert re.fullmatch(r"(\d|[1-9]\d):(\d|[1-9]\d):(\d|[1-9]\d)", line["time"])

    def test_epoch_lines_tell_progress_and_the_time_left(self, watched: Path) -> None:
        (line,) = [
            line
            for line in self.lines(watched.parent)
            if line["message"] == "Training loop in progress" and line["epoch"] == 2
        ]
        assert (line["step"], line["max_epoch"], line["max_step"]) == (4, 3, 6)
        assert re.fullmatch(r"\d+:\d\d:\d\d", line["time_per_epoch"])
        assert re.fullmatch(r"\d+:\d\d:\d\d", line["eta"])
        assert float(line["time_per_step"]) > 0

    def test_figures_stay_on_later_lines(self, watched: Path) -> None:
        lines = self.lines(watched.parent)
        wanted = {"train_loss", "mIoU", "mIoU_small", "mIoU_medium", "mIoU_large"}
        assert wanted <= lines[-1]["kpi"].keys()
        known: set[str] = set()
        for line in lines:
            assert known <= line.get("kpi", {}).keys()
            known |= line.get("kpi", {}).keys()

    @pytest.mark.parametrize(
        ("fault", "exit_code"),
        [
            (RuntimeError("unexpected"), 1),
            (ConfigError("setting"), 2),
            (BadDataset("data"), 2),
            (OutputError("disk full"), 4),
            (NonFiniteTraining("nan"), 5),
            (OutOfDeviceMemory("too big"), 1),
            (torch.OutOfMemoryError("CUDA out of memory"), 1),
            (KeyboardInterrupt("Ctrl-C"), 130),
            (MemoryError("host"), 1),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
    )
    def test_whatever_ends_a_run_is_written_down_as_a_failure(
        self,
        scenes: dict[str, tuple[Path, Path]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        fault: BaseException,
        exit_code: int,
    ) -> None:
        def broken(self: Any, batch: Any, batch_idx: int) -> Tensor:
            raise fault

        monkeypatch.setattr(training_module.MalModule, "training_step", broken)
        assert main(["train", "-e", self.written(scenes, tmp_path)]) == exit_code
        last = self.lines(tmp_path)[-1]
        assert (last["status"], last["verbosity"]) == ("FAILURE", "ERROR")
        if isinstance(fault, MalError):
            assert str(fault) in last["message"]

    def test_a_termination_is_written_down_as_a_failure_with_what_was_saved(
        self, scenes: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = training_module.MalModule.training_step

        def killed(self: Any, batch: Any, batch_idx: int) -> Tensor:
            os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch, batch_idx)

        monkeypatch.setattr(training_module.MalModule, "training_step", killed)
        assert main(["train", "-e", self.written(scenes, tmp_path)]) == 143
        last = self.lines(tmp_path)[-1]
        assert last["status"] == "FAILURE"
        assert ".malckpt" in last["message"]

    def test_a_setting_that_cannot_be_used_is_written_down_too(
        self, scenes: dict[str, tuple[Path, Path]], tmp_path: Path
    ) -> None:
        assert main(["train", "-e", self.written(scenes, tmp_path), "model.arch=vit-none/16"]) == 2
        lines = self.lines(tmp_path)
        assert [line["status"] for line in lines] == ["STARTED", "FAILURE"]
        assert "vit-none/16" in lines[-1]["message"]

    def written(self, scenes: dict[str, tuple[Path, Path]], folder: Path) -> str:
        path = folder / "spec.yaml"
        annotations, images = scenes["train"]
        path.write_text(
            yaml.safe_dump(
                {
                    "results_dir": str(folder),
                    "dataset": {"train_ann_path": str(annotations), "train_img_dir": str(images)},
                }
            )
        )
        from mal_train.config.spec import load_spec
        from mal_train.core.yaml_config import dump

        path.write_text(dump(load_spec(path, SMALL)))
        return str(path)


def test_a_secret_of_the_spec_reaches_no_file_of_a_run_that_fails(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    _, secret = generate_identity()
    spec = spec_of(scenes, tmp_path, "model.arch=vit-none/16").model_copy(update={"encryption_key": secret})
    with pytest.raises(MalError):
        run(spec)
    for path in (tmp_path / "train").iterdir():
        assert secret.encode() not in path.read_bytes()
