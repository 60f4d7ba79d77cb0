"""Measures labeling, training and serving on one accelerator within a time limit, and writes the tables.

    python -m benchmarks.accelerator --device cuda --out DIR           every part, about eight minutes
    python -m benchmarks.accelerator --device cpu --out DIR --quick    the same parts with small sizes: a dry run

Each part runs in a process of its own and appends its rows to DIR/rows.jsonl at once, so that an interruption or a lost
device keeps what was measured. A part that fails is listed with its error; the others go on. DIR/report.md has the
tables. Parts that would begin after the limit are listed as not run, and the exit code is 1.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.accelerator.parts import PARTS
from benchmarks.load.run import ROOT, environment
from benchmarks.timing import machine

LIMIT_S = 480.0
PART_LIMIT_S = 150.0


def main() -> int:
    """Runs the parts, then writes the report."""
    parser = argparse.ArgumentParser(description="Measure one accelerator.")
    parser.add_argument("--device", default="cuda", help="torch device (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of rows and report")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help="time limit (default: %(default)g)")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows_file: Path = arguments.out / "rows.jsonl"
    rows_file.unlink(missing_ok=True)
    until, failures = time.monotonic() + arguments.limit, dict[str, str]()
    for part in arguments.part or PARTS:
        left = min(PART_LIMIT_S, until - time.monotonic())
        failure = (
            _run(part, arguments.device, rows_file, quick=arguments.quick, limit_s=left) if left > 0 else "not run"
        )
        failures.update({part: failure} if failure else {})
        print(f"{part}: {failure or 'measured'}", flush=True)
    report = arguments.out / "report.md"
    report.write_text(_report(rows_file, failures), encoding="utf-8")
    print(report.read_text(encoding="utf-8"))
    return 1 if failures else 0


def _run(part: str, device: str, rows_file: Path, *, quick: bool, limit_s: float) -> str:
    """Runs one part; returns "" or the reason why it is incomplete."""
    command = [sys.executable, "-m", "benchmarks.accelerator.parts", part, "--device", device, "--rows", str(rows_file)]
    env = environment()
    del env["OMP_NUM_THREADS"]  # as in production
    with subprocess.Popen(
        [*command, *(["--quick"] if quick else [])],
        cwd=ROOT,
        env=env,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=limit_s)
        except BaseException as error:
            # With the server and the clients that it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"stopped after {limit_s:.0f} s"
    return "" if process.returncode == 0 else (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]


def _report(rows_file: Path, failures: dict[str, str]) -> str:
    """Returns the tables of all parts as Markdown."""
    rows = (
        [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()] if rows_file.exists() else []
    )
    lines = [f"Machine: {json.dumps(machine())}", ""]
    for part in dict.fromkeys(row["part"] for row in rows):
        lines += [f"## {part}", "", "| what | value | unit |", "|---|---:|---|"]
        lines += [_line(row) for row in rows if row["part"] == part]
        lines.append("")
    return "\n".join([*lines, *(f"- {part}: {reason}" for part, reason in failures.items()), ""])


def _line(row: dict[str, Any]) -> str:
    value = row["value"]
    return f"| {row['name']} | {value if isinstance(value, str) else f'{value:.4g}'} | {row['unit']} |"


if __name__ == "__main__":
    raise SystemExit(main())
