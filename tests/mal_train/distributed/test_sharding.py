"""FSDP: refused without GPUs; on a GPU, its checkpoints are those of all other runs."""

from pathlib import Path

import pytest
import torch

from mal_train.commands.train import train
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from tests.mal_train.training.runs import assert_same, plain_mean_field, spec_of, weights
from tests.scenes import write_scenes


def test_fsdp_without_gpus_is_refused_before_any_file_is_read(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    with pytest.raises(ConfigError, match="strategy: fsdp"):
        train(spec_of({}, tmp_path, "strategy=fsdp"), Console.silent())


@pytest.mark.gpu
def test_a_resumed_fsdp_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plain_mean_field(monkeypatch)
    scenes = {"train": write_scenes(tmp_path / "train", images=4, masks=False, seed=1)}
    common = ("strategy=fsdp", "model.vit_dpr=0")
    complete = train(spec_of(scenes, tmp_path / "complete", *common), Console.silent()).checkpoint
    first = tmp_path / "complete" / "train" / "model_epoch_000_step_00002.malckpt"
    resume = f"train.resume_training_checkpoint_path='{first}'"
    rest = train(spec_of(scenes, tmp_path / "rest", *common, resume), Console.silent()).checkpoint
    assert_same(weights(complete), weights(rest))
    # Equal to training without sharding, up to rounding.
    alone = weights(train(spec_of(scenes, tmp_path / "alone", "model.vit_dpr=0"), Console.silent()).checkpoint)
    for name, value in weights(complete).items():
        torch.testing.assert_close(value, alone[name], rtol=0, atol=2e-3)
