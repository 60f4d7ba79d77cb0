import pytest
import torch

from mal_train.core.settings import Branch
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.training.ema import update_ema
from mal_train.training.optimizer import OptimizerSettings, build_optimizer, freeze_stages, set_rate


@pytest.fixture
def network() -> MalNetwork:
    torch.manual_seed(0)
    return MalNetwork(ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=8))


def train_once(network: MalNetwork, settings: OptimizerSettings, rate: float = 1e-3) -> torch.optim.Optimizer:
    optimizer = build_optimizer(network, settings)
    set_rate(optimizer, rate)
    loss = network.logits(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]), Branch.STUDENT).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return optimizer


def changed(before: dict[str, torch.Tensor], network: MalNetwork) -> set[str]:
    return {name for name, value in network.state_dict().items() if not torch.equal(before[name], value)}


def copied(network: MalNetwork) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_heads_have_their_own_learning_rate(network: MalNetwork) -> None:
    optimizer = build_optimizer(network, OptimizerSettings(head_lr_mult=5.0))
    set_rate(optimizer, 2.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.student.named_parameters():
        assert rates[id(parameter)] == (2.0 if name.startswith("backbone.") else 10.0)


def test_norms_and_biases_can_be_excluded_from_weight_decay(network: MalNetwork) -> None:
    optimizer = build_optimizer(network, OptimizerSettings(weight_decay=0.1, decay_norm_bias=False))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter in network.student.parameters():
        assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0)


def test_frozen_stages_do_not_change(network: MalNetwork) -> None:
    assert freeze_stages(network, [0, 2, 99, -1]) == ["patch_embed", "blocks.1"]
    before = copied(network)
    train_once(network, OptimizerSettings())
    names = changed(before, network)
    assert any(name.startswith("student.backbone.blocks.0.") for name in names)
    assert "student.backbone.cls_token" in names
    assert not any(name.startswith(("student.backbone.patch_embed.", "student.backbone.blocks.1.")) for name in names)


def test_no_gradient_reaches_the_teacher(network: MalNetwork) -> None:
    before = copied(network)
    train_once(network, OptimizerSettings())
    assert all(name.startswith("student.") for name in changed(before, network))


def test_the_teacher_moves_toward_the_student_by_the_momentum(network: MalNetwork) -> None:
    train_once(network, OptimizerSettings(), rate=0.1)
    before = [parameter.clone() for parameter in network.teacher.parameters()]
    update_ema(network.teacher, network.student, 0.9)
    for old, new, student in zip(before, network.teacher.parameters(), network.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student.detach())


def test_the_teacher_copies_the_buffers_of_the_student() -> None:
    student, teacher = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    student(torch.randn(8, 3))
    update_ema(teacher, student, 0.996)
    assert student.running_mean is not None
    assert teacher.running_mean is not None
    torch.testing.assert_close(teacher.running_mean, student.running_mean)
    assert teacher.num_batches_tracked == student.num_batches_tracked
