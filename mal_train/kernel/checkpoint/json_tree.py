"""Trees of plain values and tensors as JSON text, and back: the training state of a checkpoint, without pickle.

JSON has no tuple, no NaN, no keys but strings. Those become objects with one key:

    {"$t": name}                a tensor, stored beside the text under that name
    {"$f": "nan"}               a float that is no number: nan, inf, -inf
    {"$tuple": […]}             a tuple
    {"$dict": [[key, value]…]}  a dict whose keys are not all strings, or could be taken for one of these

Knows nothing of files.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

from torch import Tensor

from mal_train.core.errors import CheckpointError

Tree: TypeAlias = Any
"""None, bool, int, float, str, tensors of any shape, and lists, tuples and dicts of these; dict keys are any of the
first five or tuples of them. Subclasses (OrderedDict, StrEnum, numpy's float64) come back as the plain type."""


def to_json(value: Tree, where: str, tensors: dict[str, Tensor] | None = None, prefix: str = "") -> str:
    """`value` as JSON text.

    Args:
        value: the tree.
        where: what it is called in messages and in the names of tensors.
        tensors: gets every tensor of the tree under a new name; None where there may be none.
        prefix: of those names.

    Raises:
        CheckpointError: a value of another type, by its path in the tree.

    >>> to_json({"loss": float("nan"), "steps": (1, 2)}, "example")
    '{"loss":{"$f":"nan"},"steps":{"$tuple":[1,2]}}'
    """
    tree = _Encoder(tensors, prefix).encode(value, where)
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def from_json(text: str, tensors: Mapping[str, Tensor]) -> Tree:
    """Inverse of `to_json`; ValueError for a text that `to_json` would not have written."""
    try:
        return _decode(parse(text), tensors)
    except (TypeError, RecursionError) as error:  # TypeError: a list for a key
        raise ValueError(str(error)) from None


def parse(text: str | bytes) -> Any:
    """Strict JSON: neither doubled names nor NaN. ValueError for anything else."""
    try:
        return json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _Encoder:
    def __init__(self, tensors: dict[str, Tensor] | None, prefix: str) -> None:
        self._tensors = tensors
        self._prefix = prefix

    def encode(self, value: Tree, where: str) -> Any:
        """Plain JSON values for `value`, which stands at `where`."""
        match value:
            case None | bool():
                return value
            case str() | int():
                return str(value) if isinstance(value, str) else int(value)
            case float():
                return float(value) if math.isfinite(value) else {"$f": str(float(value))}
            case list() | tuple():
                items = [self.encode(item, f"{where}.{i}") for i, item in enumerate(value)]
                return {"$tuple": items} if isinstance(value, tuple) else items
            case dict():
                return self._encode_dict(value, where)
        return self._encode_other(value, where)

    def _encode_dict(self, value: dict[Any, Tree], where: str) -> Any:
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {str(key): self.encode(item, f"{where}.{key}") for key, item in value.items()}
        keys = _Encoder(None, "")
        return {
            "$dict": [[keys.encode(key, where), self.encode(item, f"{where}.{key}")] for key, item in value.items()]
        }

    def _encode_other(self, value: Tree, where: str) -> Any:
        if isinstance(value, Tensor) and self._tensors is not None:
            name = f"{self._prefix}{len(self._tensors):05d}/{where}"
            self._tensors[name] = value
            return {"$t": name}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(
            f"{where}: a {kind} cannot be stored; a checkpoint holds None, bool, int, float, str, list, tuple, dict"
            f"{' and tensors' if self._tensors is not None else ''}"
        )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Tree:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if tag.startswith("$"):
        return _decode_tagged(tag, value[tag], tensors)
    return {key: _decode(item, tensors) for key, item in value.items()}


def _decode_tagged(tag: str, item: Any, tensors: Mapping[str, Tensor]) -> Tree:
    match tag:
        case "$t" if isinstance(item, str) and item in tensors:
            return tensors[item]
        case "$f" if item in ("nan", "inf", "-inf"):
            return float(item)
        case "$tuple" if isinstance(item, list):
            return tuple(_decode(entry, tensors) for entry in item)
        case "$dict" if isinstance(item, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in item):
            return {_decode(key, {}): _decode(entry, tensors) for key, entry in item}
    raise ValueError(f"{tag!r} stands with something that does not belong there")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
