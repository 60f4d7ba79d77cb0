"""Measures variants of a computation in alternation, and peak memory; writes tables of results with their bounds."""

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


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Returns the median seconds of each variant over `rounds`, after one unmeasured call of each.

    Variants alternate, so that all are measured under the same load of the machine. The default clock is the CPU time
    of this process, which other processes affect little.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant()
    for _ in range(rounds):
        for name, variant in variants.items():
            begin = clock()
            variant()
            seconds[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_mib() -> float:
    """Returns the peak resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


class Table:
    """Table of results with bounds; prints each row at once and writes all rows as JSON at the end.

    Args:
        name: name of the benchmark.
        title: heading of the table.
        parser: further options of the benchmark; by default it has none.

    Attributes:
        arguments: values of the options.
    """

    def __init__(self, name: str, title: str, parser: argparse.ArgumentParser | None = None) -> None:
        parser = parser or argparse.ArgumentParser(description=title)
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
        self.arguments = parser.parse_args()
        self._json: Path | None = self.arguments.json
        self._name = name
        self._rows: list[dict[str, Any]] = []
        self._missed: list[str] = []
        self._title = title

    def add(self, name: str, value: float, unit: str, *, most: float | None = None, least: float | None = None) -> None:
        """Adds a row with an optional upper bound `most` and lower bound `least`."""
        if not self._rows:
            print(self._title)
        bound = "" if most is None else f"at most {most:g}"
        bound += "" if least is None else f"at least {least:g}"
        is_missed = (most is not None and value > most) or (least is not None and value < least)
        self._missed += [name] if is_missed else []
        self._rows.append({"name": name, "value": value, "unit": unit, "bound": bound or None})
        print(f"  {name:<58}{value:>10.4g} {unit:<10}{bound}{'   MISSED' if is_missed else ''}", flush=True)

    def finish(self) -> int:
        """Writes the JSON file and returns the exit code: 1 if a bound was missed."""
        if self._json is not None:
            report = {
                "benchmark": self._name,
                "date": date.today().isoformat(),
                "machine": machine(),
                "rows": self._rows,
            }
            self._json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        for name in self._missed:
            print(f"missed: {name}")
        return 1 if self._missed else 0


def machine() -> dict[str, Any]:
    """Describes the machine: CPU, cores, load and Python version."""
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
