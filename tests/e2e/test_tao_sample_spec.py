"""TAO's documented sample spec, unchanged except for paths, trains, evaluates and infers."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.demo.synthetic import SceneSettings, write_split
from mal_train.cli import main
from mal_train.config.spec import load_spec
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key, write_identity
from tests.mal_train.training.runs import plain_mean_field

SAMPLE = Path(__file__).with_name("tao_sample_spec.yaml").read_text()
SMALL = ["model.arch=vit-micro/16", "dataset.crop_size=32", "dataset.num_workers_per_gpu=0", "train.crf_num_iter=5"]
SCENES = SceneSettings(min_objects=3, max_objects=3, min_radius=40.0, max_radius=60.0)


def filled_in(folder: Path, scenes: int) -> tuple[str, Path]:
    """Writes the sample spec and its data; returns the path of the spec and the annotation file."""
    split = write_split(folder, "scenes", scenes, 3, masks=True, settings=SCENES)
    write_identity(folder / "key.txt")
    values = {
        "<RESULTS>": folder / "results",
        "<KEY>": f"file:{folder / 'key.txt'}",
        "<ANNOTATIONS>": split.annotations,
        "<IMAGES>": split.images,
        "<CHECKPOINT>": folder / "results" / "train" / "mal_model_latest.malckpt",
    }
    text = SAMPLE
    for name, value in values.items():
        text = text.replace(name, str(value))
    path = folder / "spec.yaml"
    path.write_text(text)
    return str(path), split.annotations


def run_all_tasks(folder: Path, overrides: list[str], scenes: int) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Runs all three tasks; returns the metrics of evaluate, the labeled rows and the number of given boxes."""
    spec, annotations = filled_in(folder, scenes)
    for task in ("train", "evaluate", "inference"):
        assert main([task, "-e", spec, *overrides]) == 0, task
    metrics = json.loads((folder / "results" / "evaluate" / "results.json").read_text())
    labels = json.loads((folder / "results" / "inference" / "instances_val2017_mal.json").read_text())
    for task in ("train", "evaluate", "inference"):
        last = (folder / "results" / task / "status.json").read_text().splitlines()[-1]
        assert json.loads(last)["status"] == "SUCCESS"
    key = parse_key(f"file:{folder / 'key.txt'}", purpose="decryption", source="yaml")
    saved = load_checkpoint(folder / "results" / "train" / "mal_model_latest.malckpt", key)
    assert saved.model.arch == ("vit-micro/16" if overrides else "vit-mae-base/16")
    return metrics, labels["annotations"], len(json.loads(annotations.read_text())["annotations"])


def test_the_documented_spec_is_read_with_its_values(tmp_path: Path) -> None:
    path, _ = filled_in(tmp_path, 1)
    spec = load_spec(Path(path), [])
    assert (spec.strategy, spec.model.arch, spec.dataset.crop_size) == ("ddp", "vit-mae-base/16", 512)
    assert (spec.dataset.min_obj_size, spec.dataset.max_obj_size) == (2048.0, 1e10)
    assert (spec.train.lr, spec.train.use_amp, spec.train.gpu_ids) == (1.5e-6, True, (0,))
    written = yaml.safe_load(SAMPLE)
    # Every field of the sample is a field of the spec.
    fields = spec.model_dump()
    for section in ("model", "dataset", "train", "evaluate", "inference"):
        assert set(written[section]) <= set(fields[section])


def test_a_reduced_form_trains_evaluates_and_infers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_mean_field(monkeypatch)
    metrics, labels, given = run_all_tasks(tmp_path, SMALL, scenes=3)
    assert metrics["count"] == len(labels) == given
    assert all("error" not in row and 0.0 <= row["iou"] <= 1.0 for row in labels)
    assert sum(row["iou"] for row in labels) / given == pytest.approx(metrics["mIoU"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_documented_form_trains_evaluates_and_infers(tmp_path: Path) -> None:
    metrics, labels, given = run_all_tasks(tmp_path, [], scenes=1)
    assert metrics["count"] == len(labels) == given
    assert all("error" not in row for row in labels)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("gpus: 1", "train.num_gpus"),
        ("gpu_ids: [0]", "train.gpu_ids"),
        ("num_nodes: 1", "train.num_nodes"),
        ("checkpoint: a.pth", "train.pretrained_model_path"),
        ("train: {save_every_k_epoch: 1}", "train.checkpoint_interval"),
        ("train: {val_interval: 1}", "train.validation_interval"),
        ("train: {min_lr: 0}", "train.min_lr_rate"),
        ("evaluate: {comp_clustering: true}", "evaluate.comp_clustering"),
        ("evaluate: {trt_engine: a.trt}", "evaluate.checkpoint"),
        ("strategy: ddp_sharded", "read as auto"),
        ("wandb: {enable: true}", "TensorBoard"),
    ],
)
def test_the_error_of_a_former_field_names_its_replacement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, named: str
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(line)
    assert main(["train", "-e", str(path)]) == 2
    assert named in capsys.readouterr().err
