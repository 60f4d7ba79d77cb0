"""Every field of the spec has an effect: training, evaluation, inference or the search must read it.

The test observes the reads of real runs, so unused code and fields of the same name in other sections do not count.
"""

import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mal_train.cli import main
from mal_train.commands import ray_inference
from mal_train.commands.evaluate import evaluate
from mal_train.commands.inference import inference
from mal_train.commands.spec_table import fields_of
from mal_train.commands.train import train
from mal_train.commands.tune import tune
from mal_train.config.spec import Spec, load_spec
from mal_train.core.coco.stream import copy_coco
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.yaml_config import Strict
from tests.mal_train.commands.stand_in_cluster import StandInCluster
from tests.mal_train.training.runs import SMALL, plain_mean_field
from tests.mal_train.tuning.studies import program
from tests.scenes import write_scenes

SINGLE_VALUE = {"evaluate.num_nodes": 2, "inference.num_nodes": 2}
"""Fields of TAO with one valid value, each with another value, which must be refused."""
SERIALIZERS = {"yaml_config.py": None, "spec.py": {"without_secrets", "load_spec"}}
"""Code that reads every field only to write the spec: files, or functions of a file."""


def sections(model: type[BaseModel] = Spec, prefix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    yield model, prefix
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation, f"{prefix}{name}.")


def is_use(frame: Any) -> bool:
    path, function = Path(frame.f_code.co_filename), frame.f_code.co_name
    ignored = SERIALIZERS.get(path.name, set())
    return "mal_train" in path.parts and ignored is not None and function not in ignored


@pytest.fixture(scope="module")
def read_fields(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Returns the names of the fields that training, evaluation, inference and the search read."""
    folder = tmp_path_factory.mktemp("runs")
    annotations, images = write_scenes(folder / "scenes", images=2)
    spec = load_spec(
        None,
        [
            *SMALL,
            f"results_dir='{folder}'",
            "train.num_epochs=1",
            *(f"dataset.{part}_ann_path='{annotations}'" for part in ("train", "val")),
            *(f"dataset.{part}_img_dir='{images}'" for part in ("train", "val")),
            f"inference.ann_path='{annotations}'",
            f"inference.img_dir='{images}'",
            "inference.load_mask=true",
            "tune.space={train.lr: {low: 0.1, high: 0.9}}",
            "tune.trials=1",
            *(f"{task}.checkpoint='{folder}/train/mal_model_latest.malckpt'" for task in ("evaluate", "inference")),
        ],
    )
    prefixes = dict(sections())
    read: set[str] = set()

    def recorded(self: BaseModel, name: str) -> Any:
        if name in type(self).model_fields and type(self) in prefixes and is_use(sys._getframe(1)):
            read.add(prefixes[type(self)] + name)
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        plain_mean_field(patch)
        patch.setattr(Strict, "__getattribute__", recorded, raising=False)
        for task in (train, evaluate, inference):
            task(spec, Console.silent())
        tune(spec, Console.silent(), program=program())
        _run_on_ray(spec, patch)
    return read


def _run_on_ray(spec: Spec, patch: pytest.MonkeyPatch) -> None:
    """Runs the command on a stand-in for a cluster."""
    folder, checkpoint = Path(spec.results_dir), spec.inference.checkpoint
    copy_coco(Path(spec.inference.ann_path), folder / "boxes.parquet")
    patch.setattr(ray_inference, "RayCluster", StandInCluster)
    fields = {"ann_path": folder / "boxes.parquet", "img_dir": spec.inference.img_dir, "checkpoint": checkpoint}
    fields |= {"engine": "ray", "label_dump_path": "labels.parquet"}
    assert main(["inference", f"results_dir={folder}", *(f"inference.{k}={v}" for k, v in fields.items())]) == 0


@pytest.mark.parametrize("name", [name for name, _ in fields_of(Spec)])
def test_every_field_is_read_by_a_run(name: str, read_fields: set[str]) -> None:
    field = dict(fields_of(Spec))[name]
    if typing.get_origin(field.annotation) is typing.Literal and len(typing.get_args(field.annotation)) == 1:
        return  # the schema refuses every other value
    if name in SINGLE_VALUE:
        with pytest.raises(ConfigError):
            load_spec(None, [f"{name}={SINGLE_VALUE[name]}"])
        return
    assert name in read_fields


def test_writing_the_spec_does_not_count_as_reading(read_fields: set[str]) -> None:
    # All commands write experiment.yaml with every field; nothing else reads these two.
    assert not set(SINGLE_VALUE) & read_fields
