"""Reads YAML into pydantic models; errors name the field, its value and the rule. Independent of training and serving.

The settings of both commands are read in three steps: `load_yaml`, `apply_overrides` for `a.b=c` arguments, `validate`.
`dump` writes a model as YAML, with the description of each field as a comment.

A field that was renamed or removed belongs into the `retired` map of its model, so that files with the former name get
an error with the remedy instead of a guess:

    RETIRED = {"batch_wait_ms": renamed("max_batch_wait_ms"), "models[].gpu": renamed("models[].gpu_ids")}
    validate(ServerConfig, data, source=str(path), retired=RETIRED)
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mal_train.core.errors import ConfigError
from mal_train.core.input_files import decode_text
from mal_train.core.yaml_text import MAX_DEPTH, parse_yaml

Model = TypeVar("Model", bound=BaseModel)

MAX_YAML_BYTES = 1 << 20
MAX_SHOWN = 60
"""Maximum number of characters of an invalid value that a message repeats."""
MAX_EXPLAINED = 20
"""Maximum number of invalid fields that a message lists."""
MAX_NAME = 200
"""Maximum number of characters of a field's path that a message repeats and compares with valid names."""

_LIST_INDEX = re.compile(r"\[\d+\]")


class Strict(BaseModel):
    """Base of every section: immutable; rejects unknown fields, wrong types, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signer = Annotated[str, Field(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]
"""Public key of a signer, as `mal-train keygen --signing` prints it."""


def load_yaml(path: Path) -> dict[str, Any]:
    """Loads a YAML file with a mapping at the top level; an empty file gives an empty mapping.

    Raises:
        ConfigError: the file is missing, unreadable, larger than MAX_YAML_BYTES, not YAML, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES} bytes, which is the limit")
    try:
        content = parse_yaml(decode_text(data))
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise ConfigError(f"{path}: not {error.encoding} text ({byte}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: the top level is a {type(content).__name__}; it must be a mapping with fields such as 'train:'"
        )
    return content


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of `data` with each `a.b=c` applied in order; c is parsed as YAML.

    >>> apply_overrides({"train": {"lr": 1.0, "seed": 3}}, ["train.lr=2e-4", "model.arch=x"])
    {'train': {'lr': 0.0002, 'seed': 3}, 'model': {'arch': 'x'}}

    Raises:
        ConfigError: an override is not of the form `a.b=c`, c is not YAML, or `a` is a value instead of a section.
    """
    result = _copied(data)
    for override in overrides:
        path, separator, text = override.partition("=")
        names = path.split(".")
        if not separator or not all(names):
            is_file = override.endswith((".yaml", ".yml"))
            raise ConfigError(
                f"{_clipped(override)!r}: an override has the form section.field=value, e.g. train.lr=1e-4 or "
                "listen.port=50052" + ("; give a file with -c (mal-server) or -e (mal-train)" if is_file else "")
            )
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{_clipped(override)!r}: the value is not valid YAML: {error}") from None
        if len(names) > MAX_DEPTH:
            raise ConfigError(f"{_clipped(override)!r}: more than {MAX_DEPTH} levels")
        section = result
        for depth, name in enumerate(names[:-1]):
            inner = section.get(name)
            if inner is None:
                inner = section[name] = {}
            if not isinstance(inner, dict):
                raise ConfigError(f"{_clipped(override)!r}: {'.'.join(names[: depth + 1])} is a value, not a section")
            section = inner
        section[names[-1]] = value
    return result


def validate(
    model_cls: type[Model], data: Mapping[str, Any], *, source: str = "", retired: Mapping[str, str] | None = None
) -> Model:
    """Builds the model that `data` describes.

    Args:
        model_cls: a `Strict` model whose sections are `Strict` models too.
        data: result of `load_yaml` and `apply_overrides`. A null section counts as absent.
        source: prefix of messages, e.g. the file.
        retired: path of each removed or renamed field → the rest of the message, usually from `renamed`. `models[].a`
            stands for field a of every entry of the list `models`.

    Raises:
        ConfigError: lists every invalid field with its value and the rule; for an unknown field, the text in `retired`
            or else the nearest valid name.
    """
    plain = _without_null_sections(data, model_cls)
    try:
        # JSON mode: strict about types, yet lists become tuples and strings become enums and paths.
        return model_cls.model_validate_json(json.dumps(plain))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{_prefix(source)}a value is not text, a number, a list or a mapping: {error}") from None
        details = error.errors(include_url=False)
        lines = [_explain(detail, model_cls, retired or {}) for detail in details[:MAX_EXPLAINED]]
        unique = list(dict.fromkeys(lines))
        if len(details) > MAX_EXPLAINED:
            unique.append(f"and {len(details) - MAX_EXPLAINED} more")
        raise ConfigError(_prefix(source) + "; ".join(unique)) from None


def renamed(new_path: str) -> str:
    """Returns the text of a `retired` map for a field that has a new name."""
    return f"renamed to {new_path}"


def field_paths(model_cls: type[BaseModel], before: str = "") -> Iterator[str]:
    """Yields the dotted path of every field that holds a value, in order of declaration, without the sections."""
    for name, field in model_cls.model_fields.items():
        section = _section_of(field.annotation)
        if section is None:
            yield before + name
        else:
            yield from field_paths(section, f"{before}{name}.")


def dump(model: BaseModel, *, comments: bool = True) -> str:
    """Returns a model as YAML that `load_yaml` and `validate` read back to an equal model.

    Args:
        model: the model.
        comments: write the description of each field above it.
    """
    return "\n".join(_dump_lines(model, "", comments)) + "\n"


def _dump_lines(model: BaseModel, indent: str, comments: bool) -> Iterator[str]:
    values = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        if comments and field.description:
            yield from (f"{indent}# {line}" for line in field.description.splitlines())
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _dump_lines(value, indent + "  ", comments)
            if not indent:
                yield ""
        else:
            yield f"{indent}{name}: {_scalar(values[name])}"


def _scalar(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.rstrip("\n").removesuffix("...").rstrip("\n")


def _prefix(source: str) -> str:
    return f"{source}: " if source else ""


def _copied(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in data.items()}


def _section_of(annotation: object) -> type[BaseModel] | None:
    """Returns the model class in an annotation such as `Section` or `Section | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        for choice in typing.get_args(annotation):
            if isinstance(choice, type) and issubclass(choice, BaseModel):
                return choice
    return None


def _entry_of(annotation: object) -> type[BaseModel] | None:
    """Returns the model class of the entries of a list such as `tuple[Entry, ...]`."""
    return next((entry for entry in map(_section_of, typing.get_args(annotation)) if entry is not None), None)


def field_at(loc: Sequence[int | str], model_cls: type[BaseModel]) -> FieldInfo | None:
    """Returns the field at a location in the data; None if there is no such field."""
    section: type[BaseModel] | None = model_cls
    field: FieldInfo | None = None
    for name in loc:
        if isinstance(name, int):
            continue
        field = None if section is None else section.model_fields.get(name)
        section = None if field is None else _section_of(field.annotation) or _entry_of(field.annotation)
    return field


def _choices(field: FieldInfo | None) -> list[str]:
    """Returns the allowed values of a field, or of the entries of its list, if they are a Literal or a StrEnum."""
    annotation = None if field is None else field.annotation
    candidates = [annotation, *typing.get_args(annotation)]
    literal = next((each for each in candidates if typing.get_origin(each) is typing.Literal), None)
    if literal is not None:
        return [str(choice) for choice in typing.get_args(literal)]
    enum = next((each for each in candidates if isinstance(each, type) and issubclass(each, StrEnum)), None)
    return [] if enum is None else [str(choice) for choice in enum]


def _without_null_sections(data: Mapping[str, Any], model_cls: type[BaseModel]) -> dict[str, Any]:
    """Removes null sections: `train:` with no fields stands for the defaults of that section."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        field = model_cls.model_fields.get(key) if isinstance(key, str) else None
        section = None if field is None else _section_of(field.annotation)
        if section is None:
            result[key] = value
        elif isinstance(value, dict):
            result[key] = _without_null_sections(value, section)
        elif value is not None:
            result[key] = value
    return result


def _explain(detail: ErrorDetails, model_cls: type[BaseModel], retired: Mapping[str, str]) -> str:
    path = _location(detail)
    error_type = detail["type"]
    if error_type == "extra_forbidden":
        retired_text = retired.get(_LIST_INDEX.sub("[]", path))
        if retired_text is not None:
            return f"{path}: {retired_text}"
        names = list(field_paths(model_cls))
        nearest = _suggestion_in_entry(path, model_cls) if "[" in path else _suggestion(path, names)
        return f"{path}: unknown field{nearest}"
    if error_type == "missing":
        choices = _choices(field_at(detail["loc"], model_cls))
        return f"{path}: required, but not given" + (f"; it takes {', '.join(choices)}" if choices else "")
    rule = detail["msg"].removeprefix("Value error, ")
    rule = rule[:1].lower() + rule[1:]
    rule = rule.replace("input should", "it must").replace("an object", "a section with fields")
    if not path:  # a rule about several fields names them
        return rule
    if error_type == "value_error" and isinstance(detail["input"], dict):
        return rule if rule.startswith(f"{path}.") else f"{path}: {rule}"
    if error_type == "string_type" and detail["input"] is None:
        rule += ": give it, '' for an empty one, or omit the field"
    value = "<not shown>" if _is_secret(model_cls, path) else _shown(detail["input"])
    return f"{path}: {value}; {rule}"


def _is_secret(model_cls: type[BaseModel], path: str) -> bool:
    """Returns True for a field declared with `repr=False`, whose value is kept out of messages."""
    name, _, rest = path.partition(".")
    name = name.partition("[")[0]
    field = model_cls.model_fields.get(name)
    if field is None:
        return False
    section = _section_of(field.annotation) or (_entry_of(field.annotation) if rest else None)
    return not field.repr if section is None else _is_secret(section, rest)


def _location(detail: ErrorDetails) -> str:
    parts: list[str] = []
    for part in detail["loc"]:
        if isinstance(part, int) and parts:
            parts[-1] += f"[{part}]"
        else:
            parts.append(str(part))
    return _clipped(".".join(parts), MAX_NAME)


def _shown(value: object) -> str:
    return _clipped(json.dumps(value, default=str))


def _clipped(text: str, length: int = MAX_SHOWN) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _suggestion_in_entry(path: str, model_cls: type[BaseModel]) -> str:
    """Suggests a valid name for a misspelled field of a list entry, `models[0].branhc`."""
    entry: type[BaseModel] | None = model_cls
    *owners, name = path.split(".")
    for owner in owners:
        field = None if entry is None else entry.model_fields.get(owner.partition("[")[0])
        entry = None if field is None else _section_of(field.annotation) or _entry_of(field.annotation)
    names = [] if entry is None else list(entry.model_fields)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"; fields of an entry: {', '.join(names)}" + (f"; did you mean {close[0]}?" if close else "")


def _suggestion(path: str, valid_paths: Sequence[str]) -> str:
    """Suggests a valid name: first of the same section, then the same name elsewhere, then the most similar name."""
    section, _, name = path.rpartition(".")
    start = f"{section}." if section else ""
    siblings = {p.removeprefix(start).split(".")[0] for p in valid_paths if p.startswith(start)}
    close = difflib.get_close_matches(name, sorted(siblings), n=1, cutoff=0.75)
    if close:
        return f"; did you mean {start}{close[0]}?"
    elsewhere = [p for p in valid_paths if p.rpartition(".")[2] == name]
    if elsewhere:
        return f"; it belongs to {' or '.join(elsewhere[:3])}"
    # Of a name in several sections, the one in this section, else the first.
    by_leaf = {p.rpartition(".")[2]: p for p in sorted(reversed(valid_paths), key=lambda p: p.startswith(start))}
    close = difflib.get_close_matches(name, sorted(by_leaf), n=1, cutoff=0.6)
    if close:
        return f"; the nearest valid name is {by_leaf[close[0]]}"
    close = difflib.get_close_matches(path, list(valid_paths), n=1, cutoff=0.0)
    return f"; the nearest valid name is {close[0]}" if close else ""
