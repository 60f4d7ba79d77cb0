"""Claims about the files that models are loaded from."""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mal_server import cli
from mal_server.api.serialization.model_messages import write_model_info
from mal_server.config.limits import MAX_CATEGORIES, MAX_CATEGORY_CHARS
from mal_server.config.model_config import ModelFolder, ModelSetting
from mal_server.config.server import ServerConfig
from mal_server.models.loader import load_model
from mal_train.core.errors import CheckpointError, ConfigError, Untrusted
from mal_train.core.settings import LabelerConfig, NetworkEngine, Precision
from mal_train.kernel.checkpoint.builtin import BUILTIN
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.trust import read_signing_key, sign_file, write_signing_key
from mal_train.kernel.networks.backbones import backbone_size
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from tests.score_models import with_resolved_score

MICRO = ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=8)


def saved(path: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None) -> Path:
    """Saves a small network with changed weights."""
    torch.manual_seed(0)
    weights = MalNetwork(MICRO).weights()
    change(weights)
    save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(crop_size=64), weights), None)
    return path


def load(path: Path, **settings: Any) -> None:
    (plan,) = ServerConfig(checkpoint=path, gpu_ids=(), **settings).plans
    load_model(plan)


CHANGES = {
    "none of the weights": lambda weights: weights.clear() or weights.update({"student.x": torch.zeros(1)}),
    "one shape": lambda weights: weights.update({next(iter(weights)): torch.zeros(3)}),
    "half of the teacher": lambda weights: [weights.pop(name) for name in list(weights) if "teacher.b" in name],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_do_not_fit_their_settings_are_an_error_of_the_checkpoint(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "a.malckpt", change)
    with pytest.raises(CheckpointError, match=path.name) as raised:
        load(path)
    assert len(str(raised.value)) < 1000
    assert cli.main(["check", f"checkpoint={path}", "gpu_ids=[]"]) == CheckpointError.exit_code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "categories", [[{"id": n} for n in range(MAX_CATEGORIES + 1)], [{"id": 1, "name": "n" * (MAX_CATEGORY_CHARS + 1)}]]
)
def test_a_model_whose_categories_take_long_to_list_is_refused(
    tmp_path: Path, categories: list[dict[str, Any]]
) -> None:
    path = tmp_path / "a.malckpt"
    weights = MalNetwork(MICRO).weights()
    save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(crop_size=64), weights, categories), None)
    with pytest.raises(CheckpointError, match="categories"):
        load(path)


def test_a_category_whose_name_no_message_can_hold_is_listed_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.malckpt"
    categories = [{"id": 1, "name": "half \ud800"}]
    save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(crop_size=64), MalNetwork(MICRO).weights(), categories), None)
    (plan,) = ServerConfig(checkpoint=path, gpu_ids=()).plans
    assert [one.name for one in write_model_info(load_model(plan).info).categories] == ["half ?"]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_pinned_model_loads_and_another_file_in_its_place_does_not(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.malckpt")
    pinned = sha256_of(path)
    load(path, checkpoint_sha256=pinned)
    saved(path, lambda weights: next(iter(weights.values())).zero_())
    with pytest.raises(Untrusted):
        load(path, checkpoint_sha256=pinned)


def test_with_trusted_signers_only_a_signed_model_loads(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.malckpt")
    signer = write_signing_key(tmp_path / "signing.pem")
    with pytest.raises(Untrusted, match="not signed"):
        load(path, trusted_signers=(signer,))
    sign_file(path, read_signing_key(f"file:{tmp_path / 'signing.pem'}", "key"))
    load(path, trusted_signers=(signer,))
    assert cli.main(["check", f"checkpoint={path}", "gpu_ids=[]", f"trusted_signers=['{signer}']"]) == 0


def test_the_model_in_the_package_is_pinned_instead_of_signed(tmp_path: Path) -> None:
    signer = write_signing_key(tmp_path / "signing.pem")
    (plan,) = ServerConfig(trusted_signers=(signer,)).plans
    assert plan.checkpoint == Path(BUILTIN)
    assert (len(plan.trust.sha256), plan.trust.signers) == (1, ())


def test_models_and_folders_have_pins_of_their_own(tmp_path: Path) -> None:
    one, two, three = ("1" * 64, "2" * 64, "3" * 64)
    signer = write_signing_key(tmp_path / "signing.pem")
    config = ServerConfig(
        models=(ModelSetting(name="cats", checkpoint=tmp_path / "a", checkpoint_sha256=one),),
        model_folders=(
            ModelFolder(name="pinned", path=tmp_path, checkpoint_sha256=(two, three)),
            ModelFolder(name="open", path=tmp_path),
        ),
        trusted_signers=(signer,),
    )
    assert config.plans[0].trust.sha256 == (one,)
    for folder, pins in zip(config.model_folders, [(two, three), ()], strict=True):
        trust = config.plan_from(folder, tmp_path / "b", "cats", None).trust
        assert (trust.sha256, trust.signers) == (pins, (signer,))


@pytest.mark.parametrize(
    "setting", ["checkpoint_sha256=abc", "trusted_signers=[age1x]", "models=[{name: a, checkpoint: b}]"]
)
def test_an_impossible_pin_is_an_error_of_the_settings(setting: str) -> None:
    assert cli.main(["check", "checkpoint_sha256=" + "0" * 64, setting]) == ConfigError.exit_code


# Not importorskip: it would import OpenVINO with its telemetry.
NEEDS_OPENVINO = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


@NEEDS_OPENVINO
@pytest.mark.parametrize(
    ("settings", "field"),
    [
        # the checkpoint is not calibrated
        ({"precision": Precision.INT8, "network_engine": NetworkEngine.OPENVINO}, "int8"),
        ({"precision": Precision.INT8}, "network_engine"),
        ({"precision": Precision.BFLOAT16, "network_engine": NetworkEngine.OPENVINO}, "precision"),
    ],
)
def test_an_engine_that_cannot_run_the_model_is_refused(tmp_path: Path, settings: dict[str, str], field: str) -> None:
    path = saved(tmp_path / "a.malckpt")
    with pytest.raises(ConfigError, match=field):
        load(path, **settings)
    overrides = [f"{name}={value}" for name, value in settings.items()]
    assert cli.main(["check", f"checkpoint={path}", "gpu_ids=[]", *overrides]) == ConfigError.exit_code


@NEEDS_OPENVINO
def test_an_engine_is_named_in_the_description_of_its_model(tmp_path: Path) -> None:
    (plan,) = ServerConfig(
        checkpoint=saved(tmp_path / "a.malckpt"), gpu_ids=(), network_engine=NetworkEngine.OPENVINO
    ).plans
    loaded = load_model(plan)
    described = write_model_info(loaded.info)
    assert (described.network_engine, described.precision) == ("openvino", "float32")
    assert loaded.reference is not None


@pytest.mark.parametrize("is_fitted", [True, False])
def test_the_description_says_for_which_labels_the_scores_are_calibrated(tmp_path: Path, is_fitted: bool) -> None:
    width = backbone_size(MICRO.arch).width
    labeler = replace(with_resolved_score(pooled=width), crop_size=64)
    path = tmp_path / "a.malckpt"
    settings = labeler if is_fitted else replace(labeler, resolved_score=None)
    save_checkpoint(path, Checkpoint(MICRO, settings, MalNetwork(MICRO).weights()), None)
    (plan,) = ServerConfig(checkpoint=path, gpu_ids=()).plans
    described = write_model_info(load_model(plan).info)
    assert (described.score_calibrated, described.score_calibrated_resolved) == (True, is_fitted)
