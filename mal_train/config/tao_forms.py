"""Reads the forms of specs of other TAO releases, where their meaning is clear, and says how each is read.

TAO 4 has the devices and the checkpoint of a command at the top level, TAO 5 some of them, and the auto-label service
of TAO 5 has the fields of MAL in a section of their own.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Literal

import yaml

from mal_train.core.errors import ConfigError
from mal_train.core.storage.addresses import redact
from mal_train.core.yaml_text import parse_yaml

Verb = Literal["train", "tune", "evaluate", "inference", "export"]
"""Command of `mal-train` that reads a spec."""

Note = Callable[[str], object]
"""Receives a line for the user."""

_SECTION: Final[dict[Verb, str]] = {
    "train": "train",
    "tune": "train",
    "evaluate": "evaluate",
    "inference": "inference",
    "export": "evaluate",
}
_SERVICE: Final = "mal"
_SERVICE_TYPE: Final = "autolabel_type"
_SHARDED: Final = "ddp_sharded"


def current_form(data: Mapping[str, Any], verb: Verb, note: Note) -> dict[str, Any]:
    """Returns the data of a spec with the fields of other TAO releases in their present places.

    Args:
        data: the spec as it was read.
        verb: the command, to whose section top-level devices and the checkpoint belong.
        note: receives a line for each field that is read in another place.

    Raises:
        ConfigError: a field is given in both places with different values, or the spec is of another service than MAL.
    """
    result = _without_service(dict(data), note)
    gpus = result.get("gpus")
    if isinstance(gpus, list):
        if result.get("gpu_ids") not in (None, gpus):
            raise ConfigError(f"gpus: {gpus}; gpu_ids is {result['gpu_ids']}; remove one of them")
        if result.get("num_gpus") is None:
            result["num_gpus"] = len(gpus)
        result["gpu_ids"] = gpus
        note(f"gpus: {gpus}; read as gpu_ids and num_gpus")
        del result["gpus"]
    for name, place in _places(verb).items():
        if name in result:
            _move(result, name, place, note)
    if result.get("strategy") == _SHARDED:
        note(f"strategy: {_SHARDED}; the default of TAO 4, read as auto")
        result["strategy"] = "auto"
    return result


def current_override(override: str, verb: Verb, note: Note) -> list[str]:
    """Returns an override `a.b=c` of a field of another TAO release as overrides in its present place."""
    name, separator, value = override.removeprefix(f"{_SERVICE}.").partition("=")
    if name == _SERVICE_TYPE and value == _SERVICE:
        return []
    if name == "strategy" and value == _SHARDED:
        return ["strategy=auto"]
    place = _places(verb).get(name)
    if place is None:
        return [name + separator + value]
    note(f"{name}: {redact(value)}; read as {place}")
    with suppress(yaml.YAMLError):  # which is refused where the override is applied
        if name == "gpus" and isinstance(gpus := parse_yaml(value), list):
            places = _places(verb)
            return [f"{places['gpu_ids']}={value}", f"{places['num_gpus']}={len(gpus)}"]
    return [place + separator + value]


def _places(verb: Verb) -> dict[str, str]:
    """Returns the present place of each top-level field of another TAO release, for a command."""
    section = _SECTION[verb]
    targets = {"gpus": "num_gpus", "num_gpus": "num_gpus", "gpu_ids": "gpu_ids", "num_nodes": "num_nodes"}
    return {**{name: f"{section}.{target}" for name, target in targets.items()}, "checkpoint": checkpoint_field(verb)}


def checkpoint_field(verb: Verb) -> str:
    """Returns the field that names the checkpoint of a command: that to start from, evaluate, label with or export."""
    section = _SECTION[verb]
    return f"{section}.pretrained_model_path" if section == "train" else f"{section}.checkpoint"


def _without_service(data: dict[str, Any], note: Note) -> dict[str, Any]:
    """Returns a spec of the auto-label service with the fields of its section `mal` at the top level."""
    service = data.get(_SERVICE)
    if data.get(_SERVICE_TYPE, _SERVICE) != _SERVICE:
        raise ConfigError(f"{_SERVICE_TYPE}: {data[_SERVICE_TYPE]}; only {_SERVICE} is supported")
    if not isinstance(service, dict):
        return data if _SERVICE in data else {key: value for key, value in data.items() if key != _SERVICE_TYPE}
    outer = {key: value for key, value in data.items() if key not in (_SERVICE, _SERVICE_TYPE)}
    twice = [key for key in service if key in outer and outer[key] != service[key]]
    if twice:
        raise ConfigError(f"{_SERVICE}.{twice[0]}: {twice[0]} is also given at the top level; remove one of them")
    note(f"{_SERVICE}: the section of TAO's auto-label service; its fields are read as top-level ones")
    return {**outer, **service}


def _move(data: dict[str, Any], name: str, place: str, note: Note) -> None:
    """Moves a top-level field to its place; one that is null or empty is left out."""
    value = data.pop(name)
    section, _, target = place.partition(".")
    fields = data.get(section)
    if value in (None, "") or (fields is not None and not isinstance(fields, dict)):
        return  # another value of the section is refused later
    fields = dict(fields or {})
    if fields.get(target, value) not in (value, None, ""):
        raise ConfigError(f"{name}: {_shown(value)}; {place} is {_shown(fields[target])}; remove {name}")
    note(f"{name}: {_shown(value)}; read as {place}")
    data[section] = {**fields, target: value}


def _shown(value: object) -> object:
    """Returns a value for a message; an address without user, password and signature."""
    return redact(value) if isinstance(value, str) else value
