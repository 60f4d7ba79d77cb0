"""Promises that tests keep, and the file with the numbers that each test measured.

A test declares its promise with `@pytest.mark.promise(TOPIC, TEXT)` and passes its numbers to the fixture `record`.
With MAL_PROMISES=docs/promises.jsonl, each test that passes replaces its row in that file.
"""

import ast
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.paths import ROOT

FILE = ROOT / "docs" / "promises.jsonl"
TOPICS = (
    *("checkpoints", "images", "requests", "access", "memory", "load", "faults", "evaluation"),
    *("files", "jobs", "training", "deployment"),
)
"""Sections of the page, in its order."""


@dataclass(frozen=True)
class Row:
    """The measurements of one test, or of one case of a parametrized test.

    Attributes:
        topic: section of the page; one of `TOPICS`.
        promise: one sentence, as the test declares it.
        test: path::function.
        case: id of the parameters; empty without.
        form: "short" or "full" (MAL_CHAOS=full).
        numbers: name -> text of the value.
        date: ISO date of the run.
        machine: cores, memory, Python.
    """

    topic: str
    promise: str
    test: str
    case: str
    form: str
    numbers: Mapping[str, str]
    date: str
    machine: str

    @property
    def key(self) -> tuple[int, str, str]:
        """Place on the page, and identity: an equal key replaces the row."""
        return TOPICS.index(self.topic), self.promise, self.case


def new_row(topic: str, promise: str, node: str, numbers: Mapping[str, object]) -> Row:
    """Returns the row of a test that passed now on this machine. `node` is path::function or path::function[case]."""
    test, _, case = node.partition("[")
    form = "full" if os.environ.get("MAL_CHAOS") == "full" else "short"
    texts = {name: shown(value) for name, value in numbers.items()}
    return Row(topic, promise, test, case.removesuffix("]"), form, texts, f"{datetime.now(UTC):%Y-%m-%d}", machine())


def shown(value: object) -> str:
    """Returns a value as text, floats with four digits."""
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name}: {shown(part)}" for name, part in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> str:
    """Returns the cores, memory and Python of this machine."""
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{os.cpu_count()} cores, {gib:.0f} GiB, Python {sys.version_info.major}.{sys.version_info.minor}"


def load(path: Path = FILE) -> list[Row]:
    """Returns the rows of a file in the order of the page; none if it does not exist."""
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((Row(**json.loads(line)) for line in lines), key=lambda row: row.key)


def save(rows: Iterable[Row], path: Path) -> None:
    """Writes rows in the order of the page, one a line."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in sorted(rows, key=lambda row: row.key))
    path.write_text("".join(lines))


def keep(row: Row, path: Path) -> None:
    """Adds a row to a file in place of its predecessor. A short form does not replace a full one."""
    rows = {old.key: old for old in load(path)}
    old = rows.get(row.key)
    if old is None or (old.form, row.form) != ("full", "short"):
        rows[row.key] = row
        save(rows.values(), path)


def declared(folder: Path = ROOT / "tests") -> Iterator[tuple[str, str, str]]:
    """Yields topic, promise and path::function of each test that declares a promise."""
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for call in node.decorator_list:
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.promise":
                        topic, promise = (ast.literal_eval(argument) for argument in call.args)
                        yield topic, promise, f"{path.relative_to(folder.parent).as_posix()}::{node.name}"
