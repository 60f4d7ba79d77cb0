"""What the benchmarks share: forms measured in turn, medians, ratios, a table, and a JSON file of it."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any


def in_turn(
    forms: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each form, measured one after the other `rounds` times, so that all see the same machine.

    The clock counts this process's CPU time by default: other work on the machine then moves it little.
    """
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            begin = clock()
            form()
            seconds[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Table:
    """Rows of (what, figure, unit, must), printed as they come and written as JSON at the end.

    Args:
        name: of the benchmark.
        title: said above the rows.
    """

    def __init__(self, name: str, title: str) -> None:
        parser = argparse.ArgumentParser(description=title)
        parser.add_argument("--json", type=Path, help="a file to write the figures to")
        self._json: Path | None = parser.parse_args().json
        self._name = name
        self._rows: list[dict[str, Any]] = []
        self._missed: list[str] = []
        print(title)

    def add(
        self, what: str, figure: float, unit: str, *, most: float | None = None, least: float | None = None
    ) -> None:
        """One row; `most` and `least` are what is promised of it."""
        promised = "" if most is None else f"at most {most:g}"
        promised += "" if least is None else f"at least {least:g}"
        missed = (most is not None and figure > most) or (least is not None and figure < least)
        self._missed += [what] if missed else []
        self._rows.append({"what": what, "figure": figure, "unit": unit, "promised": promised or None})
        print(f"  {what:<58}{figure:>10.4g} {unit:<10}{promised}{'   MISSED' if missed else ''}", flush=True)

    def finish(self) -> int:
        """Writes the JSON file; the exit code: 1 when a promise was missed."""
        if self._json is not None:
            whole = {
                "benchmark": self._name,
                "date": date.today().isoformat(),
                "machine": machine(),
                "rows": self._rows,
            }
            self._json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        for what in self._missed:
            print(f"missed: {what}")
        return 1 if self._missed else 0


def machine() -> dict[str, Any]:
    """Where it was measured."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
