"""Options of the library that are given by the values of their enumerations, as the command line takes them."""

from collections.abc import Callable
from typing import Any

import pytest
from mal_client.types import DatasetOptions, LabelOptions

from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch, MaskFormat, RotatedBoxes, RowFilter, RowRules

OPTIONS: list[tuple[Callable[..., Any], str, str, object]] = [
    (DatasetOptions, "only", "missing", RowFilter.MISSING),
    (DatasetOptions, "mask_format", "polygons", MaskFormat.POLYGONS),
    (LabelOptions, "branch", "teacher", Branch.TEACHER),
    (RowRules, "rotated_boxes", "upright", RotatedBoxes.UPRIGHT),
]


@pytest.mark.parametrize(("make", "field", "value", "member"), OPTIONS)
def test_a_value_stands_for_its_member(make: Callable[..., Any], field: str, value: str, member: object) -> None:
    assert getattr(make(**{field: value}), field) is member
    assert make(**{field: value}) == make(**{field: member})


@pytest.mark.parametrize(("make", "field", "value", "_"), OPTIONS)
def test_another_value_is_refused_with_the_choices(make: Callable[..., Any], field: str, value: str, _: object) -> None:
    with pytest.raises(ConfigError) as raised:
        make(**{field: "most"})
    assert all(text in str(raised.value) for text in (field, "'most'", value))


def test_ids_given_by_value_need_their_filter() -> None:
    assert DatasetOptions(only="ids", ids=frozenset({1})).only is RowFilter.IDS  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        DatasetOptions(only="ids")  # type: ignore[arg-type]
