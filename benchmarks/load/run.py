"""Puts a server under load from several client processes and prints what it did: a `ghz` that checks every answer.

    python -m benchmarks.load.run --server 127.0.0.1:50051 --clients 32 --boxes 8 --seconds 30       closed loop
    python -m benchmarks.load.run --server 127.0.0.1:50051 --rate 60 --boxes 8                       open loop
    python -m benchmarks.load.run --batch-ms 5 --clients 64       a stand-in server, exact masks checked

Pictures are JPEGs of synthetic scenes. Against a server of one's own the ids, the sizes and the request ids of all
answers are checked; against the stand-in also every mask. Exits with 1 when an answer was wrong or missing.
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

from benchmarks.load.caller import Plan
from benchmarks.load.deck import DeckImage, draw_deck, save_deck, with_answers
from benchmarks.load.summary import ClientReport, Sample, Summary, summarize, table

ROOT = Path(__file__).resolve().parents[2]
START_S = 300.0
START_IN_S = 0.2
"""From the last client's word that it is ready to the common start."""


def environment() -> dict[str, str]:
    """For child processes: they find the project wherever they are started, and torch takes one thread."""
    paths = [str(ROOT), str(ROOT / "protos"), str(ROOT / "clients")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass
class Server:
    """A server process under load."""

    process: "subprocess.Popen[bytes]"
    address: str
    report_file: Path

    def rss_mib(self) -> float:
        """Resident memory now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def forget(self) -> None:
        """Starts the watch's figures anew."""
        self.process.send_signal(signal.SIGUSR1)

    def stop(self, timeout_s: float = 60) -> dict[str, Any]:
        """Ends it by SIGTERM; its report."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout_s)
        if code:
            raise RuntimeError(f"the server ended with {code}")
        found: dict[str, Any] = json.loads(self.report_file.read_text())
        return found


@contextmanager
def stand_in(folder: Path, *arguments: str, name: str = "server") -> Iterator[Server]:
    """A stand-in server; killed at the end if it still runs."""
    port_file, report_file = folder / f"{name}.port", folder / f"{name}.report"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.load.stand_in", "--port-file", str(port_file)]
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
    """The address of a server that has come up."""
    until = time.monotonic() + START_S
    while not port_file.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it served")
        if time.monotonic() > until:
            raise RuntimeError(f"the server was not up after {START_S:g} s")
        time.sleep(0.02)
    return port_file.read_text().strip()


@dataclass
class Load:
    """Client processes at work."""

    processes: "list[subprocess.Popen[bytes]]"
    report_files: list[Path]
    start_at: float

    def wait(self, timeout_s: float) -> list[ClientReport]:
        """Their reports, in the order of the plans."""
        until = time.monotonic() + timeout_s
        for process in self.processes:
            code = process.wait(max(until - time.monotonic(), 0.1))
            if code:
                raise RuntimeError(f"a client process ended with {code}")
        return [ClientReport.load(path) for path in self.report_files]


@contextmanager
def loading(plans: Sequence[Plan], deck_folder: Path) -> Iterator[Load]:
    """A process for each plan; once all are connected they begin to call at one moment, `Load.start_at`."""
    processes, reports = [], []
    with tempfile.TemporaryDirectory() as name:
        start = Path(name, "start")
        try:
            for at, plan in enumerate(plans):
                plan_file, report = Path(name, f"{at}.plan"), Path(name, f"{at}.json")
                plan_file.write_text(json.dumps(asdict(replace(plan, number=at, starts_by=str(start)))))
                files = [str(path) for path in (plan_file, deck_folder, report)]
                command = [sys.executable, "-m", "benchmarks.load.caller", *files]
                processes.append(subprocess.Popen(command, env=environment(), cwd=ROOT))
                reports.append(report)
            wait_until_ready(processes, reports)
            start_at = time.monotonic() + START_IN_S
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
    """Returns once every client process is connected, however long this machine takes for it."""
    until = time.monotonic() + START_S
    for process, report in zip(processes, reports, strict=True):
        while not report.with_suffix(".ready").exists():
            if process.poll() is not None:
                raise RuntimeError(f"a client process ended with {process.returncode} before it was ready")
            if time.monotonic() > until:
                raise RuntimeError(f"the clients were not ready after {START_S:g} s")
            time.sleep(0.01)


def samples_of(reports: Sequence[ClientReport]) -> list[Sample]:
    """All processes' samples."""
    return [sample for report in reports for sample in report.samples]


def shared(plan: Plan, processes: int) -> list[Plan]:
    """The plan's clients, calls and rate dealt out to so many processes."""
    counts = [plan.clients // processes + (at < plan.clients % processes) for at in range(processes)]
    return [
        replace(
            plan, clients=count, rate=plan.rate * count / plan.clients, calls=-(-plan.calls * count // plan.clients)
        )
        for count in counts
        if count
    ]


def stand_in_deck(folder: Path, pictures: int = 16, boxes: int = 8, seed: int = 1) -> list[DeckImage]:
    """A deck for the stand-in, with the right masks, saved."""
    from benchmarks.load.stand_in import right_masks  # noqa: PLC0415  brings torch, which clients go without

    deck = with_answers(draw_deck(pictures, boxes, seed), right_masks)
    save_deck(deck, folder)
    return deck


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Puts a server under load and checks every answer.")
    made.add_argument("--server", metavar="HOST:PORT", help="default: a stand-in server of this tool's own")
    made.add_argument(
        "--batch-ms", type=float, default=5.0, help="the stand-in's time of a batch (default %(default)g)"
    )
    made.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of the stand-in's server")
    made.add_argument("--clients", type=int, default=32, help="interactive clients (default %(default)d)")
    made.add_argument("--streams", type=int, default=0, help="bulk streams beside them (default %(default)d)")
    made.add_argument("--rate", type=float, default=0.0, help="calls/s of an open loop; 0: closed (default)")
    made.add_argument("--boxes", type=int, default=8, help="boxes of a call, at most 8 (default %(default)d)")
    made.add_argument("--seconds", type=float, default=10.0, help="default %(default)g")
    made.add_argument("--deadline", type=float, default=0.0, metavar="S", help="of a call; 0: none (default)")
    made.add_argument("--retries", action="store_true", help="come back after refusals until answered")
    made.add_argument("--processes", type=int, default=2, help="client processes (default %(default)d)")
    made.add_argument("--seed", type=int, default=1, help="default %(default)d")
    made.add_argument("--token", default="", metavar="env:NAME", help="the token to show")
    made.add_argument("--json", action="store_true", help="print the figures as JSON")
    return made


def measure(args: argparse.Namespace, folder: Path, address: str) -> dict[str, Summary]:
    """Runs the load; a summary for each kind of client."""
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
    plans = shared(plan, args.processes) if args.clients else []
    if args.streams:
        plans.append(replace(plan, clients=args.streams, rate=0.0, kind="batch", streams=True))
    with loading(plans, folder) as load:
        reports = load.wait(args.seconds + 300)
    begin, samples = load.start_at, samples_of(reports)
    print(f"clients' own CPU: {sum(report.cpu_s for report in reports):.1f} s", file=sys.stderr)
    return {kind: summarize(samples, begin, begin + args.seconds, kind) for kind in sorted({p.kind for p in plans})}


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.server:
            save_deck(draw_deck(16, 8, args.seed), folder)
            found = measure(args, folder, args.server)
        else:
            stand_in_deck(folder, seed=args.seed)
            with stand_in(folder, "--batch-ms", str(args.batch_ms), *args.set) as server:
                found = measure(args, folder, server.address)
                print(json.dumps(server.stop()), file=sys.stderr)
    if args.json:
        print(json.dumps({kind: asdict(one) for kind, one in found.items()}))
    else:
        print("\n".join(table(kind, one) for kind, one in found.items()))
    return 0 if all(one.is_sound for one in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
