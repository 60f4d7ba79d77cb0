"""Every number in the settings of both commands has bounds, so that none can stop or fill a machine."""

import typing
from collections.abc import Iterator

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mal_server.config.server import ServerConfig
from mal_train.config.spec import Spec
from mal_train.core.errors import ConfigError
from mal_train.core.settings import MAX_SIZES
from mal_train.core.yaml_config import validate


def numbers(annotation: object, metadata: tuple[object, ...], path: str) -> Iterator[tuple[str, set[str]]]:
    """Yields the path of every number in a type, with the kinds of bounds on it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from numbers(field.annotation, tuple(field.metadata), f"{path}.{name}")
    elif annotation in (int, float):
        yield path, set(bounds(metadata))
    elif typing.get_origin(annotation) is typing.Annotated:
        inner, *own = typing.get_args(annotation)
        yield from numbers(inner, (*metadata, *own), path)
    elif typing.get_origin(annotation) is not typing.Literal:
        for argument in typing.get_args(annotation):
            yield from numbers(argument, metadata, path)


def bounds(metadata: tuple[object, ...]) -> Iterator[str]:
    for entry in metadata:
        for constraint in entry.metadata if isinstance(entry, FieldInfo) else [entry]:
            if isinstance(constraint, annotated_types.Ge | annotated_types.Gt):
                yield "lower"
            if isinstance(constraint, annotated_types.Le | annotated_types.Lt):
                yield "upper"


@pytest.mark.parametrize("model", [Spec, ServerConfig])
def test_every_number_has_a_lower_and_an_upper_bound(model: type[BaseModel]) -> None:
    found = list(numbers(model, (), model.__name__))
    assert len(found) > 15
    assert [path for path, kinds in found if kinds != {"lower", "upper"}] == []


@pytest.mark.parametrize("name", MAX_SIZES)
def test_a_spec_has_the_bounds_of_a_checkpoint(name: str) -> None:
    most = MAX_SIZES[name]
    validate(Spec, {"model": {name: most}})
    with pytest.raises(ConfigError, match=name):
        validate(Spec, {"model": {name: most + 1}})
