"""Training state of a checkpoint: the position in the data, another layout, and the signal to save it."""

import copy
import signal
import threading
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from mal_train.core.errors import CheckpointError
from mal_train.training.checkpoints import CheckpointCallback, DataPosition, PreemptionHandler, data_position
from mal_train.training.training_state import StateLayout


def state(**changes: Any) -> dict[str, Any]:
    """Returns a training state of Lightning in the middle of the third epoch."""
    fit = {
        "epoch_progress": {"current": {"processed": 2}},
        "epoch_loop.batch_progress": {"current": {"processed": 5}, "is_last_batch": False},
    }
    return {"epoch": 2, "global_step": 25, "loops": {"fit_loop": {**fit, **changes}}}


def test_the_position_is_that_of_the_next_batch() -> None:
    assert data_position(state()) == DataPosition(2, 5)
    assert data_position({}) == DataPosition(0, 0)


@pytest.mark.parametrize(
    "training",
    [
        {"loops": []},
        {"loops": {"fit_loop": [1]}},
        {"loops": {"fit_loop": {"other": 1}}},
        state(epoch_progress=None),
        state(epoch_progress={"current": {"processed": "2"}}),
        state(epoch_progress={"current": {"processed": -1}}),
        state(epoch_progress={"current": {"processed": float("inf")}}),
        {**state(), "optimizer_states": {"0": 1}},
        {**state(), "lr_schedulers": "none"},
        {**state(), "callbacks": [1]},
        {**state(), "global_step": "25"},
    ],
)
def test_a_training_state_of_another_layout_is_refused(training: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="training state"):
        data_position(training)


SHAPES = [(3, 2), (3,)]


@pytest.fixture(scope="module")
def layout() -> StateLayout:
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(shape) for shape in SHAPES], "lr_scale": 1.0}])
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=3)
    return StateLayout.of(trainer, optimizer)


@pytest.fixture
def complete(layout: StateLayout) -> dict[str, Any]:
    """A training state that Lightning and torch accept."""
    moments = [
        {"step": torch.tensor(4.0), **{name: torch.zeros(shape) for name in ("exp_avg", "exp_avg_sq")}}
        for shape in SHAPES
    ]
    group = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0, "lr_scale": 1.0, "params": [0, 1]}
    return {
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 1,
        "global_step": 4,
        "loops": {"fit_loop": copy.deepcopy(dict(layout.loops))},
        "callbacks": {},
        "optimizer_states": [{"state": dict(enumerate(moments)), "param_groups": [group]}],
        "lr_schedulers": [],
    }


def test_a_state_of_this_layout_is_accepted(layout: StateLayout, complete: dict[str, Any]) -> None:
    layout.check(complete)
    del complete["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]  # an older Lightning had none
    complete["optimizer_states"][0]["state"].pop(1)  # a parameter that had no gradient yet
    layout.check({**complete, "MixedPrecision": {"scale": 65536.0, "_growth_tracker": 3}})


DELETE = object()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["pytorch-lightning_version"], DELETE),
        (["pytorch-lightning_version"], "two"),
        (["pytorch-lightning_version"], "0.9.0"),
        (["loops"], DELETE),
        (["loops", "fit_loop", "state_dict"], 1),
        (["loops", "fit_loop", "epoch_loop.state_dict"], {}),
        (["loops", "fit_loop", "epoch_loop.scheduler_progress", "total"], None),
        (["loops", "fit_loop", "epoch_loop.batch_progress", "is_last_batch"], 0),
        (["loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step"], {"total": {}}),
        (["loops", "fit_loop", "epoch_progress", "total", "ready"], 2**60),
        (["loops", "fit_loop", "epoch_progress", "current", "completed"], 4),
        (["optimizer_states"], DELETE),
        (["optimizer_states"], []),
        (["optimizer_states", 0], [1]),
        (["optimizer_states", 0, "state"], []),
        (["optimizer_states", 0, "state", 7], {}),
        (["optimizer_states", 0, "state", 0], None),
        (["optimizer_states", 0, "state", 0, "step"], "4"),
        pytest.param(["optimizer_states", 0, "state", 0, "step"], 10**400, id="large step"),
        (["optimizer_states", 0, "state", 0, "step"], torch.zeros(2)),
        (["optimizer_states", 0, "state", 0, "exp_avg"], torch.zeros(2, 3)),
        (["optimizer_states", 0, "state", 0, "exp_avg"], torch.zeros(3, 2, dtype=torch.int64)),
        (["optimizer_states", 0, "state", 0, "exp_avg_sq"], DELETE),
        (["optimizer_states", 0, "param_groups"], []),
        (["optimizer_states", 0, "param_groups", 0], 5),
        (["optimizer_states", 0, "param_groups", 0, "params"], [0]),
        (["optimizer_states", 0, "param_groups", 0, "params"], ["a", "b"]),
        (["optimizer_states", 0, "param_groups", 0, "betas"], "ab"),
        (["optimizer_states", 0, "param_groups", 0, "betas"], 0.9),
        (["optimizer_states", 0, "param_groups", 0, "eps"], float("nan")),
        pytest.param(["optimizer_states", 0, "param_groups", 0, "eps"], 10**400, id="large eps"),
        (["optimizer_states", 0, "param_groups", 0, "lr_scale"], DELETE),
        (["lr_schedulers"], DELETE),
        (["MixedPrecision"], {"scale": "large"}),
        pytest.param(["MixedPrecision"], {"scale": 10**400}, id="large scale"),
    ],
)
def test_every_part_of_another_layout_is_an_error_of_the_checkpoint(
    layout: StateLayout, complete: dict[str, Any], path: list[Any], value: Any
) -> None:
    part: Any = complete
    for name in path[:-1]:
        part = part[name]
    if value is DELETE:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    with pytest.raises(CheckpointError, match="training state"):
        layout.check(complete)


def test_a_signal_waits_for_no_lock_that_the_interrupted_code_holds(tmp_path: Path) -> None:
    preemption = PreemptionHandler(CheckpointCallback(tmp_path, 1, print))
    locks = [
        value for value in vars(preemption).values() if isinstance(value, threading.Event | type(threading.Lock()))
    ]
    assert locks == []
    with preemption.handle_signals():
        signal.raise_signal(signal.SIGTERM)
        assert preemption._is_requested
