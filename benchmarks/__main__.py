"""Runs the benchmarks of this folder (`make bench`), each in its own process, and prints a summary table.

A benchmark that misses a bound, fails or times out does not stop the others. For each benchmark, the JSON file contains
the outcome, the rows of its table (`timing.Table`) and every line that it printed.

    python -m benchmarks [NAME …] [--json FILE] [--limit SECONDS]
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import machine

FOLDER = Path(__file__).parent
SHARED = {"__main__", "inputs", "timing"}
LIMIT_S = 900.0
"""Timeout of one benchmark. On two idle cores most take one to three minutes, `serving` about five."""


@dataclass(frozen=True)
class Outcome:
    """Result of one benchmark; `ended` is "ok", "missed a bound", "timed out" or "failed with code …"."""

    name: str
    ended: str
    seconds: float
    rows: list[dict[str, Any]]
    printed: list[str]


def names() -> list[str]:
    """Returns the names of all benchmarks in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)


def command_of(name: str, rows: Path) -> list[str]:
    """Returns the command of a benchmark; one with a `Table` writes its rows to the file `rows`."""
    has_table = "import Table" in (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    return [sys.executable, "-m", f"benchmarks.{name}", *(["--json", str(rows)] if has_table else [])]


def run_one(name: str, limit_s: float, command: Callable[[str, Path], Sequence[str]] | None = None) -> Outcome:
    """Runs a benchmark and prints its output; kills its process group at the timeout or an interrupt."""
    began, printed, timed_out = time.monotonic(), list[str](), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        with subprocess.Popen(
            (command or command_of)(name, rows),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as process:

            def kill() -> None:
                timed_out.set()
                with contextlib.suppress(ProcessLookupError):  # it has just exited
                    os.killpg(process.pid, signal.SIGKILL)

            timer = threading.Timer(limit_s, kill)
            timer.start()
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    printed.append(line.rstrip("\n"))
                code = process.wait()
            except BaseException:
                # The benchmark has its own session, so an interrupt of this process does not reach it.
                kill()
                raise
            finally:
                timer.cancel()
        table_rows = _read_rows(rows)
    # A traceback exits with the same code as a missed bound.
    has_traceback = any(line.startswith("Traceback (most recent call last)") for line in printed)
    outcomes = {0: "ok"} if has_traceback else {0: "ok", 1: "missed a bound"}
    ended = "timed out" if timed_out.is_set() else outcomes.get(code, f"failed with code {code}")
    return Outcome(name, ended, time.monotonic() - began, table_rows, printed)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a benchmark; none if it was killed before or during writing."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_bytes())["rows"]
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError) as error:
        print(f"{path.name}: cannot be read ({error}); the outcome has no rows", flush=True)
        return []
    return rows


def main() -> int:
    """Runs the benchmarks; returns 1 if one of them did not end with "ok"."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run benchmarks, each in its own process, and print a summary. Exit code 1 if one misses a bound, "
        "fails or times out.",
        epilog=f"benchmarks: {', '.join(names())}",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmark to run (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write outcomes, rows and output to FILE")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT_S,
        metavar="SECONDS",
        help="timeout of each benchmark (default: %(default)g)",
    )
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(names())):
        parser.error(f"{unknown[0]}: unknown benchmark; choose from {', '.join(names())}")
    outcomes: list[Outcome] = []
    for name in arguments.names or names():
        print(f"== {name}", flush=True)
        outcomes.append(run_one(name, arguments.limit))
        if arguments.json is not None:
            # After each, so that an interrupted run keeps the finished outcomes.
            report = {"machine": machine(), "benchmarks": [asdict(outcome) for outcome in outcomes]}
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{'benchmark':<20}{'seconds':>8}  ended")
    for outcome in outcomes:
        print(f"{outcome.name:<20}{outcome.seconds:>8.0f}  {outcome.ended}")
    return int(any(outcome.ended != "ok" for outcome in outcomes))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    raise SystemExit(main())
