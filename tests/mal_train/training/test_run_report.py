"""Output of a run: contact sheets, TensorBoard events, report.html and status.json."""

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
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint
from mal_train.kernel.checkpoint.keys import generate_identity
from mal_train.training import module as training_module
from mal_train.training.panels import around_median, close_ups
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
def finished(scenes: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the output folder of a run with validation, and with a secret encryption key in its spec."""
    results = tmp_path_factory.mktemp("finished")
    spec = spec_of(scenes, results, "train.board_size=4", validate=True)
    run(spec.model_copy(update={"encryption_key": SECRET}))
    return results / "train"


def test_every_validation_writes_a_contact_sheet_of_its_worst_masks(finished: Path) -> None:
    boards = sorted(path.name for path in (finished / "boards").iterdir())
    assert boards == ["epoch_001.png", "epoch_002.png", "epoch_003.png"]
    with Image.open(finished / "boards" / "epoch_003.png") as board:
        sheet = np.asarray(board)
    # Four close-ups in one row, with the colors of mask and box.
    assert sheet.shape == (248, 830, 3)
    for color in ((64, 224, 255), (255, 214, 0)):
        assert (np.abs(sheet.astype(int) - color).sum(axis=2) < 30).any()


def test_tensorboard_has_the_same_values_as_the_csv_and_the_contact_sheets(finished: Path) -> None:
    events = EventAccumulator(str(finished), size_guidance={"images": 0})
    events.Reload()
    rows = read_metrics(finished)
    for tag, kind, column in (
        ("train/loss", "train", "loss"),
        ("train/lr", "train", "lr"),
        ("val/mIoU", "val", "mIoU"),
    ):
        expected = {row["step"]: row[column] for row in rows if row["kind"] == kind}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(expected, rel=1e-5)
    images = events.Images("val/worst_first")
    assert [image.step for image in images] == [2, 4, 6]
    with (
        Image.open(io.BytesIO(images[-1].encoded_image_string)) as shown,
        Image.open(finished / "boards" / "epoch_003.png") as board,
    ):
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(board))


def test_the_report_has_every_section_and_needs_no_other_file(finished: Path) -> None:
    page = (finished / "report.html").read_text()
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
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 12
    with Image.open(io.BytesIO(base64.b64decode(images[0]))) as image:
        assert max(image.size) == 240


def test_the_report_shows_the_metrics_of_the_last_validation(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    last = [row for row in read_metrics(finished) if row["kind"] == "val"][-1]
    assert f"<td>mIoU</td><td>{last['mIoU']:.3f}</td>" in page


def test_written_settings_do_not_contain_the_secret(finished: Path) -> None:
    for path in (*finished.glob("*.*"), *finished.glob("events*")):
        assert SECRET.encode() not in path.read_bytes(), path
    experiment = yaml.safe_load((finished / "experiment.yaml").read_text())
    assert experiment["train"]["board_size"] == 4
    assert experiment["encryption_key"] == "<redacted>"
    assert "<td>train.batch_size</td><td>4</td><td>3</td>" in (finished / "report.html").read_text()


def test_the_spec_of_a_training_records_the_default_crop_size(tmp_path: Path) -> None:
    spec = spec_of({}, tmp_path, "model.arch=vit-mae-huge/14", "dataset.crop_size=null")
    for task, crop_size in (("train", 504), ("evaluate", None)):
        with task_folder(spec, cast(Task, task)) as (folder, _):
            assert yaml.safe_load((folder / "experiment.yaml").read_text())["dataset"]["crop_size"] == crop_size


def test_the_report_of_a_run_without_validation_has_no_masks(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    run(spec_of(scenes, tmp_path, "train.num_epochs=1"))
    page = (tmp_path / "train" / "report.html").read_text()
    assert "<img" not in page
    assert not (tmp_path / "train" / "boards").exists()


def test_board_size_0_writes_no_contact_sheets(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run(spec_of(scenes, tmp_path, "train.num_epochs=1", "train.board_size=0", validate=True))
    assert not (tmp_path / "train" / "boards").exists()


def test_a_finished_run_keeps_its_report(scenes: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    spec = spec_of(scenes, tmp_path, "train.num_epochs=1", validate=True)
    run(spec)
    before = (tmp_path / "train" / "report.html").read_bytes()
    run(spec)
    assert (tmp_path / "train" / "report.html").read_bytes() == before


def test_a_partial_row_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    with closing(MetricsFile(tmp_path, append=False)) as metrics:
        metrics.add("train", 1, 10, {"loss": 1.0})
    with (tmp_path / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("train,1,2")
    with closing(MetricsFile(tmp_path, append=True)) as metrics:
        metrics.add("train", 1, 20, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(10.0, 1.0), (20.0, 0.5)]


def test_a_partial_status_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    StatusFile(tmp_path).write("RUNNING", "Training loop in progress")
    with (tmp_path / "status.json").open("a", encoding="utf-8") as file:
        file.write('{"date": "11/2')
    note_failure(tmp_path, "a process of the training failed")
    lines = [json.loads(line) for line in (tmp_path / "status.json").read_text(encoding="utf-8").splitlines()]
    assert [line["status"] for line in lines] == ["RUNNING", "FAILURE"]


@pytest.mark.parametrize("line", ["no JSON", "5", '{"state": "RUNNING"}', "[" * 5000, "\xff"])
def test_a_status_line_of_another_program_is_left_as_it_is(tmp_path: Path, line: str) -> None:
    (tmp_path / "status.json").write_text(line + "\n", encoding="latin-1")
    note_failure(tmp_path, "a process of the training failed")
    assert (tmp_path / "status.json").read_text(encoding="latin-1") == line + "\n"


def test_of_two_rows_of_a_step_the_later_is_read(tmp_path: Path) -> None:
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


class TestCloseUps:
    def test_compared_masks_come_lowest_iou_first(self, evaluated: Evaluator) -> None:
        ious = [pair.row.iou for pair in evaluated.compared]
        assert ious == sorted(ious)
        assert len(set(ious)) > 2

    def test_close_ups_are_in_the_order_of_the_masks(
        self, scenes: dict[str, tuple[Path, Path]], evaluated: Evaluator
    ) -> None:
        coco = read_coco(scenes["val"][0])
        panels = close_ups(evaluated.compared, coco, scenes["val"][1])
        assert [
            f"annotation {pair.row.annotation_id} " in f"{panel.detail} "
            for pair, panel in zip(evaluated.compared, panels, strict=True)
        ] == [True] * 6

    def test_a_missing_image_drops_only_its_own_masks(
        self, scenes: dict[str, tuple[Path, Path]], evaluated: Evaluator, tmp_path: Path
    ) -> None:
        coco = read_coco(scenes["val"][0])
        for number in (0, 2):
            (tmp_path / f"{number}.png").write_bytes((scenes["val"][1] / f"{number}.png").read_bytes())
        assert len(close_ups(evaluated.compared, coco, tmp_path)) == 4

    def test_masks_around_the_median_are_selected(self, evaluated: Evaluator) -> None:
        assert list(around_median(evaluated.compared, 2)) == evaluated.compared[2:4]
        assert list(around_median(evaluated.compared, 99)) == evaluated.compared

    def test_failures_are_counted_by_category(self, evaluated: Evaluator) -> None:
        ((name, count, bad, fraction, empty),) = failures_by_category(evaluated.compared, {1: "ellipse"})
        ious = [pair.row.iou for pair in evaluated.compared]
        assert (name, count, bad) == ("ellipse", 6, sum(iou < 0.5 for iou in ious))
        assert fraction == bad / 6
        assert empty == sum(iou == 0.0 for iou in ious)
        assert 0 < empty < bad < 6


@pytest.fixture(scope="module")
def boxes_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the output folder of a run whose validation set has no masks."""
    folder = tmp_path_factory.mktemp("boxes")
    boxes = {name: write_scenes(folder / name, images=3, masks=False, seed=1) for name in ("train", "val")}
    result = run(spec_of(boxes, folder, "train.num_epochs=2", validate=True))
    assert result.report is not None
    assert result.report.overall.count == 0
    return folder / "train"


class TestBoxesAlone:
    """A validation set without masks: the boxes are measured, and nothing is fitted."""

    def test_metrics_and_status_have_the_proxy(self, boxes_alone: Path) -> None:
        rows = [row for row in read_metrics(boxes_alone) if row["kind"] == "val"]
        lines = [json.loads(line) for line in (boxes_alone / "status.json").read_text().splitlines()]
        validations = [line for line in lines if line["message"] == "Eval metrics generated."]
        assert [line["epoch"] for line in validations] == [row["epoch"] for row in rows] == [1, 2]
        for row, line in zip(rows, validations, strict=True):
            for name in ("tightness", "stability", "box_proxy"):
                assert 0 <= line["kpi"][name] <= 1
                assert row[name] == pytest.approx(line["kpi"][name], abs=1e-5)
            assert line["kpi"]["mIoU"] is None
            assert "mIoU" not in row

    def test_thresholds_are_those_of_the_spec(self, boxes_alone: Path) -> None:
        config = load_checkpoint(boxes_alone / "mal_model_latest.malckpt", None).labeler
        assert config.mask_thres == (0.1, 0.1, 0.1)
        assert config.calibration is None

    def test_the_page_shows_the_proxy(self, boxes_alone: Path) -> None:
        page = (boxes_alone / "report.html").read_text()
        assert "box_proxy" in page
        assert "without masks over step" in page
        assert "mIoU over step" not in page

    def test_the_proxy_is_measured_beside_true_masks_too(self, finished: Path) -> None:
        lines = [json.loads(line) for line in (finished / "status.json").read_text().splitlines()]
        assert {"mIoU", "tightness", "stability", "box_proxy"} <= lines[-1]["kpi"].keys()


class TestStatus:
    """status.json has TAO's layout, and a last line for every way in which a run can end."""

    def lines(self, results: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (results / "train" / "status.json").read_text().splitlines()]

    def test_the_stages_of_a_run_are_recorded_in_order(self, finished: Path) -> None:
        lines = self.lines(finished.parent)
        epoch = ["Eval metrics generated.", "Training loop in progress", "Train metrics generated."]
        messages = [line["message"] for line in lines]
        assert messages[:2] == ["Starting MAL train.", "Starting Training Loop."]
        assert messages[-2:] == ["Training loop complete.", "Train finished successfully."]
        assert sorted(messages[2:-2]) == sorted(3 * epoch)
        assert [line["status"] for line in lines] == ["STARTED", *["RUNNING"] * 11, "SUCCESS"]

    def test_lines_have_the_published_fields(self, finished: Path) -> None:
        for line in self.lines(finished.parent):
            assert {"date", "time", "status", "verbosity", "message"} <= line.keys()
            # Dates and times are not padded with zeros.
            assert re.fullmatch(r"[1-9]\d?/[1-9]\d?/\d{4}", line["date"])
            assert re.fullmatch(r"(\d|[1-9]\d):(\d|[1-9]\d):(\d|[1-9]\d)", line["time"])

    def test_epoch_lines_have_progress_and_remaining_time(self, finished: Path) -> None:
        (line,) = [
            line
            for line in self.lines(finished.parent)
            if line["message"] == "Training loop in progress" and line["epoch"] == 2
        ]
        assert (line["step"], line["max_epoch"], line["max_step"]) == (4, 3, 6)
        assert re.fullmatch(r"\d+:\d\d:\d\d", line["time_per_epoch"])
        assert re.fullmatch(r"\d+:\d\d:\d\d", line["eta"])
        assert float(line["time_per_step"]) > 0

    def test_metrics_are_repeated_on_later_lines(self, finished: Path) -> None:
        lines = self.lines(finished.parent)
        expected = {"train_loss", "mIoU", "mIoU_small", "mIoU_medium", "mIoU_large"}
        assert expected <= lines[-1]["kpi"].keys()
        known: set[str] = set()
        for line in lines:
            assert known <= line.get("kpi", {}).keys()
            known |= line.get("kpi", {}).keys()

    @pytest.mark.parametrize(
        ("error", "exit_code"),
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
    def test_every_error_is_recorded_as_a_failure(
        self,
        scenes: dict[str, tuple[Path, Path]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        exit_code: int,
    ) -> None:
        def broken(self: Any, batch: Any, batch_idx: int) -> Tensor:
            raise error

        monkeypatch.setattr(training_module.MalModule, "training_step", broken)
        assert main(["train", "-e", self.spec_file(scenes, tmp_path)]) == exit_code
        last = self.lines(tmp_path)[-1]
        assert (last["status"], last["verbosity"]) == ("FAILURE", "ERROR")
        if isinstance(error, MalError):
            assert str(error) in last["message"]

    def test_a_termination_is_recorded_as_a_failure_with_the_saved_checkpoint(
        self, scenes: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = training_module.MalModule.training_step

        def killed(self: Any, batch: Any, batch_idx: int) -> Tensor:
            os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch, batch_idx)

        monkeypatch.setattr(training_module.MalModule, "training_step", killed)
        assert main(["train", "-e", self.spec_file(scenes, tmp_path)]) == 143
        last = self.lines(tmp_path)[-1]
        assert last["status"] == "FAILURE"
        assert ".malckpt" in last["message"]

    def test_an_invalid_setting_is_recorded_as_a_failure(
        self, scenes: dict[str, tuple[Path, Path]], tmp_path: Path
    ) -> None:
        assert main(["train", "-e", self.spec_file(scenes, tmp_path), "model.arch=vit-none/16"]) == 2
        lines = self.lines(tmp_path)
        assert [line["status"] for line in lines] == ["STARTED", "FAILURE"]
        assert "vit-none/16" in lines[-1]["message"]

    def spec_file(self, scenes: dict[str, tuple[Path, Path]], folder: Path) -> str:
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


def test_the_files_of_a_failed_run_do_not_contain_a_secret_of_the_spec(
    scenes: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    _, secret = generate_identity()
    spec = spec_of(scenes, tmp_path, "model.arch=vit-none/16").model_copy(update={"encryption_key": secret})
    with pytest.raises(MalError):
        run(spec)
    for path in (tmp_path / "train").iterdir():
        assert secret.encode() not in path.read_bytes()
