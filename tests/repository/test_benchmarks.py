"""`make bench`: one benchmark does not affect the outcome of the others."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import growth

WRITES_ROWS = """
import json, sys
print("a table")
open(sys.argv[1], "w").write(json.dumps({"rows": [{"name": "speed", "value": 2.0}]}))
sys.exit(1)
"""
WAITS_WITH_A_CHILD = """
import subprocess, sys
print("started", flush=True)
subprocess.run([sys.executable, "-c", "import signal; signal.pause()"])
"""


def script(text: str) -> bench.Outcome:
    return bench.run_one("example", 120.0, lambda name, rows: [sys.executable, "-c", text, str(rows)])


def test_a_missed_bound_is_reported_with_rows_and_output() -> None:
    outcome = script(WRITES_ROWS)
    assert (outcome.ended, outcome.rows) == ("missed a bound", [{"name": "speed", "value": 2.0}])
    assert outcome.printed == ["a table"]


def test_a_failure_is_not_reported_as_a_missed_bound() -> None:
    outcome = script("raise ValueError('no such image')")
    assert outcome.ended == "failed with code 1"
    assert outcome.printed[-1] == "ValueError: no such image"


def test_a_timeout_kills_the_benchmark_and_its_children() -> None:
    command = [sys.executable, "-c", WAITS_WITH_A_CHILD]
    # The output ends only when the child, which holds the same pipe, has exited too.
    assert bench.run_one("example", 0.5, lambda name, rows: command).ended == "timed out"


def test_an_interrupt_kills_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "print", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        script(WAITS_WITH_A_CHILD)


def test_an_interrupt_is_raised_if_the_benchmark_has_already_exited(monkeypatch: pytest.MonkeyPatch) -> None:
    kill = os.killpg

    def kill_too_late(group: int, sign: int) -> None:
        kill(group, sign)
        raise ProcessLookupError

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "killpg", kill_too_late)
    monkeypatch.setattr(bench, "print", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        script(WAITS_WITH_A_CHILD)


@pytest.mark.parametrize("written", [b'{"rows": [{"na', b"\xff", b"[]", b"{}", b""])
def test_unreadable_rows_keep_the_outcome_and_the_output(written: bytes) -> None:
    outcome = script(f"import sys; print('a table'); open(sys.argv[1], 'wb').write({written!r}); sys.exit(1)")
    assert (outcome.ended, outcome.rows, outcome.printed) == ("missed a bound", [], ["a table"])


def test_output_that_is_not_utf8_is_replaced() -> None:
    outcome = script("import sys; sys.stdout.buffer.write(bytes([65, 255, 10]) + b'B')")
    assert (outcome.ended, outcome.printed) == ("ok", ["A\ufffd", "B"])


def test_all_benchmarks_run_and_are_reported_after_a_missed_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(name: str, rows: Path) -> list[str]:
        return [sys.executable, "-c", f"print('of {name}'); raise SystemExit({int(name == 'bfloat16')})"]

    monkeypatch.setattr(bench, "command_of", command)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--json", str(tmp_path / "bench.json")])
    assert bench.main() == 1
    outcomes = json.loads((tmp_path / "bench.json").read_text())["benchmarks"]
    assert [row["name"] for row in outcomes] == bench.names()
    ended = {row["name"]: row["ended"] for row in outcomes}
    assert ended == dict.fromkeys(bench.names(), "ok") | {"bfloat16": "missed a bound"}
    assert all(row["printed"] == [f"of {row['name']}"] for row in outcomes)
    assert re.search(r"^bfloat16 +\d+  missed a bound$", capsys.readouterr().out, re.MULTILINE)


def test_a_point_of_growth_is_all_that_its_process_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "one_image", lambda width: growth.Measurement(width, 0.5, 2.0))
    monkeypatch.setattr(sys, "argv", ["growth", "--point", "64"])
    assert growth.main() == 0
    assert json.loads(capsys.readouterr().out) == [64, 0.5, 2.0]


def test_every_benchmark_can_be_run_by_name() -> None:
    for name in bench.names():
        text = (bench.FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert "def main() ->" in text, name
        assert ("--json" in bench.command_of(name, Path("rows"))) == ("Table(" in text), name
