"""Training state of a checkpoint: the position in the data, another layout, and the signal to save it."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.errors import CheckpointError
from mal_train.training.checkpoints import CheckpointCallback, DataPosition, PreemptionHandler, data_position


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


def test_a_signal_waits_for_no_lock_that_the_interrupted_code_holds(tmp_path: Path) -> None:
    preemption = PreemptionHandler(CheckpointCallback(tmp_path, 1, print))
    locks = [
        value for value in vars(preemption).values() if isinstance(value, threading.Event | type(threading.Lock()))
    ]
    assert locks == []
    with preemption.handle_signals():
        signal.raise_signal(signal.SIGTERM)
        assert preemption._is_requested
