"""The page of all fields is current, and no field is an empty promise."""

import ast
import typing
from pathlib import Path

import pytest

from mal_train.config import Spec
from mal_train.strictyaml import field_paths
from mal_train.tasks.spec_table import fields_of, page

ROOT = Path(__file__).parents[1]
ONE_MEANING = {"strategy"}
"""Read nowhere, for all its values mean the same where there is one process."""


def attributes_read() -> set[str]:
    """Every attribute name that the training side's source reads."""
    return {
        node.attr
        for path in (ROOT / "mal_train").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_the_page_is_current() -> None:
    committed = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    assert committed == page(), "run: python -m mal_train.tasks.spec_table > docs/spec.md"


def test_every_field_has_a_row_with_its_bounds() -> None:
    assert [name for name, _ in fields_of(Spec)] == list(field_paths(Spec))
    rows = {line.split("`")[1]: line for line in page().splitlines() if line.startswith("| `")}
    assert "| `10` | ≥ 1 |" in rows["train.num_epochs"]
    assert "≥ 0, ≤ 4" in rows["train.margin_rate"]
    assert "`none` · `tao`" in rows["compat"]
    assert "> 0, < 1" in rows["train.mask_thres"]


@pytest.mark.parametrize("name", [name for name, _ in fields_of(Spec)])
def test_every_field_is_read_somewhere(name: str) -> None:
    field = dict(fields_of(Spec))[name]
    only = typing.get_origin(field.annotation) is typing.Literal and len(typing.get_args(field.annotation)) == 1
    assert only or name in ONE_MEANING or name.rpartition(".")[2] in attributes_read()
