"""Load that must be held, load that must be shed, and what either leaves behind."""

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.caller import Plan
from benchmarks.load.figures import Sample, Summary, summarize
from benchmarks.load.run import Server, loading, samples_of, shared, stand_in
from tests.chaos.conftest import FORM, TIMED, Form

Say = Callable[..., None]


@dataclass
class Seen:
    """What one run under load showed.

    Attributes:
        samples: of all calls.
        begin, seconds: when load was on.
        report: the server's own (event loop, memory).
        rss_mib: resident memory over time.
        queued: crops that waited, over time.
    """

    samples: list[Sample]
    begin: float
    seconds: float
    report: dict[str, Any]
    rss_mib: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)

    def of(self, kind: str = "") -> Summary:
        """The figures of one kind of client."""
        return summarize(self.samples, self.begin, self.begin + self.seconds, kind)


def queued_crops(metrics: str) -> float:
    """The server's own count of crops that wait."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as answer:
        (value,) = re.findall(r"^mal_queue_crops (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(value)


def watched(server: Server, seen_rss: list[float], queued: list[float], metrics: str, over: threading.Event) -> None:
    while not over.wait(0.2):
        seen_rss.append(server.rss_mib())
        if metrics:
            queued.append(queued_crops(metrics))


def under_load(
    folder: Path, deck: Path, plans: list[Plan], *arguments: str, seconds: float, metrics_port: int = 0
) -> Seen:
    """Runs a stand-in server under the plans' load to its end."""
    metrics = f"127.0.0.1:{metrics_port}" if metrics_port else ""
    shows = [f"metrics.port={metrics_port}"] if metrics_port else []
    with stand_in(folder, *arguments, *shows) as server:
        addressed = [Plan(**{**plan.__dict__, "address": server.address}) for plan in plans]
        with loading(addressed, deck) as load:
            time.sleep(max(load.start_at - time.monotonic(), 0))
            server.forget()
            seen, queued, over = list[float](), list[float](), threading.Event()
            watch = threading.Thread(target=watched, args=(server, seen, queued, metrics, over))
            watch.start()
            try:
                reports = load.wait(seconds * 3 + 240)
            finally:
                over.set()
                watch.join()
        return Seen(samples_of(reports), load.start_at, seconds, server.stop(), seen, queued)


# Of the full form so slow that 64 clients with a picture each keep the device busy, not the two cores.
BATCH_MS, BATCH = FORM.pick(50, 400), 64
CLIENTS = FORM.pick(16, 64)


@pytest.fixture(scope="module")
def held(form: Form, deck_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A closed loop of clients that a batch has room for."""
    plan = Plan("", clients=CLIENTS, seconds=form.pick(2.0, 60.0), seed=form.seed)
    plans = shared(plan, form.pick(1, 2))
    settings = ("--batch-ms", str(BATCH_MS), f"max_batch_size={BATCH}")
    return under_load(tmp_path_factory.mktemp("held"), deck_folder, plans, *settings, seconds=plan.seconds)


def test_every_call_is_answered_once_with_its_own_mask(held: Seen, say: Say) -> None:
    found = held.of()
    say("load held", calls=found.calls, answered=found.answered, wrong=found.wrong, crops_per_s=found.crops_per_s)
    assert found.calls >= CLIENTS
    assert (found.answered, found.wrong, found.unanswered) == (found.calls, 0, 0)
    ids = [sample for sample in held.samples if sample.code != "OK"]
    assert ids == []


@TIMED
def test_the_slowest_calls_wait_for_few_batches(held: Seen, say: Say) -> None:
    found = held.of()
    bound_ms = 3 * BATCH_MS + 5
    say("latency held", p50_ms=found.p50, p99_ms=found.p99, bound_ms=bound_ms)
    assert found.p99 <= bound_ms


def test_no_callback_holds_the_event_loop(held: Seen, say: Say) -> None:
    report = held.report
    say("event loop", **{key: value for key, value in report.items() if key != "slowest"})
    assert report["callbacks"] > held.of().calls
    # By CPU time: by the clock a callback is also slow when another process has the core.
    assert report["slow_callbacks_cpu"] == 0, report["slowest"]


CAPACITY_BATCH, BOUND = 8, 64
# Slow enough in the short form that a busy machine's CPU is not what is overloaded.
CAPACITY_BATCH_MS = FORM.pick(250, 50)
CAPACITY = CAPACITY_BATCH * 1000 / CAPACITY_BATCH_MS
"""Crops a second that the stand-in can do."""
BOXES = 4
RETRYING = 8
JOBS = FORM.pick(24, 2000)


@pytest.fixture(scope="module")
def overloaded(form: Form, deck_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Three times what the device can do, and among them clients with jobs who come back after refusals."""
    seconds = form.pick(4.0, 60.0)
    rush = Plan("", clients=4, seconds=seconds, rate=3 * CAPACITY / BOXES, boxes=BOXES, kind="rush", seed=form.seed)
    patient = Plan(
        "",
        clients=RETRYING,
        seconds=1800.0,
        calls=JOBS,
        boxes=BOXES,
        kind="patient",
        retries=True,
        seed=form.seed + 1,
    )
    settings = (
        "--batch-ms",
        str(CAPACITY_BATCH_MS),
        f"max_batch_size={CAPACITY_BATCH}",
        f"limits.max_boxes={BOUND}",
        f"max_queue_crops={BOUND}",
    )
    folder = tmp_path_factory.mktemp("overloaded")
    return under_load(folder, deck_folder, [rush, patient], *settings, seconds=seconds, metrics_port=free_port())


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@TIMED
def test_overload_does_not_cost_throughput(overloaded: Seen, say: Say) -> None:
    goodput = overloaded.of().crops_per_s / CAPACITY
    rush = overloaded.of("rush")
    offered = rush.calls * BOXES / overloaded.seconds / CAPACITY
    say("overload", offered=offered, goodput=goodput, calls=rush.calls, answered=rush.answered, refused=rush.refused)
    assert offered > 2
    assert goodput >= 0.9


def test_what_overload_refuses_is_told_when_to_come_back_and_the_rest_is_answered(overloaded: Seen, say: Say) -> None:
    rush = overloaded.of("rush")
    say("under overload", calls=rush.calls, answered=rush.answered, refused=rush.refused, wrong=rush.wrong)
    assert rush.refused > 0
    assert rush.answered > 0
    assert (rush.without_retry, rush.wrong, rush.unanswered, rush.failed) == (0, 0, 0, {})


@TIMED
def test_refusals_are_quick(overloaded: Seen, say: Say) -> None:
    rush = overloaded.of("rush")
    say("refusals", count=rush.refused, p50_ms=rush.refusal_p50, p99_ms=rush.refusal_p99, answered_p50_ms=rush.p50)
    assert rush.refusal_p50 < 50
    # A refusal that waited in the queue would take as long as an answer.
    assert rush.refusal_p99 < rush.p50


def test_the_queue_never_passes_its_bound(overloaded: Seen, say: Say) -> None:
    say("queue", looks=len(overloaded.queued), most=max(overloaded.queued), bound=BOUND)
    assert BOUND / 4 < max(overloaded.queued) <= BOUND


def test_memory_stays_flat_under_overload(overloaded: Seen, say: Say) -> None:
    seen = overloaded.rss_mib
    growth = max(seen) - max(seen[: len(seen) // 3 + 1])
    say("memory under overload", growth_mib=growth, peak_mib=max(seen))
    assert growth <= 20


def test_clients_that_come_back_lose_nothing(overloaded: Seen, form: Form, say: Say) -> None:
    jobs = [one for one in overloaded.samples if one.kind == "patient"]
    say(
        "retries",
        jobs=len(jobs),
        done_once=sum(one.right == BOXES for one in jobs),
        tries=sum(one.tries for one in jobs),
    )
    assert len(jobs) == JOBS
    assert {(one.code, one.right, one.wrong) for one in jobs} == {("OK", BOXES, 0)}
    if form.is_full:  # of so few jobs as the short form has, all may come at moments of room
        assert sum(one.tries for one in jobs) > len(jobs)


OWN_WORK_MS = 25
"""Of one call with one box: decoding, cutting, encoding and the way there and back, beside bulk work on two cores."""


def test_an_interactive_call_passes_a_saturating_bulk_stream(
    form: Form, deck_folder: Path, tmp_path: Path, say: Say
) -> None:
    seconds, batch_ms, size = form.pick(3.0, 60.0), 100, 16
    plans = [
        Plan("", clients=2, seconds=seconds, boxes=8, kind="batch", streams=True, seed=form.seed),
        Plan("", clients=1, seconds=seconds, boxes=1, kind="interactive", seed=form.seed + 1),
    ]
    settings = ("--batch-ms", str(batch_ms), f"max_batch_size={size}")
    seen = under_load(tmp_path, deck_folder, plans, *settings, seconds=seconds)
    person, bulk = seen.of("interactive"), seen.of("batch")
    busy = bulk.crops_per_s / (size * 1000 / batch_ms)
    say("priority", calls=person.calls, p50_ms=person.p50, p95_ms=person.p95, batch_ms=batch_ms, bulk_share=busy)
    assert (person.wrong, bulk.wrong, person.failed) == (0, 0, {})
    assert person.answered == person.calls > 0
    assert bulk.answered > 0
    if form.is_full:  # how many batches it waits for: test_interactive_first.py
        assert busy > 0.8
        assert person.p95 <= 2 * batch_ms + OWN_WORK_MS


def test_many_calls_leave_nothing_behind(form: Form, deck_folder: Path, tmp_path: Path, say: Say) -> None:
    calls = form.pick(600, 50_000)
    plan = Plan("", clients=8, seconds=1800.0, calls=calls, seed=form.seed)
    with stand_in(tmp_path, "--batch-ms", "0") as server:
        with loading([Plan(**{**plan.__dict__, "address": server.address, "calls": calls // 5})], deck_folder) as load:
            load.wait(1800)
        first = server.rss_mib()
        rest = Plan(**{**plan.__dict__, "address": server.address, "calls": calls - calls // 5, "seed": form.seed + 1})
        with loading([rest], deck_folder) as load:
            (report,) = load.wait(1800)
        growth = server.rss_mib() - first
        server.stop()
    say("leak", calls=calls, growth_mib=growth, after_mib=first)
    assert {(one.code, one.wrong) for one in report.samples} == {("OK", 0)}
    assert len(report.samples) >= calls * 4 // 5
    assert growth <= 20


@pytest.fixture(autouse=True)
def _shown(capsys: pytest.CaptureFixture[str], form: Form) -> Iterator[None]:
    """Lines of fixtures and tests go to the terminal in the full form, whatever captures them."""
    yield
    if form.is_full:
        with capsys.disabled():
            print(capsys.readouterr().out, end="")
