"""`make bench`: every benchmark of this folder in turn, each in a process of its own, then a table of how they ended.

One that misses a figure, breaks or takes too long hides nothing of the rest. The JSON file holds, for each, how it
ended, its rows where it writes some (`timing.Table`), and every line that it printed.

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
SHARED = {"__main__", "subjects", "timing"}
LIMIT_S = 900.0
"""Far above what any takes on two quiet cores: most a minute or a few, `serving` about five."""


@dataclass(frozen=True)
class Outcome:
    """How one ended: "ok", "missed a figure", "took too long" or "failed with code …", and all that it told."""

    name: str
    ended: str
    seconds: float
    rows: list[dict[str, Any]]
    printed: list[str]


def names() -> list[str]:
    """Of all benchmarks, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)


def command_of(name: str, rows: Path) -> list[str]:
    """What runs one; those with a `Table` write its rows into a file."""
    writes = "import Table" in (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    return [sys.executable, "-m", f"benchmarks.{name}", *(["--json", str(rows)] if writes else [])]


def run_one(name: str, limit_s: float, command: Callable[[str, Path], Sequence[str]] | None = None) -> Outcome:
    """Runs one to its end, or ends it with all that it started; what it prints is shown as it comes."""
    began, printed, late = time.monotonic(), list[str](), threading.Event()
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

            def end() -> None:
                late.set()
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself just now
                    os.killpg(process.pid, signal.SIGKILL)

            watch = threading.Timer(limit_s, end)
            watch.start()
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    printed.append(line.rstrip("\n"))
                code = process.wait()
            except BaseException:
                # Whoever interrupts this process means the benchmark as well, which is in a session of its own.
                end()
                raise
            finally:
                watch.cancel()
        found = _rows_in(rows)
    # A traceback ends with the code of a missed figure, too.
    broke = any(line.startswith("Traceback (most recent call last)") for line in printed)
    ends = {0: "ok"} if broke else {0: "ok", 1: "missed a figure"}
    ended = "took too long" if late.is_set() else ends.get(code, f"failed with code {code}")
    return Outcome(name, ended, time.monotonic() - began, found, printed)


def _rows_in(path: Path) -> list[dict[str, Any]]:
    """What a benchmark wrote: none where it was ended in the middle of writing, or before."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_bytes())["rows"]
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError) as error:
        print(f"the rows that it wrote cannot be read: {error}", flush=True)
        return []
    return rows


def main() -> int:
    """Runs them; 1 where any did not end well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Runs the benchmarks of this folder.")
    parser.add_argument("names", nargs="*", help="of benchmarks (default: all)", metavar="NAME")
    parser.add_argument("--json", type=Path, help="a file to write everything to")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for each (default %(default)g)")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(names())):
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(names())}")
    outcomes: list[Outcome] = []
    for name in arguments.names or names():
        print(f"== {name}", flush=True)
        outcomes.append(run_one(name, arguments.limit))
        if arguments.json is not None:
            # After each, so that a run that is cut off has told what it found.
            told = {"machine": machine(), "benchmarks": [asdict(outcome) for outcome in outcomes]}
            arguments.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(f"\n{'benchmark':<20}{'seconds':>8}  ended")
    for outcome in outcomes:
        print(f"{outcome.name:<20}{outcome.seconds:>8.0f}  {outcome.ended}")
    return int(any(outcome.ended != "ok" for outcome in outcomes))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    raise SystemExit(main())
