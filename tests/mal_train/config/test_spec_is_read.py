"""No field of the spec is an empty promise: real runs of all three tasks must read each of them.

Reading is watched while it happens: neither a field of the same name elsewhere nor code that nobody calls counts.
"""

import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mal_train.commands.evaluate import evaluate
from mal_train.commands.inference import inference
from mal_train.commands.spec_table import fields_of
from mal_train.commands.train import train
from mal_train.config.spec import Spec, load_spec
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.yaml_config import Strict
from tests.mal_train.training.runs import SMALL, plain_mean_field
from tests.scenes import write_scenes

NO_CHOICE = {"evaluate.num_nodes": 2, "inference.num_nodes": 2}
"""Fields of TAO that may hold one value here, each with another value, which must be refused."""
SHOWS_ALL = {"yaml_config.py": None, "spec.py": {"without_secrets", "load_spec"}}
"""What reads every field only to write the spec down: whole files, or functions of one."""


def sections(model: type[BaseModel] = Spec, before: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    yield model, before
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation, f"{before}{name}.")


def is_use(frame: Any) -> bool:
    path, function = Path(frame.f_code.co_filename), frame.f_code.co_name
    shown = SHOWS_ALL.get(path.name, set())
    return "mal_train" in path.parts and shown is not None and function not in shown


@pytest.fixture(scope="module")
def read_fields(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the fields that training, evaluation and inference read."""
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
            *(f"{task}.checkpoint='{folder}/train/mal_model_latest.malckpt'" for task in ("evaluate", "inference")),
        ],
    )
    prefix = dict(sections())
    seen: set[str] = set()

    def watched(self: BaseModel, name: str) -> Any:
        if name in type(self).model_fields and type(self) in prefix and is_use(sys._getframe(1)):
            seen.add(prefix[type(self)] + name)
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        plain_mean_field(patch)
        patch.setattr(Strict, "__getattribute__", watched, raising=False)
        for task in (train, evaluate, inference):
            task(spec, Console.silent())
    return seen


@pytest.mark.parametrize("name", [name for name, _ in fields_of(Spec)])
def test_every_field_is_read_by_a_run(name: str, read_fields: set[str]) -> None:
    field = dict(fields_of(Spec))[name]
    if typing.get_origin(field.annotation) is typing.Literal and len(typing.get_args(field.annotation)) == 1:
        return  # one value only, and the schema refuses every other
    if name in NO_CHOICE:
        with pytest.raises(ConfigError):
            load_spec(None, [f"{name}={NO_CHOICE[name]}"])
        return
    assert name in read_fields


def test_reading_is_told_from_writing_down(read_fields: set[str]) -> None:
    # All three tasks wrote experiment.yaml, which holds every field; these two are looked at by nobody else.
    assert not set(NO_CHOICE) & read_fields
