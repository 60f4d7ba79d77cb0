"""Converts trees of plain values and tensors to JSON text and back: a checkpoint's training state, without pickle.

JSON lacks tuples, NaN, infinity and keys other than strings. They become objects with one member:

    {"$t": name}                a tensor, stored separately under that name
    {"$f": "nan"}               a non-finite float: nan, inf, -inf
    {"$tuple": […]}             a tuple
    {"$dict": [[key, value]…]}  a dict with a key that is no string or begins with "$"

Knows nothing of files.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

from torch import Tensor

from mal_train.core.errors import CheckpointError

_SURROGATE = re.compile("[\\ud800-\\udfff]")

Tree: TypeAlias = Any
"""None, bool, int, float, str, tensors of any shape, and lists, tuples and dicts of these. Dict keys are any of the
first five or tuples of them. Subclasses (OrderedDict, StrEnum, NumPy's float64) come back as the plain type."""


def to_json(value: Tree, path: str, tensors: dict[str, Tensor] | None = None, prefix: str = "") -> str:
    """Encodes a tree as JSON text.

    Args:
        value: the tree.
        path: name of the tree in error messages and tensor names.
        tensors: receives every tensor of the tree under a new name; None if the tree may hold none.
        prefix: prefix of those names.

    Raises:
        CheckpointError: a value of another type; the message names its path in the tree.

    >>> to_json({"loss": float("nan"), "steps": (1, 2)}, "example")
    '{"loss":{"$f":"nan"},"steps":{"$tuple":[1,2]}}'
    """
    tree = _Encoder(tensors, prefix).encode(value, path)
    text = json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Half of a surrogate pair, which an annotation file can hold, has no UTF-8.
    return _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def from_json(text: str, tensors: Mapping[str, Tensor]) -> Tree:
    """Decodes text that `to_json` wrote.

    Args:
        text: the JSON text.
        tensors: the stored tensors, by the names that `to_json` gave them.

    Raises:
        ValueError: the text is not in the format of `to_json`, or names a tensor that is not in `tensors`.
    """
    try:
        return _decode(parse(text), tensors)
    except (TypeError, RecursionError) as error:  # TypeError: a list as a key
        raise ValueError(str(error)) from None


def parse(text: str | bytes) -> Any:
    """Parses JSON; raises ValueError for invalid text, repeated names and NaN."""
    try:
        return json.loads(text, object_pairs_hook=_unique_names, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _Encoder:
    def __init__(self, tensors: dict[str, Tensor] | None, prefix: str) -> None:
        self._tensors = tensors
        self._prefix = prefix

    def encode(self, value: Tree, path: str) -> Any:
        """Returns plain JSON values for the value at `path`."""
        match value:
            case None | bool():
                return value
            case str() | int():
                return str(value) if isinstance(value, str) else int(value)
            case float():
                return float(value) if math.isfinite(value) else {"$f": str(float(value))}
            case list() | tuple():
                items = [self.encode(item, f"{path}.{i}") for i, item in enumerate(value)]
                return {"$tuple": items} if isinstance(value, tuple) else items
            case dict():
                return self._encode_dict(value, path)
        return self._encode_other(value, path)

    def _encode_dict(self, value: dict[Any, Tree], path: str) -> Any:
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {str(key): self.encode(item, f"{path}.{key}") for key, item in value.items()}
        keys = _Encoder(None, "")
        return {"$dict": [[keys.encode(key, path), self.encode(item, f"{path}.{key}")] for key, item in value.items()]}

    def _encode_other(self, value: Tree, path: str) -> Any:
        if isinstance(value, Tensor) and self._tensors is not None:
            name = f"{self._prefix}{len(self._tensors):05d}/{path}"
            self._tensors[name] = value
            return {"$t": name}
        type_name = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(
            f"{path}: {type_name} cannot be stored; a checkpoint holds None, bool, int, float, str, list, tuple, dict"
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
    raise ValueError(f"{tag!r} has an invalid value")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name is used more than once in one object")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
