"""train.compile: the same weights' names and masks as without, and clear errors where it cannot work."""

import copy
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from mal_train.commands.train import train
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint
from mal_train.kernel.labeler.engine import TorchEngine
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.losses.crf import can_compile
from mal_train.training import compilation
from mal_train.training import module as training_module
from mal_train.training.checkpoints import newest_checkpoint
from mal_train.training.compilation import check_compilation, compile_backbones
from tests.mal_train.training.forked import train_together
from tests.mal_train.training.runs import assert_same, overrides_of, plain_mean_field, spec_of, weights
from tests.scenes import write_scenes

CPU = torch.device("cpu")


@pytest.fixture
def network() -> MalNetwork:
    torch.manual_seed(0)
    return MalNetwork(ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=8))


def test_a_missing_compiler_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "can_compile", lambda device: False)
    with pytest.raises(ConfigError, match=r"train\.compile.*g\+\+"):
        check_compilation("auto", gradient_checkpointing=False, device=CPU)


@pytest.mark.parametrize(("strategy", "checkpointing"), [("fsdp", False), ("auto", True)])
def test_settings_that_exclude_each_other_are_refused(
    strategy: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "can_compile", lambda device: True)
    with pytest.raises(ConfigError, match=r"train\.compile"):
        check_compilation(strategy, gradient_checkpointing=checkpointing, device=CPU)


def test_compilation_keeps_names_and_does_not_reach_copies(network: MalNetwork) -> None:
    names = list(network.state_dict())
    compile_backbones(network)
    assert list(network.state_dict()) == names
    engine = TorchEngine(network.eval(), CPU, torch.float32)
    clones = (copy.copy(network.student.backbone), engine._packed_network(Branch.STUDENT).backbone)
    assert all(clone._compiled_call_impl is None for clone in clones)


def test_a_failed_compilation_is_an_error_of_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise TorchDynamoException("no kernel")

    monkeypatch.setattr(training_module.MalModule, "training_step", fails)
    scenes = {"train": write_scenes(tmp_path / "train", images=2, masks=False)}
    with pytest.raises(ConfigError, match=r"train\.compile.*no kernel"):
        train(spec_of(scenes, tmp_path / "run"), Console.silent())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler")
def test_a_compiled_run_learns_and_resumes_as_a_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_mean_field(monkeypatch)
    scenes = {"train": write_scenes(tmp_path / "train", images=4, masks=False, seed=1)}

    def run(name: str, *overrides: str) -> Path:
        # In a process of its own: compiled gradients start threads, after which no test could fork a training.
        folder = tmp_path / name
        assert train_together(overrides_of(scenes, folder, "model.vit_dpr=0", *overrides), folder, 1) == [0]
        checkpoint = newest_checkpoint(folder / "train")
        assert checkpoint is not None
        return checkpoint

    compiled = "train.compile=true"
    path = run("whole", compiled)
    run("parts", compiled, "train.num_epochs=3", "train.checkpoint_interval=1", "train.loss_mil_step=2")
    plain = weights(run("plain"))
    ours = weights(path)
    assert ours.keys() == plain.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-3, atol=2e-4, msg=name)
    assert load_checkpoint(path, None).training is not None
    # The first checkpoint of the other run, continued by a new process's compilation, gives the same bits.
    first = next(iter(sorted((tmp_path / "parts" / "train").glob("model_epoch_000*"))))
    again = run("resumed", compiled, f"train.resume_training_checkpoint_path='{first}'")
    assert_same(weights(again), ours)
