"""Trees of values and tensors survive JSON; errors name the path of any other value."""

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mal_train.core.errors import CheckpointError
from mal_train.kernel.checkpoint.json_tree import from_json, to_json

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
KEYS = st.one_of(SCALARS, st.tuples(st.integers(), st.text()))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=5), inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=20,
)


def same(a: Any, b: Any) -> bool:
    """Returns True if both trees are equal in values and types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(x, y) for p, q in zip(a.items(), b.items(), strict=True) for x, y in zip(p, q, strict=True)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@settings(max_examples=150, deadline=None)
@given(tree=TREES)
def test_a_tree_survives_a_round_trip_with_its_types_and_order(tree: Any) -> None:
    assert same(from_json(to_json(tree, "tree"), {}), tree)


def test_tensors_keep_their_position_and_their_names_never_collide() -> None:
    tensors: dict[str, Tensor] = {}
    text = to_json({1: torch.tensor(1), "1": torch.tensor(2), "$t": torch.tensor(3)}, "state", tensors, "training/")
    assert len(tensors) == 3
    assert all(name.startswith("training/0000") for name in tensors)
    back = from_json(text, tensors)
    assert {key: int(value) for key, value in back.items()} == {1: 1, "1": 2, "$t": 3}


def test_numbers_that_json_lacks_survive_a_round_trip() -> None:
    back = from_json(to_json([math.nan, math.inf, -math.inf, -0.0, 2**100], "tree"), {})
    assert math.isnan(back[0])
    assert back[1:3] == [math.inf, -math.inf]
    assert math.copysign(1, back[3]) == -1
    assert back[4] == 2**100


@pytest.mark.parametrize("text", ["\ud800", "a\udfff b", "\ud83d\ude00"[:1], "é\\u00e9"])
def test_half_of_a_surrogate_pair_has_a_form_that_a_file_can_hold(text: str) -> None:
    encoded = to_json({"name": text, text: 1}, "example").encode()
    assert from_json(encoded.decode(), {}) == {"name": text, text: 1}


def test_subclasses_are_decoded_as_plain_types() -> None:
    assert same(from_json(to_json(OrderedDict(a=1), "tree"), {}), {"a": 1})


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), Path(), 1j, len])
def test_the_error_names_the_path_of_a_value_of_another_type(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"^training\.callbacks\.0\.x: "):
        to_json({"callbacks": [{"x": value}]}, "training", {})


def test_a_tensor_is_refused_where_none_is_allowed() -> None:
    with pytest.raises(CheckpointError, match=r"^provenance\.x: .*torch\.Tensor"):
        to_json({"x": torch.tensor(1)}, "provenance")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[1, Infinity]",
        '{"a": 1, "a": 2}',
        '{"$t": "missing"}',
        '{"$t": 5}',
        '{"$f": 1}',
        '{"$f": "1e9"}',
        '{"$tuple": 3}',
        '{"$dict": [[1]]}',
        '{"$dict": [[[1], 2]]}',
        '{"$other": 1}',
        "[" * 100_000,
        "9" * 5000,
    ],
)
def test_invalid_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_json(text, {})
