"""Checkpoints that hold the student alone: what may be asked of them, and the model in the package."""

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


def refused(options: types_pb2.LabelOptions, *, has_teacher: bool) -> str:
    checks = Violations()
    read_options(
        options,
        CallDefaults(Branch.STUDENT, Priority.BATCH, 0.0, branches_of(has_teacher=has_teacher)),
        checks,
        "options",
    )
    try:
        checks.raise_if_any()
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
def test_what_takes_two_networks_is_refused_of_one(options: types_pb2.LabelOptions, field: str) -> None:
    assert field in refused(options, has_teacher=False)
    assert not refused(options, has_teacher=True)
    assert not refused(types_pb2.LabelOptions(branch=types_pb2.BRANCH_STUDENT, flip_test=True), has_teacher=False)


def test_one_network_is_loaded_and_proven(one_network: Path) -> None:
    loaded = load(f"checkpoint={one_network}")
    assert not loaded.info.has_teacher
    assert list(write_model_info(loaded.info).branches) == [types_pb2.BRANCH_STUDENT]
    asyncio.run(warm_up_and_verify(loaded))


def test_it_cannot_be_served_as_a_teacher(one_network: Path) -> None:
    with pytest.raises(ConfigError, match="holds the student alone"):
        load(f"checkpoint={one_network}", "branch=teacher")


def test_without_a_word_the_model_in_the_package_is_served() -> None:
    loaded = load()
    assert loaded.info.name == "builtin"
    assert loaded.info.sha256 == load("checkpoint=builtin", "model_name=mine").info.sha256
    asyncio.run(warm_up_and_verify(loaded))
