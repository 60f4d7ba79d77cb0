"""The training step and its parts under `compat: tao`, compared with stored results of the published code."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mal_train.core.settings import Branch, Compat
from mal_train.core.size_class import network_size_class
from mal_train.kernel.convert.tao_import import from_tao
from mal_train.kernel.networks.network import MalNetwork, normalize
from mal_train.losses.crf import MeanField
from mal_train.training.ema import update_ema
from mal_train.training.optimizer import OptimizerSettings, build_optimizer, set_rate
from mal_train.training.schedule import CosineSchedule, ramp
from mal_train.training.step import LossWeights, step_losses
from tests.mal_train.kernel.published import NVLABS, TAO, state_dict
from tests.reference import fixture

STEPS_PER_EPOCH = 1000
CLOSE = (5e-5, 1e-6)
"""Tolerance of a gradient, relative to its largest entry, and of a parameter after the step."""
ON_A_KINK = (2.5e-2, 5e-6)
"""The same for one stored step, in which two units of the mask head's channel 81 are 2e-5 from the kink of their ReLU.

AdamW's first step follows the signs of gradients, some of which are rounding errors, so these units end up on the other
side of the kink. With the bias of the channel moved by -1.7e-5, all values agree to 7e-5.
"""


def test_the_cosine_schedule_gives_the_published_rates() -> None:
    for row in json.loads(fixture("h_cosine_lr.json").read_text()):
        schedule = CosineSchedule(row["lr"], row["min_lr"], row["warmup_epochs"], row["num_epochs"], row["num_wave"])
        assert schedule.at_epoch(row["epoch"]) == pytest.approx(row["lr_out"], rel=1e-12, abs=1e-18)


def test_the_teacher_is_updated_as_published() -> None:
    arrays = np.load(fixture("c_ema.npz"))
    for momentum in ("0.996", "0.9", "0.0"):
        for count in (1, 3):
            student, teacher = (_linear(arrays, name) for name in ("student", "teacher"))
            for _ in range(count):
                update_ema(teacher, student, float(momentum))
            for name, parameter in teacher.named_parameters():
                wanted = torch.from_numpy(arrays[f"m{momentum}_n{count}_{name}"])
                torch.testing.assert_close(parameter.data, wanted, rtol=0, atol=1e-6)


def test_the_optimizer_has_the_published_group_and_settings() -> None:
    published = json.loads(fixture("i_param_groups_vit_tiny.json").read_text())
    foreign = from_tao(state_dict(TAO), "det")
    network = MalNetwork(foreign.model)
    optimizer = build_optimizer(network, OptimizerSettings())
    assert len(optimizer.param_groups) == published["n_groups"] == 1
    group = optimizer.param_groups[0]
    for name in ("betas", "eps", "weight_decay"):
        assert list(np.atleast_1d(group[name])) == list(np.atleast_1d(published["group0"][name]))
    # The published group also holds the teacher and the classifier, which get no gradient.
    names = [n for n in published["group0_param_names_in_order"] if n.startswith("student.") and ".head." not in n]
    learning = [parameter for parameter in network.student.parameters() if parameter.requires_grad]
    assert len(group["params"]) == len(learning) == len(names)


@pytest.mark.parametrize(
    ("name", "layout", "first_step"),
    [("tao_s41", TAO, 500), ("tao_s42", TAO, STEPS_PER_EPOCH), ("tao_s44", TAO, 0), ("nv_s45", NVLABS, 500)],
)
def test_training_steps_change_the_weights_as_published(name: str, layout: str, first_step: int) -> None:
    arrays = np.load(fixture(f"j_trainstep_{name}.npz"))
    foreign = from_tao(state_dict(layout), "det")
    network = MalNetwork(foreign.model)
    network.load_state_dict(foreign.weights)
    # In float64, so that only the published values hold rounding errors. AdamW's first step follows the signs of tiny
    # gradients: noise of 1e-7 of the largest gradient changes the next loss by up to 2.5e-4, as do kernels of other
    # CPUs.
    network.eval().double()
    optimizer = build_optimizer(network, OptimizerSettings())
    schedule = CosineSchedule(2e-4, 4e-5, 1, 10)
    boxes = arrays["bboxes"]
    branch = torch.from_numpy(network_size_class((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), Compat.TAO))
    view = normalize(torch.from_numpy(arrays["image_u8"])).double()
    box_mask = torch.from_numpy(arrays["mask"])[:, 0].double()

    for k in range(2 if "step1_loss" in arrays else 1):
        step = first_step + k
        losses = step_losses(
            network.logits(view, branch, Branch.STUDENT),
            network.logits(view, branch, Branch.TEACHER),
            view,
            box_mask,
            refine=MeanField(compiled=False),
            weights=LossWeights(
                4.0 * ramp(step, 1000, STEPS_PER_EPOCH, Compat.TAO),
                0.5 * ramp(step, 4000, STEPS_PER_EPOCH, Compat.TAO),
            ),
            compat=Compat.TAO,
        )
        for part, value in zip(("loss", "loss_mil", "loss_crf"), losses[:3], strict=True):
            assert float(value.detach()) == pytest.approx(float(arrays[f"step{k}_{part}"]), abs=1e-5)
        # The stored runs start inside a training: their first step has the peak rate, whatever its index.
        rate = schedule.peak if k == 0 else schedule.at_step(step, STEPS_PER_EPOCH, Compat.TAO)
        assert rate == pytest.approx(float(arrays[f"step{k}_lr"]), rel=1e-12)
        after = schedule.at_step(step + 1, STEPS_PER_EPOCH, Compat.TAO)
        assert after == pytest.approx(float(arrays[f"step{k}_lr_after"]), rel=1e-12)
        optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        set_rate(optimizer, rate)
        optimizer.step()
        update_ema(network.teacher, network.student, 0.996)
        _check_parameters(network, arrays, k, ON_A_KINK if (name, k) == ("nv_s45", 1) else CLOSE)


def test_the_first_step_has_the_peak_rate_and_the_second_rate_0() -> None:
    schedule = CosineSchedule(2e-4, 4e-5, 1, 10)
    assert schedule.at_step(0, STEPS_PER_EPOCH, Compat.TAO) == 2e-4
    assert schedule.at_step(1, STEPS_PER_EPOCH, Compat.TAO) == 0.0


def _check_parameters(network: MalNetwork, arrays: Any, k: int, tolerance: tuple[float, float]) -> None:
    checked = 0
    parameters = dict(network.named_parameters())
    for key in arrays.files:
        if not key.startswith(f"step{k}_p_"):
            continue
        name = key.removeprefix(f"step{k}_p_")
        ours = parameters[name.replace(".conv.", ".")]
        gradient_key = f"step{k}_g_{name}"
        # AdamW's first step is about lr · sign(gradient): the sign of a tiny gradient is a rounding error.
        clear = np.ones(ours.shape, dtype=bool)
        if gradient_key in arrays.files:
            gradient = arrays[gradient_key]
            assert ours.grad is not None
            assert np.abs(ours.grad.numpy() - gradient).max() <= max(tolerance[0] * np.abs(gradient).max(), 1e-12)
            clear = np.abs(gradient) > 1e-5
            if not np.any(gradient):
                clear = np.ones(ours.shape, dtype=bool)
        assert np.abs(ours.detach().numpy() - arrays[key])[clear].max(initial=0.0) <= tolerance[1]
        checked += 1
    assert checked > 5


def _linear(arrays: Any, name: str) -> nn.Linear:
    layer = nn.Linear(5, 7)
    layer.load_state_dict({part: torch.from_numpy(arrays[f"{name}_{part}"]) for part in ("weight", "bias")})
    return layer
