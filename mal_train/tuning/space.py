"""Turns `tune.space` into Optuna's distributions, and the parameters of a trial into the spec of its training.

Every bound and every choice is checked against the schema of the spec before a trial runs.
"""

import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mal_train.config.labeling import EvaluateConfig, InferenceConfig
from mal_train.config.spec import RETIRED, Spec
from mal_train.config.tune import SearchRange, TuneConfig
from mal_train.core.errors import ConfigError
from mal_train.core.yaml_config import field_at, field_paths, validate

Value = Any
"""Value of a field of the spec: a JSON value."""
Distribution = CategoricalDistribution | IntDistribution | FloatDistribution

SECTIONS = ("dataset", "model", "train")
"""Sections with fields that a training reads."""
SET_BY_TUNE = {
    "train.results_dir": "each trial has a folder of its own",
    "train.resume_training_checkpoint_path": "each trial starts from the beginning",
    "train.num_gpus": "tune.devices says it",
    "train.gpu_ids": "tune.devices says it",
    "train.num_nodes": "a trial runs on one machine",
    "train.validation_interval": "trials are compared after the same epochs",
    **dict.fromkeys(
        ("dataset.val_ann_path", "dataset.val_img_dir", "dataset.load_mask"),
        "all trials are measured on the same boxes",
    ),
}
"""Fields that no trial may change, with the reason."""
MAX_CHECKED = 1000
"""Number of values of a range of integers that are checked one by one; of a longer one, and of floats, both ends."""


def distributions(spec: Spec) -> dict[str, Distribution]:
    """Returns the distribution of each field of `tune.space`.

    Raises:
        ConfigError: there is no field, one is unknown, may not be searched, or a value is of the wrong type or out of
            range.
    """
    space = spec.tune.space
    if not space:
        raise ConfigError("tune.space: no field; give fields and their ranges, e.g. train.lr: {low: 1e-5, high: 1e-3}")
    found = {name: _distribution(name, values) for name, values in space.items()}
    for name, distribution in found.items():
        for value in _checked_values(distribution):
            with_values(spec, {name: value}, source="tune.space")
    return found


def with_values(spec: Spec, values: Mapping[str, Value], *, source: str = "") -> Spec:
    """Returns the spec with the given fields, validated.

    Args:
        spec: the spec.
        values: value by name of the field; choices that are lists as Optuna stores them.
        source: start of error messages.

    Raises:
        ConfigError: a value does not fit the schema, or fields contradict one another.
    """
    data = spec.model_dump(mode="json")
    for name, value in values.items():
        *sections, field = name.split(".")
        section = data
        for each in sections:
            section = section[each]
        section[field] = decoded(value)
    return validate(Spec, data, source=source, retired=RETIRED)


def trial_spec(spec: Spec, values: Mapping[str, Value], results_dir: str, gpus: tuple[int, ...]) -> Spec:
    """Returns the spec of the training of a trial: its values, folder and devices; publishes nothing.

    Sections that a training does not read have their defaults: their addresses may be signed.

    Args:
        spec: the spec of the study.
        values: see `with_values`.
        results_dir: output folder; the training writes to <results_dir>/train.
        gpus: GPUs of the trial; empty for the CPU.
    """
    own = {
        "results_dir": results_dir,
        "publish_to": "",
        "train.results_dir": None,
        "train.gpu_ids": list(gpus),
        "train.num_gpus": len(gpus) or spec.train.num_gpus,
    }
    unread = {"tune": TuneConfig(), "evaluate": EvaluateConfig(), "inference": InferenceConfig()}
    return with_values(spec, {**values, **own}).model_copy(update=unread)


def decoded(value: Value) -> Value:
    """Returns the value of a field that `encoded` gave to Optuna."""
    return json.loads(value[len(_JSON) :]) if isinstance(value, str) and value.startswith(_JSON) else value


def encoded(value: Value) -> str | int | float | bool | None:
    """Returns a choice as Optuna stores it: it knows no lists."""
    return _JSON + json.dumps(value) if isinstance(value, (list, dict)) else value


_JSON = "json:"


def shown_value(value: Value) -> str:
    """Returns the value of a parameter as text."""
    value = decoded(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def shown_values(values: Mapping[str, Value]) -> str:
    """Returns parameters as one line of text.

    >>> shown_values({"train.lr": 0.000123456, "train.margin_rate": "json:[0, 1]"})
    'train.lr 0.000123456, train.margin_rate [0, 1]'
    """
    return ", ".join(f"{name} {shown_value(value)}" for name, value in values.items())


def _distribution(name: str, values: SearchRange) -> Distribution:
    number_type = _number_type(_field_annotation(name))
    if values.choices is not None:
        return CategoricalDistribution([encoded(value) for value in values.choices])
    low, high, step = values.low, values.high, values.step
    if low is None or high is None or number_type is None:  # `SearchRange` requires both
        raise ConfigError(f"tune.space.{name}: the field holds no number; give choices instead of low and high")
    if number_type is float:
        _check_step(name, low, high, step)
        return FloatDistribution(low, high, log=values.log, step=step)
    if not all(isinstance(value, int) for value in (low, high, 1 if step is None else step)):
        raise ConfigError(f"tune.space.{name}: low {low}, high {high}, step {step}; the field holds an integer")
    _check_step(name, low, high, step)
    return IntDistribution(int(low), int(high), log=values.log, step=int(step or 1))


def _check_step(name: str, low: float, high: float, step: float | None) -> None:
    if step is not None and abs((high - low) / step - round((high - low) / step)) > 1e-6:
        raise ConfigError(f"tune.space.{name}: step {step}; high {high} must be low {low} plus a multiple of it")


def _field_annotation(name: str) -> object:
    """Returns the type of a field that trials may change.

    Raises:
        ConfigError: the field is unknown or may not be searched.
    """
    if name in SET_BY_TUNE:
        raise ConfigError(f"tune.space.{name}: cannot be searched: {SET_BY_TUNE[name]}")
    if name not in field_paths(Spec):
        _refuse_unknown(name)
    path = name.split(".")
    field = field_at(path, Spec)
    if path[0] not in SECTIONS or field is None:
        raise ConfigError(f"tune.space.{name}: cannot be searched; only fields of {', '.join(SECTIONS)} can")
    return field.annotation


def _refuse_unknown(name: str) -> None:
    """Raises the error of the schema for a field that does not exist, which names the nearest one."""
    data: Any = 0
    for part in name.split(".")[::-1]:
        data = {part: data}
    validate(Spec, data, source="tune.space", retired=RETIRED)


def _number_type(annotation: object) -> type[int] | type[float] | None:
    """Returns int or float for a field that holds one number or null; None for any other.

    >>> _number_type(int | None), _number_type(float), _number_type(tuple[float, ...]), _number_type(bool)
    (<class 'int'>, <class 'float'>, None, None)
    """
    if annotation is int or annotation is float:
        return annotation
    if typing.get_origin(annotation) is typing.Annotated:
        return _number_type(typing.get_args(annotation)[0])
    types = [_number_type(each) for each in typing.get_args(annotation) if each is not type(None)]
    is_optional = type(None) in typing.get_args(annotation)
    return types[0] if is_optional and len(types) == 1 else None


def _checked_values(distribution: Distribution) -> Sequence[Value]:
    """Returns the values to check: all of a few, otherwise both ends; in between, the schema has no other rules."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        values = range(distribution.low, distribution.high + 1, distribution.step)
        if len(values) <= MAX_CHECKED:
            return values
    return distribution.low, distribution.high
