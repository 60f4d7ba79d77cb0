"""What `import mal_client.client` takes: the total of `python -X importtime`, and CPU time, in new processes.

The least of several: an import reads files and runs once, so other work on the machine only ever adds to it.
"""

import statistics
import subprocess
import sys

from benchmarks.load.run import ROOT, environment
from benchmarks.timing import Table

MODULE = "mal_client.client"
RUNS = 9


def run(code: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """A new interpreter."""
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment(), cwd=ROOT)


def modules_ms() -> dict[str, float]:
    """Milliseconds of each imported module with all that it imports, as `-X importtime` tells them."""
    found = {}
    for line in run(f"import {MODULE}", "-X", "importtime").stderr.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and fields[1].strip().isdigit():
            found[fields[2].strip()] = int(fields[1]) / 1000
    return found


def cpu_ms() -> float:
    """CPU time of the import."""
    code = f"import time; began = time.process_time(); import {MODULE}; print(time.process_time() - began)"
    return 1000 * float(run(code).stdout)


def main() -> int:
    """Prints the table."""
    table = Table("client_import", f"import {MODULE}, {RUNS} new processes")
    runs = [modules_ms() for _ in range(RUNS)]
    best = min(runs, key=lambda one: one[MODULE])
    table.add("by importtime, least", best[MODULE] / 1000, "s", most=0.5)
    table.add("by importtime, median", statistics.median(one[MODULE] for one in runs) / 1000, "s")
    table.add("CPU time, least", min(cpu_ms() for _ in range(RUNS)) / 1000, "s")
    for name in ("numpy", "asyncio", "grpc", "google.protobuf.message", "mal_client.types"):
        if name in best:
            table.add(f"  of it {name}", best[name] / 1000, "s")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
