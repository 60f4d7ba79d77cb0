"""Claims about the files that models are loaded from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mal_server import cli
from mal_server.config.server import ServerConfig
from mal_server.models.loader import load_model
from mal_train.core.errors import CheckpointError
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.networks.network import MalNetwork, ModelConfig

MICRO = ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=8)


def saved(path: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None) -> Path:
    """Saves a small network with changed weights."""
    torch.manual_seed(0)
    weights = MalNetwork(MICRO).weights()
    change(weights)
    save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(crop_size=64), weights), None)
    return path


def load(path: Path) -> None:
    (plan,) = ServerConfig(checkpoint=path, gpu_ids=()).plans
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
