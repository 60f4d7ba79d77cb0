"""Checkpoints that hold only the student, among them the built-in model."""

import asyncio
from pathlib import Path

import pytest
import torch
from mal.v1 import types_pb2

from mal_server.api.serialization.labeling_messages import CallDefaults, Violations, read_options
from mal_server.api.serialization.model_messages import write_model_info
from mal_server.config.server import load_config
from mal_server.errors import InvalidRequest
from mal_server.models.loader import LoadedModel, load_model
from mal_server.models.warmup import warm_up_and_verify
from mal_server.scheduling.priority import Priority
from mal_train.cli import main
from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch, LabelerConfig, branches_of
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.networks.network import MalNetwork, ModelConfig


@pytest.fixture
def one_network(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = ModelConfig("vit-micro/16", mask_head_hidden_channel=4, mask_head_out_channel=4)
    both, alone = tmp_path / "both.malckpt", tmp_path / "alone.malckpt"
    save_checkpoint(both, Checkpoint(model, LabelerConfig(crop_size=64), MalNetwork(model).state_dict()), None)
    assert main(["export", "-o", str(alone), f"evaluate.checkpoint={both}"]) == 0
    return alone


def load(*overrides: str) -> LoadedModel:
    return load_model(load_config(None, ["gpu_ids=[]", "precision=float32", *overrides]).plans[0])


def violations_of(options: types_pb2.LabelOptions, *, has_teacher: bool) -> str:
    violations = Violations()
    read_options(
        options,
        CallDefaults(Branch.STUDENT, Priority.BATCH, 0.0, branches_of(has_teacher=has_teacher)),
        violations,
        "options",
    )
    try:
        violations.raise_if_any()
    except InvalidRequest as error:
        return str(error.violations)
    return ""


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (types_pb2.LabelOptions(branch=types_pb2.BRANCH_TEACHER), "options.branch"),
        (types_pb2.LabelOptions(branch=types_pb2.BRANCH_MIXED), "options.branch"),
        (types_pb2.LabelOptions(compute_agreement=True), "options.compute_agreement"),
    ],
)
def test_options_that_need_both_networks_are_refused_for_one(options: types_pb2.LabelOptions, field: str) -> None:
    assert field in violations_of(options, has_teacher=False)
    assert not violations_of(options, has_teacher=True)
    assert not violations_of(types_pb2.LabelOptions(branch=types_pb2.BRANCH_STUDENT, flip_test=True), has_teacher=False)


def test_a_student_alone_is_loaded_and_verified(one_network: Path) -> None:
    loaded = load(f"checkpoint={one_network}")
    assert not loaded.info.has_teacher
    assert list(write_model_info(loaded.info).branches) == [types_pb2.BRANCH_STUDENT]
    asyncio.run(warm_up_and_verify(loaded))


def test_a_student_alone_cannot_be_served_as_a_teacher(one_network: Path) -> None:
    with pytest.raises(ConfigError, match=r"^branch: teacher; .*alone\.malckpt"):
        load(f"checkpoint={one_network}", "branch=teacher")


def test_the_default_settings_serve_the_built_in_model() -> None:
    loaded = load()
    assert loaded.info.name == "builtin"
    assert loaded.info.sha256 == load("checkpoint=builtin", "model_name=mine").info.sha256
    asyncio.run(warm_up_and_verify(loaded))
