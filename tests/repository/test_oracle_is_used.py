"""Some test compares with every stored output of the published implementations."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.paths import ROOT
from tests.reference import fixture

TESTS = ROOT / "tests"
NO_NUMBERS = {"README.md"}


def files_named_by(tree: ast.AST, candidates: set[str]) -> set[str]:
    """Returns the `candidates` that a module names with one string, or with an f-string filled by its other strings.

    The filled part, as in `f"c_{name}.npz"`, must be a string of the module: a new file that fits the pattern does not
    count as used before the module names it. The name of a folder counts for all its files.
    """
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    filled = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    return {
        name
        for name in candidates
        if name in strings or name.partition("/")[0] in strings or any(_fits(node, name, strings) for node in filled)
    }


def _fits(node: ast.JoinedStr, name: str, strings: set[str]) -> bool:
    """Returns whether `name` is the f-string with a string of the module in each gap."""
    gap = "|".join(re.escape(string) for string in strings if string and string in name)
    parts = (re.escape(str(p.value)) if isinstance(p, ast.Constant) else f"(?:{gap})" for p in node.values)
    return re.fullmatch("".join(parts), name) is not None


def _modules() -> Iterator[ast.AST]:
    for path in sorted(TESTS.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != Path(__file__).name and "tests.reference" in text:
            yield ast.parse(text)


def arrays_named_by(tree: ast.AST, arrays: set[str]) -> set[str]:
    """Returns the `arrays` that a module names with a string, or with an f-string with anything in its gaps."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    forms = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and any(isinstance(part, ast.Constant) for part in node.values):
            parts = (re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".+" for p in node.values)
            forms.append(re.compile("".join(parts)))
    return {name for name in arrays if name in strings or any(form.fullmatch(name) for form in forms)}


def test_every_stored_array_is_read_where_its_file_is() -> None:
    folder = fixture("README.md").parent
    modules = list(_modules())
    left: list[str] = []
    for path in sorted(folder.rglob("*.npz")):
        name = str(path.relative_to(folder))
        with np.load(path) as stored:
            unread = set(stored.files)
        for tree in modules:
            if files_named_by(tree, {name}):
                unread -= arrays_named_by(tree, unread)
        left += [f"{name}: {array}" for array in sorted(unread)]
    assert left == []


def test_every_stored_output_is_compared_with() -> None:
    folder = fixture("README.md").parent
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    # A script that imports the module beside the outputs leaves its bytecode there.
    stored = {name for name in files if not name.startswith("__pycache__/")} - NO_NUMBERS
    used: set[str] = set()
    for tree in _modules():
        used |= files_named_by(tree, stored - used)
    assert sorted(stored - used) == []


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("fixture('c_ema.npz')", {"c_ema.npz"}),
        ("NAMES = ['blob']\nfixture(f'b_{kind}.npz')", {"b_blob.npz"}),
        ("NAMES = ['a', 'blob']\nfixture(f'b_{kind}_{n}.npz')", {"b_blob_a.npz"}),
        ("fixture('images')", {"images/1.png", "images/2.png"}),
        ("'see c_ema.npz'", set()),
        ("fixture(f'{name}.npz')", set()),
    ],
)
def test_a_file_is_used_where_a_module_names_it(source: str, used: set[str]) -> None:
    stored = {"c_ema.npz", "b_blob.npz", "b_ties.npz", "b_blob_a.npz", "images/1.png", "images/2.png"}
    assert files_named_by(ast.parse(source), stored) == used
