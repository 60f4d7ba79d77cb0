"""`make bench`: what one benchmark does hides nothing of the others."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as bench

WRITES_ROWS = """
import json, sys
print("a table")
open(sys.argv[1], "w").write(json.dumps({"rows": [{"what": "speed", "figure": 2.0}]}))
sys.exit(1)
"""
WAITS_WITH_A_CHILD = """
import subprocess, sys
print("began", flush=True)
subprocess.run([sys.executable, "-c", "import signal; signal.pause()"])
"""


def script(text: str) -> bench.Outcome:
    return bench.run_one("mine", 120.0, lambda name, rows: [sys.executable, "-c", text, str(rows)])


def test_a_missed_figure_is_told_with_its_rows_and_lines() -> None:
    outcome = script(WRITES_ROWS)
    assert (outcome.ended, outcome.rows) == ("missed a figure", [{"what": "speed", "figure": 2.0}])
    assert outcome.printed == ["a table"]


def test_one_that_breaks_is_not_taken_for_a_missed_figure() -> None:
    outcome = script("raise ValueError('no such picture')")
    assert outcome.ended == "failed with code 1"
    assert outcome.printed[-1] == "ValueError: no such picture"


def test_one_that_does_not_end_is_ended_with_what_it_started() -> None:
    command = [sys.executable, "-c", WAITS_WITH_A_CHILD]
    # Its lines end only when the child, which holds the same pipe, has gone as well.
    assert bench.run_one("mine", 0.5, lambda name, rows: command).ended == "took too long"


def test_an_interrupt_ends_the_benchmark_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "print", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        script(WAITS_WITH_A_CHILD)


def test_an_interrupt_is_not_hidden_where_the_benchmark_has_ended_already(monkeypatch: pytest.MonkeyPatch) -> None:
    kill = os.killpg

    def too_late(group: int, sign: int) -> None:
        kill(group, sign)
        raise ProcessLookupError

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "killpg", too_late)
    monkeypatch.setattr(bench, "print", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        script(WAITS_WITH_A_CHILD)


@pytest.mark.parametrize("written", [b'{"rows": [{"wh', b"\xff", b"[]", b"{}", b""])
def test_rows_that_cannot_be_read_leave_how_it_ended_and_its_lines(written: bytes) -> None:
    outcome = script(f"import sys; print('a table'); open(sys.argv[1], 'wb').write({written!r}); sys.exit(1)")
    assert (outcome.ended, outcome.rows, outcome.printed) == ("missed a figure", [], ["a table"])


def test_a_byte_that_is_no_text_stops_nothing() -> None:
    outcome = script("import sys; sys.stdout.buffer.write(bytes([65, 255, 10]) + b'B')")
    assert (outcome.ended, outcome.printed) == ("ok", ["A\ufffd", "B"])


def test_all_are_run_and_told_though_the_first_misses_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(name: str, rows: Path) -> list[str]:
        return [sys.executable, "-c", f"print('of {name}'); raise SystemExit({int(name == 'bfloat16')})"]

    monkeypatch.setattr(bench, "command_of", command)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--json", str(tmp_path / "bench.json")])
    assert bench.main() == 1
    told = json.loads((tmp_path / "bench.json").read_text())["benchmarks"]
    assert [row["name"] for row in told] == bench.names()
    assert [row["ended"] for row in told] == ["missed a figure"] + ["ok"] * (len(told) - 1)
    assert all(row["printed"] == [f"of {row['name']}"] for row in told)
    assert re.search(r"^bfloat16 +\d+  missed a figure$", capsys.readouterr().out, re.MULTILINE)


def test_every_benchmark_can_be_run_by_its_name() -> None:
    for name in bench.names():
        text = (bench.FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert "def main() ->" in text, name
        assert ("--json" in bench.command_of(name, Path("rows"))) == ("Table(" in text), name
