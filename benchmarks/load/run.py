"""Loads a server from several client processes and prints statistics; like `ghz`, but checks every result.

    python -m benchmarks.load.run --server 127.0.0.1:50051 --clients 32 --boxes 8 --seconds 30       closed loop
    python -m benchmarks.load.run --server 127.0.0.1:50051 --rate 60 --boxes 8                       open loop
    python -m benchmarks.load.run --batch-ms 5 --clients 64       a fake server, checks exact masks

Images are JPEGs of synthetic scenes. Checks instance ids, sizes and request ids of all results, and with the fake
server every mask. Exits with 1 if a result is wrong or missing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.load.client import Plan
from benchmarks.load.images import LoadImage, draw_images, save_images, with_expected_masks
from benchmarks.load.summary import ClientReport, Sample, Summary, summarize, table

ROOT = Path(__file__).resolve().parents[2]
START_S = 300.0
START_DELAY_S = 0.2
"""Delay between the last client becoming ready and the common start."""


def environment() -> dict[str, str]:
    """Returns the environment of child processes: paths of the project, and one thread for torch."""
    paths = [str(ROOT), str(ROOT / "protos"), str(ROOT / "clients")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass
class Server:
    """Server process under load."""

    process: "subprocess.Popen[bytes]"
    address: str
    report_file: Path

    def rss_mib(self) -> float:
        """Returns the resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def cpu_s(self) -> float:
        """Returns the CPU seconds used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def reset_stats(self) -> None:
        """Resets the statistics of the event loop."""
        self.process.send_signal(signal.SIGUSR1)

    def stop(self, timeout_s: float = 60) -> dict[str, Any]:
        """Stops the server with SIGTERM; returns its report."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout_s)
        if code:
            raise RuntimeError(f"the server exited with code {code}")
        report: dict[str, Any] = json.loads(self.report_file.read_text())
        return report


@contextmanager
def fake_server(folder: Path, *arguments: str, name: str = "server") -> Iterator[Server]:
    """Runs a fake server; kills it at the end if it is still running."""
    port_file, report_file = folder / f"{name}.port", folder / f"{name}.report"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.load.fake_server", "--port-file", str(port_file)]
    process = subprocess.Popen(
        [*command, "--report", str(report_file), *arguments], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        yield Server(process, wait_for_address(process, port_file), report_file)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_for_address(process: "subprocess.Popen[bytes]", port_file: Path) -> str:
    """Waits for a server to become ready; returns its address."""
    until = time.monotonic() + START_S
    while not port_file.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with code {process.returncode} before it was ready")
        if time.monotonic() > until:
            raise RuntimeError(f"the server was not ready after {START_S:g} s")
        time.sleep(0.02)
    return port_file.read_text().strip()


@dataclass
class Load:
    """Running client processes."""

    processes: "list[subprocess.Popen[bytes]]"
    report_files: list[Path]
    start_at: float

    def wait(self, timeout_s: float) -> list[ClientReport]:
        """Waits for the processes; returns their reports in the order of the plans."""
        until = time.monotonic() + timeout_s
        for process in self.processes:
            code = process.wait(max(until - time.monotonic(), 0.1))
            if code:
                raise RuntimeError(f"a client process exited with code {code}")
        return [ClientReport.load(path) for path in self.report_files]


@contextmanager
def run_clients(plans: Sequence[Plan], image_folder: Path) -> Iterator[Load]:
    """Runs one process per plan; all start to call at `Load.start_at`, after all have connected."""
    processes, reports = [], []
    with tempfile.TemporaryDirectory() as name:
        start = Path(name, "start")
        try:
            for number, plan in enumerate(plans):
                plan_file, report = Path(name, f"{number}.plan"), Path(name, f"{number}.json")
                plan_file.write_text(json.dumps(asdict(replace(plan, number=number, start_file=str(start)))))
                files = [str(path) for path in (plan_file, image_folder, report)]
                command = [sys.executable, "-m", "benchmarks.load.client", *files]
                processes.append(subprocess.Popen(command, env=environment(), cwd=ROOT))
                reports.append(report)
            wait_until_ready(processes, reports)
            start_at = time.monotonic() + START_DELAY_S
            part = start.with_suffix(".part")
            part.write_text(str(start_at))
            part.replace(start)
            yield Load(processes, reports, start_at)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def wait_until_ready(processes: "Sequence[subprocess.Popen[bytes]]", reports: Sequence[Path]) -> None:
    """Waits until every client process has connected."""
    until = time.monotonic() + START_S
    for process, report in zip(processes, reports, strict=True):
        while not report.with_suffix(".ready").exists():
            if process.poll() is not None:
                raise RuntimeError(f"a client process exited with code {process.returncode} before it was ready")
            if time.monotonic() > until:
                raise RuntimeError(f"the clients were not ready after {START_S:g} s")
            time.sleep(0.01)


def all_samples(reports: Sequence[ClientReport]) -> list[Sample]:
    """Returns the samples of all processes."""
    return [sample for report in reports for sample in report.samples]


def split_plan(plan: Plan, processes: int) -> list[Plan]:
    """Splits the clients, calls and rate of a plan over several processes."""
    counts = [plan.clients // processes + (n < plan.clients % processes) for n in range(processes)]
    return [
        replace(
            plan, clients=count, rate=plan.rate * count / plan.clients, calls=-(-plan.calls * count // plan.clients)
        )
        for count in counts
        if count
    ]


def fake_server_images(folder: Path, count: int = 16, boxes: int = 8, seed: int = 1) -> list[LoadImage]:
    """Draws and saves images with the masks that the fake server must return."""
    from benchmarks.load.fake_server import expected_masks  # noqa: PLC0415  imports torch, which clients do not need

    images = with_expected_masks(draw_images(count, boxes, seed), expected_masks)
    save_images(images, folder)
    return images


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description="Load a server and check every result.")
    parser.add_argument("--server", metavar="HOST:PORT", help="server to load (default: a fake server)")
    parser.add_argument(
        "--batch-ms", type=float, default=5.0, help="milliseconds per batch of the fake server (default: %(default)g)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="setting of the fake server")
    parser.add_argument("--clients", type=int, default=32, help="interactive clients (default: %(default)d)")
    parser.add_argument("--streams", type=int, default=0, help="additional bulk streams (default: %(default)d)")
    parser.add_argument("--rate", type=float, default=0.0, help="calls/s of an open loop; 0: closed loop (default)")
    parser.add_argument("--boxes", type=int, default=8, help="boxes per call, at most 8 (default: %(default)d)")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration (default: %(default)g)")
    parser.add_argument(
        "--deadline", type=float, default=0.0, metavar="S", help="deadline of a call; 0: none (default)"
    )
    parser.add_argument("--retries", action="store_true", help="retry refused calls until they succeed")
    parser.add_argument("--processes", type=int, default=2, help="client processes (default: %(default)d)")
    parser.add_argument("--seed", type=int, default=1, help="random seed (default: %(default)d)")
    parser.add_argument("--token", default="", metavar="env:NAME", help="bearer token of the calls")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def measure(args: argparse.Namespace, folder: Path, address: str) -> dict[str, Summary]:
    """Runs the load; returns a summary for each group of clients."""
    token = os.environ[args.token.removeprefix("env:")] if args.token else ""
    plan = Plan(
        address,
        clients=args.clients,
        seconds=args.seconds,
        rate=args.rate,
        boxes=args.boxes,
        deadline_s=args.deadline,
        retries=args.retries,
        seed=args.seed,
        token=token,
    )
    plans = split_plan(plan, args.processes) if args.clients else []
    if args.streams:
        plans.append(replace(plan, clients=args.streams, rate=0.0, group="batch", streams=True))
    with run_clients(plans, folder) as load:
        reports = load.wait(args.seconds + 300)
    begin, samples = load.start_at, all_samples(reports)
    print(f"CPU time of the clients: {sum(report.cpu_s for report in reports):.1f} s", file=sys.stderr)
    groups = sorted({plan.group for plan in plans})
    return {group: summarize(samples, begin, begin + args.seconds, group) for group in groups}


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.server:
            save_images(draw_images(16, 8, args.seed), folder)
            summaries = measure(args, folder, args.server)
        else:
            fake_server_images(folder, seed=args.seed)
            with fake_server(folder, "--batch-ms", str(args.batch_ms), *args.set) as server:
                summaries = measure(args, folder, server.address)
                print(json.dumps(server.stop()), file=sys.stderr)
    if args.json:
        print(json.dumps({group: asdict(summary) for group, summary in summaries.items()}))
    else:
        print("\n".join(table(group, summary) for group, summary in summaries.items()))
    return 0 if all(summary.is_sound for summary in summaries.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
