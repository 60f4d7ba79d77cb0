"""docs/reliability.md lists every promise that a test declares, with the test that keeps it, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.repository.promises import TOPICS, Row, declared, keep, load, new_row
from tests.repository.reliability_page import page

REMEDY = "record the test (MAL_PROMISES=docs/promises.jsonl pytest TEST), then generate docs/reliability.md"
ROW = Row("load", "Nothing is lost", "tests/test_a.py::test_b", "", "short", {"lost": "0"}, "2026-01-01", "2 cores")


def test_the_page_is_generated_from_the_recorded_rows() -> None:
    assert (ROOT / "docs" / "reliability.md").read_text() == page(load()), REMEDY


def test_the_recorded_promises_are_those_that_tests_declare() -> None:
    recorded = {(row.topic, row.promise, row.test) for row in load()}
    assert recorded == set(declared()), REMEDY


def test_each_promise_has_one_test_and_a_known_topic() -> None:
    promises = list(declared())
    assert {topic for topic, _, _ in promises} <= set(TOPICS)
    assert len({promise for _, promise, _ in promises}) == len(promises)


def test_a_newer_run_replaces_the_row_but_a_short_one_no_full_one(tmp_path: Path) -> None:
    path = tmp_path / "promises.jsonl"
    full = replace(ROW, form="full", numbers={"lost": "1"})
    other_case = replace(ROW, case="nginx")
    for row in (ROW, other_case, full, replace(ROW, date="2026-02-02")):
        keep(row, path)
    assert load(path) == [full, other_case]


def test_a_row_is_split_into_test_and_case_and_shows_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAL_CHAOS", "full")
    row = new_row("load", "Nothing is lost", "tests/a.py::test_b[x-1]", {"p99_ms": 12.3456, "codes": {"OK": 2}})
    assert (row.test, row.case, row.form) == ("tests/a.py::test_b", "x-1", "full")
    assert "| x-1: p99 ms 12.35, codes (OK: 2) |" in page([row])


def test_a_declaration_is_found_with_its_test(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    text = 'import pytest\n\n\n@pytest.mark.promise("load", "Nothing " "is lost")\ndef test_b() -> None: ...\n'
    (tmp_path / "tests" / "test_a.py").write_text(text)
    assert list(declared(tmp_path / "tests")) == [("load", "Nothing is lost", "tests/test_a.py::test_b")]
