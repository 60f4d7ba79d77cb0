"""Checks the training state of a checkpoint before Lightning and torch restore it.

They fail on another layout with any error, some of them in the first step. A state has the layout that the trainer of
this run would write itself: its loops, and one AdamW over the parameters of this network.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import lightning
import torch
from torch import Tensor

from mal_train.core.errors import CheckpointError
from mal_train.core.numbers import finite_number

_MAX_COUNT = 2**53
_OLDEST_MAJOR = 2
_VERSION = re.compile(r"(\d{1,4})(?:\.\d{1,8}){1,3}(?:\.?(?:a|b|rc|dev|post)\d{1,8})*(?:\+[a-z0-9.]{1,40})?")
_GROUP_SETTINGS = ("lr", "eps", "weight_decay", "lr_scale")
"""Settings of a group of parameters, beside betas, without which no step can be made."""


@dataclass(frozen=True)
class StateLayout:
    """Layout of the training states that this run can resume from.

    Attributes:
        loops: state of Lightning's loops before the first step.
        groups: number of parameters in each group of the optimizer.
        shapes: shape of each parameter, in the order of the groups.
        max_epochs: epochs of this run.
    """

    loops: Mapping[str, Any]
    groups: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    max_epochs: int

    @classmethod
    def of(cls, trainer: lightning.Trainer, optimizer: torch.optim.Optimizer) -> Self:
        """Returns the layout of a trainer that is not running yet, with an optimizer like the one that it will use."""
        groups = [group["params"] for group in optimizer.param_groups]
        shapes = tuple(parameter.shape for group in groups for parameter in group)
        return cls(trainer.fit_loop.state_dict(), tuple(map(len, groups)), shapes, trainer.max_epochs or 0)

    def check(self, training: Mapping[str, Any]) -> None:
        """Checks a training state. Raises CheckpointError, which names what differs."""
        try:
            _check_version(training.get("pytorch-lightning_version"))
            self._check_loops(_member(training, "loops", dict))
            self._check_optimizer(_member(training, "optimizer_states", list))
            _member(training, "lr_schedulers", list)
            _check_numbers(training.get("MixedPrecision", {}), "MixedPrecision")
        except _Differs as error:
            raise CheckpointError(
                f"training state: {error}; resume from another checkpoint, or start a new training from its weights "
                "(train.pretrained_model_path)"
            ) from None

    def _check_loops(self, loops: dict[str, Any]) -> None:
        fit_loop = _member(loops, "fit_loop", dict)
        for name, expected in self.loops.items():
            if name in fit_loop:  # Lightning skips what an older version did not write
                _check_like(fit_loop[name], expected, f"loops.fit_loop.{name}")
        done = fit_loop.get("epoch_progress", {}).get("current", {}).get("completed", 0)
        if done > self.max_epochs:
            raise _Differs(f"{done} epochs are finished, and train.num_epochs is {self.max_epochs}")

    def _check_optimizer(self, states: list[Any]) -> None:
        if len(states) != 1:
            raise _Differs(f"optimizer_states: {len(states)} optimizers instead of 1")
        state = _as(states[0], dict, "optimizer_states[0]")
        groups = _member(state, "param_groups", list)
        ids = [number for index, group in enumerate(groups) for number in _group_ids(group, f"param_groups[{index}]")]
        sizes = tuple(len(group["params"]) for group in groups)
        if sizes != self.groups:
            raise _Differs(
                f"param_groups: {list(sizes)} parameters instead of {list(self.groups)}; train with the model, "
                "model.frozen_stages and optimizer groups that the checkpoint was trained with"
            )
        shapes = dict(zip(ids, self.shapes, strict=True))
        for number, moments in _member(state, "state", dict).items():
            if number not in shapes:
                raise _Differs(f"state: {number!r:.40} is no parameter")
            _check_moments(moments, shapes[number], f"state[{number}]")


class _Differs(ValueError):
    """A part of a training state that is not as expected."""


def _as(value: Any, expected: type, path: str) -> Any:
    if not isinstance(value, expected):
        raise _Differs(f"{path}: {type(value).__name__} instead of {expected.__name__}")
    return value


def _member(values: Mapping[str, Any], name: str, expected: type) -> Any:
    if name not in values:
        raise _Differs(f"{name}: missing")
    return _as(values[name], expected, name)


def _check_version(text: Any) -> None:
    match = _VERSION.fullmatch(_as(text, str, "pytorch-lightning_version"))
    if match is None or int(match[1]) < _OLDEST_MAJOR:
        raise _Differs(f"pytorch-lightning_version: {text!r:.40}; expected {_OLDEST_MAJOR}.0 or later")


def _check_like(value: Any, expected: Any, path: str) -> None:
    """Raises _Differs unless a value has the keys and the types of another one; numbers are counts."""
    if isinstance(expected, dict):
        _as(value, dict, path)
        for name, part in expected.items():
            if name not in value:
                raise _Differs(f"{path}.{name}: missing")
            _check_like(value[name], part, f"{path}.{name}")
    elif isinstance(expected, bool):
        _as(value, bool, path)
    elif isinstance(expected, int) and not _is_count(value):
        raise _Differs(f"{path}: {value!r:.40} is no count")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT


def _check_numbers(values: Any, path: str) -> None:
    for name, value in _as(values, dict, path).items():
        if finite_number(value) is None:
            raise _Differs(f"{path}.{name}: {value!r:.40} is no finite number")


def _group_ids(group: Any, path: str) -> list[int]:
    """Returns the numbers of the parameters of a group, whose settings it checks."""
    settings = _as(group, dict, path)
    betas = settings.get("betas")
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise _Differs(f"{path}.betas: {betas!r:.40} is no pair of numbers")
    for name, value in [("betas", beta) for beta in betas] + [(name, settings.get(name)) for name in _GROUP_SETTINGS]:
        if finite_number(value) is None:
            raise _Differs(f"{path}.{name}: {value!r:.40} is no finite number")
    numbers = _member(settings, "params", list)
    if not all(_is_count(number) for number in numbers):
        raise _Differs(f"{path}.params: not numbers of parameters")
    ids: list[int] = numbers
    return ids


def _check_moments(moments: Any, shape: torch.Size, path: str) -> None:
    values = _as(moments, dict, path)
    for name in ("exp_avg", "exp_avg_sq"):
        tensor = _as(values.get(name), Tensor, f"{path}.{name}")
        if tensor.shape != shape or not tensor.is_floating_point():
            raise _Differs(f"{path}.{name}: {tensor.dtype} {tuple(tensor.shape)} instead of {tuple(shape)}")
    step = values.get("step")
    if finite_number(step) is None and not (isinstance(step, Tensor) and step.numel() == 1 and not step.is_complex()):
        raise _Differs(f"{path}.step: {step!r:.40} is no number")
