"""Reads the forms of specs of other TAO releases, where their meaning is clear, and says how each is read.

TAO 4 has the devices and the checkpoint of a command at the top level, TAO 5 some of them, and the auto-label service
of TAO 5 has the fields of MAL in a section of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from mal_train.core.errors import ConfigError

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
        data: the spec as it was read, with overrides.
        verb: the command, to whose section top-level devices and the checkpoint belong.
        note: receives a line for each field that is read in another place.

    Raises:
        ConfigError: a field is given in both places with different values, or the spec is of another service than MAL.
    """
    result = _without_service(dict(data), note)
    section = _SECTION[verb]
    gpus = result.get("gpus")
    if isinstance(gpus, list):
        result["gpu_ids"] = gpus
        result.setdefault("num_gpus", len(gpus))
        note(f"gpus: {gpus}; read as gpu_ids and num_gpus")
        del result["gpus"]
    places = {"gpus": "num_gpus", "num_gpus": "num_gpus", "gpu_ids": "gpu_ids", "num_nodes": "num_nodes"}
    for name, target in {**places, "checkpoint": checkpoint_field(verb).partition(".")[2]}.items():
        if name in result:
            _move(result, name, section, target, note)
    if result.get("strategy") == _SHARDED:
        note(f"strategy: {_SHARDED}; the default of TAO 4, read as auto")
        result["strategy"] = "auto"
    return result


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


def _move(data: dict[str, Any], name: str, section: str, target: str, note: Note) -> None:
    value = data.pop(name)
    fields = data.get(section)
    if fields is not None and not isinstance(fields, dict):
        return  # the value of the section is refused later
    fields = dict(fields or {})
    if fields.get(target, value) not in (value, None, ""):
        raise ConfigError(f"{name}: {value}; {section}.{target} is {fields[target]}; remove {name}")
    note(f"{name}: {value}; read as {section}.{target}")
    data[section] = {**fields, target: value}
