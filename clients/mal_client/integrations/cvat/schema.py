"""Checks the JSON of a CVAT server, which is not trusted, before a plan is made from it. Needs no SDK."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mal_client.errors import ServerError

Json = dict[str, Any]
Types = tuple[type, ...]

MAX_NUMBER: Final = 1e12
"""Limit of all numbers, far beyond those of CVAT, so that each fits into an integer of 64 bits and a float."""

_OPTIONAL_INT: Final[Types] = (int, type(None))
_NUMBER: Final[Types] = (int, float)
_SHAPE: Final[Mapping[str, Types]] = {
    "type": (str,),
    "frame": (int,),
    "id": _OPTIONAL_INT,
    "group": _OPTIONAL_INT,
    "z_order": _OPTIONAL_INT,
    "rotation": (*_NUMBER, type(None)),
}
_TRACK: Final[Mapping[str, Types]] = {"label_id": (int,), "id": _OPTIONAL_INT, "group": _OPTIONAL_INT}
_ATTRIBUTE: Final[Mapping[str, Types]] = {"spec_id": (int,), "value": (str,)}
_LABEL: Final[Mapping[str, Types]] = {"id": (int,), "name": (str,)}
_LABEL_ATTRIBUTE: Final[Mapping[str, Types]] = {"id": (int,), "name": (str,)}


def check_annotations(annotations: Any) -> Json:
    """Returns the annotations of a task.

    Raises:
        ServerError: they have another form.
    """
    if not isinstance(annotations, dict):
        raise _invalid("annotations", annotations)
    for row in _rows(annotations, "tags"):
        _check_fields(row, {"id": _OPTIONAL_INT}, "tags")
    for row in _rows(annotations, "shapes"):
        _check_shape(row, {**_SHAPE, "label_id": (int,)}, "shapes")
    for track in _rows(annotations, "tracks"):
        _check_fields(track, _TRACK, "tracks")
        _check_attributes(track, "tracks")
        for row in _rows(track, "shapes"):
            _check_shape(row, _SHAPE, "tracks: shapes")
    return annotations


def check_labels(labels: Sequence[Any]) -> list[Json]:
    """Returns the labels of a task. Raises ServerError: they have another form."""
    for label in labels:
        _check_fields(label, _LABEL, "labels")
        for row in _rows(label, "attributes"):
            _check_fields(row, _LABEL_ATTRIBUTE, "labels: attributes")
    return list(labels)


def _check_shape(row: Any, fields: Mapping[str, Types], name: str) -> None:
    _check_fields(row, fields, name)
    _check_attributes(row, name)
    points = row.get("points")
    if points is not None and (not isinstance(points, list) or not all(_has_type(v, _NUMBER) for v in points)):
        raise _invalid(f"{name}: points", points)


def _check_attributes(row: Json, name: str) -> None:
    for value in _rows(row, "attributes"):
        _check_fields(value, _ATTRIBUTE, f"{name}: attributes")


def _check_fields(row: Any, fields: Mapping[str, Types], name: str) -> None:
    if not isinstance(row, dict):
        raise _invalid(name, row)
    for key, types in fields.items():
        if not _has_type(row.get(key), types):
            raise _invalid(f"{name}: {key}", row.get(key))


def _has_type(value: Any, types: Types) -> bool:
    if not isinstance(value, types) or isinstance(value, bool):
        return False
    # False for NaN.
    return not isinstance(value, int | float) or -MAX_NUMBER <= value <= MAX_NUMBER


def _rows(parent: Json, key: str) -> list[Any]:
    """Returns the list of a field, empty if there is none."""
    value = parent.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _invalid(key, value)
    return value


def _invalid(name: str, value: Any) -> ServerError:
    return ServerError(f"{name} of the CVAT server: {type(value).__name__} is not what CVAT sends; check --cvat")
