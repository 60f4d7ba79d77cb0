"""Measures `import mal_client.client` in new processes: the total of `python -X importtime`, and CPU time.

Reports the minimum of several runs, since other processes can only make an import slower.
"""

import statistics
import subprocess
import sys

from benchmarks.load.run import ROOT, environment
from benchmarks.timing import Table

MODULE = "mal_client.client"
RUNS = 9


def run(code: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """Runs code in a new interpreter."""
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment(), cwd=ROOT)


def modules_ms() -> dict[str, float]:
    """Returns the cumulative milliseconds of each imported module, from `-X importtime`."""
    times_ms = {}
    for line in run(f"import {MODULE}", "-X", "importtime").stderr.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and fields[1].strip().isdigit():
            times_ms[fields[2].strip()] = int(fields[1]) / 1000
    return times_ms


def cpu_ms() -> float:
    """Returns the CPU time of the import in milliseconds."""
    code = f"import time; began = time.process_time(); import {MODULE}; print(time.process_time() - began)"
    return 1000 * float(run(code).stdout)


def main() -> int:
    """Prints the table."""
    table = Table("client_import", f"import {MODULE}, {RUNS} new processes")
    runs = [modules_ms() for _ in range(RUNS)]
    best = min(runs, key=lambda times_ms: times_ms[MODULE])
    table.add("importtime, minimum", best[MODULE] / 1000, "s", most=0.25)
    table.add("importtime, median", statistics.median(times_ms[MODULE] for times_ms in runs) / 1000, "s")
    table.add("CPU time, minimum", min(cpu_ms() for _ in range(RUNS)) / 1000, "s")
    for name in ("numpy", "asyncio", "grpc", "google.protobuf.message", "mal_client.types"):
        if name in best:
            table.add(f"  of which {name}", best[name] / 1000, "s")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
