"""`mal-train` reads annotations in parquet, one file or a folder of parts, like those in JSON."""

import json
from pathlib import Path

import pytest

from mal_train.cli import main
from mal_train.commands.train import train
from mal_train.core.coco.annotations import read_coco
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_writer import write_part
from mal_train.core.coco.stream import copy_coco
from mal_train.core.console import Console
from tests.mal_train.test_cli import checkpoint
from tests.mal_train.training.runs import assert_same, plain_mean_field, spec_of, weights
from tests.scenes import write_scenes

__all__ = ["checkpoint"]


def packed(annotations: Path) -> Path:
    """Returns a folder with the file in two parts."""
    whole, folder = annotations.with_name("whole.parquet"), annotations.with_name("parts.parquet")
    copy_coco(annotations, whole, row_group_boxes=2)
    source = ParquetDataset(whole)
    folder.mkdir()
    for part in range(2):
        write_part(folder / f"{part}.parquet", source.rows(source.row_groups[part::2]), source.head)
    return folder


def run(command: str, folder: Path, *overrides: str) -> Path:
    assert main([command, f"results_dir='{folder}'", *overrides]) == 0
    return folder / command


def test_inference_reads_and_writes_parquet(tmp_path: Path, checkpoint: Path) -> None:
    annotations, images = write_scenes(tmp_path / "scenes", images=5, masks=False)
    shared = [f"inference.img_dir='{images}'", f"inference.checkpoint='{checkpoint}'", "inference.precision=float32"]
    json_folder = run("inference", tmp_path / "json", *shared, f"inference.ann_path='{annotations}'")
    given = [*shared, f"inference.ann_path='{packed(annotations)}'"]
    json_of_parquet = run("inference", tmp_path / "mixed", *given)
    parquet_folder = run("inference", tmp_path / "parquet", *given, "inference.label_dump_path=out.parquet")
    expected = (json_folder / "instances_val2017_mal.json").read_bytes()
    assert (json_of_parquet / "instances_val2017_mal.json").read_bytes() == expected
    assert json.dumps(read_coco(parquet_folder / "out.parquet").raw) == json.dumps(json.loads(expected))


def test_evaluation_reads_parquet(tmp_path: Path, checkpoint: Path) -> None:
    annotations, images = write_scenes(tmp_path / "scenes", images=3)
    shared = [f"dataset.val_img_dir='{images}'", f"evaluate.checkpoint='{checkpoint}'", "evaluate.precision=float32"]
    results = []
    for name, path in (("json", annotations), ("parquet", packed(annotations))):
        folder = run("evaluate", tmp_path / name, *shared, f"dataset.val_ann_path='{path}'")
        results.append({**json.loads((folder / "results.json").read_text()), "annotations": ""})
    assert results[0] == results[1]


def test_training_on_parquet_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_mean_field(monkeypatch)
    annotations, images = write_scenes(tmp_path / "scenes", images=4, masks=False, seed=1)
    trained = []
    for name, path in (("json", annotations), ("parquet", packed(annotations))):
        train(spec_of({"train": (path, images)}, tmp_path / name, "train.num_epochs=1"), Console())
        trained.append(weights(tmp_path / name / "train" / "mal_model_latest.malckpt"))
    assert_same(*trained)


def test_a_missing_folder_of_parts_is_one_error(tmp_path: Path, checkpoint: Path) -> None:
    overrides = [f"inference.ann_path='{tmp_path}/none.parquet'", f"inference.checkpoint='{checkpoint}'"]
    assert main(["inference", f"results_dir='{tmp_path}'", *overrides]) == 2
