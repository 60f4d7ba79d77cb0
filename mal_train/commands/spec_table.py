"""Generates docs/spec.md, the table of every field of the spec, from the schema. No torch."""

import json
import sys
import typing
from collections.abc import Iterator
from enum import Enum

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mal_train.config.spec import Spec

HEADER = """# Every field of the spec

Generated from the schema: `python -m mal_train.commands.spec_table > docs/spec.md`. `mal-train default-spec` prints the
same fields as a YAML file, and `mal-train default-spec --json-schema` as a JSON schema for editors. `a.b=c` on the
command line replaces a field.

| field | default | range | meaning |
|---|---|---|---|
"""
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields the dotted name of every field that is not a section, in the order of the schema."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def page() -> str:
    """Returns the text of docs/spec.md."""
    return HEADER + "".join(_row(name, field) for name, field in fields_of(Spec))


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split()).replace("|", "\\|").replace("<", "&lt;")
    return f"| `{name}` | `{json.dumps(field.default)}` | {', '.join(_constraints(field))} | {meaning} |\n"


def _constraints(field: FieldInfo) -> Iterator[str]:
    """Yields the choices of a field, then its bounds, including those of list elements."""
    yield from _choices(field.annotation)
    yield from dict.fromkeys([*_bounds(field.metadata), *_element_bounds(field.annotation)])


def _choices(annotation: object) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        yield " · ".join(f"`{member.value}`" for member in annotation)
    elif typing.get_origin(annotation) is typing.Literal:
        yield " · ".join(f"`{value}`" for value in typing.get_args(annotation))


def _element_bounds(annotation: object) -> Iterator[str]:
    if typing.get_origin(annotation) is typing.Annotated:
        yield from _bounds(typing.get_args(annotation)[1:])
    if typing.get_origin(annotation) is not typing.Literal:
        for argument in typing.get_args(annotation):
            yield from _element_bounds(argument)


def _bounds(metadata: typing.Iterable[object]) -> Iterator[str]:
    for entry in metadata:
        for constraint in entry.metadata if isinstance(entry, FieldInfo) else [entry]:
            for name, sign in _SIGNS.items():
                value = getattr(constraint, name, None)
                if value is not None:
                    yield f"{sign} {value if isinstance(value, int) else format(value, 'g')}"


if __name__ == "__main__":
    sys.stdout.write(page())
