"""Records of single calls, and their summary: rates, percentiles, rejections and wrong results."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One call, or one item of a bulk stream; times in seconds of the monotonic clock.

    Attributes:
        due: scheduled send time. In an open loop it is independent of the client, so that a late client does not hide a
            slow server.
        first: time of the first response message; 0 if there was none.
        end: time of the end.
        boxes: number of boxes in the request.
        right: number of boxes with a correct mask.
        wrong: number of results that are wrong, repeated, for unknown ids, or with the id of another request.
        code: name of the gRPC status.
        reason: reason in the ErrorInfo of the status.
        has_retry: the status has RetryInfo.
        tries: number of attempts.
        group: group of the plan.
    """

    due: float
    first: float
    end: float
    boxes: int
    right: int
    wrong: int
    code: str
    reason: str
    has_retry: bool
    tries: int
    group: str


@dataclass(frozen=True)
class ClientReport:
    """Report of one client process: samples, CPU seconds during the calls, and start and end of the calls."""

    samples: list[Sample]
    cpu_s: float
    began: float
    ended: float

    def save(self, path: Path) -> None:
        """Saves the report for the parent process."""
        text = json.dumps({**asdict(self), "samples": [tuple(asdict(sample).values()) for sample in self.samples]})
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "ClientReport":
        """Loads a saved report."""
        data = json.loads(path.read_text())
        return cls([Sample(*row) for row in data["samples"]], data["cpu_s"], data["began"], data["ended"])


@dataclass(frozen=True)
class Summary:
    """Statistics of the calls due in an interval; latencies in ms, of answered calls unless stated otherwise.

    Attributes:
        calls: number of calls.
        answered: calls with status OK and a correct mask for every box.
        refused: calls with status UNAVAILABLE.
        dropped: calls with status DEADLINE_EXCEEDED or CANCELLED.
        failed: calls with any other status, by code and reason.
        wrong: wrong results; must be 0.
        unanswered: boxes of OK calls without a correct result; must be 0.
        without_retry: refused calls without RetryInfo; must be 0.
        calls_per_s: answered calls per wall second.
        crops_per_s: answered boxes per wall second.
        p50: median latency of the last message.
        p95: 95th percentile of it.
        p99: 99th percentile of it.
        longest: maximum of it.
        first_p50: median latency of the first message.
        refusal_p50: median latency of a refusal.
        refusal_p99: 99th percentile of it.
        tries: total number of attempts.
    """

    calls: int
    answered: int
    refused: int
    dropped: int
    failed: dict[str, int]
    wrong: int
    unanswered: int
    without_retry: int
    calls_per_s: float
    crops_per_s: float
    p50: float
    p95: float
    p99: float
    longest: float
    first_p50: float
    refusal_p50: float
    refusal_p99: float
    tries: int

    @property
    def is_sound(self) -> bool:
        """True if there are no wrong or missing results and no unexpected statuses."""
        return not (self.wrong or self.unanswered or self.without_retry or self.failed)


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the smallest value that at least `percent` of the values do not exceed; NaN for no values.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([4.0, 1.0, 3.0, 2.0], 99)
    (2.0, 4.0)
    """
    if not values:
        return math.nan
    rank = math.ceil(percent / 100 * len(values)) - 1
    return sorted(values)[min(max(rank, 0), len(values) - 1)]


def summarize(samples: Iterable[Sample], begin: float, end: float, group: str = "") -> Summary:
    """Summarizes the calls due in [begin, end), of one group or of all.

    Rates count calls that *ended* in the interval, since calls due in it may end later.
    """
    selected = [sample for sample in samples if not group or sample.group == group]
    due = [sample for sample in selected if begin <= sample.due < end]
    ended = [sample for sample in selected if begin <= sample.end < end and sample.code == "OK"]
    good = [sample for sample in due if sample.code == "OK" and sample.right == sample.boxes]
    refused = [sample for sample in due if sample.code == "UNAVAILABLE"]
    dropped = [sample for sample in due if sample.code in {"DEADLINE_EXCEEDED", "CANCELLED"}]
    others = [sample for sample in due if sample.code not in {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"}]
    latencies = [(sample.end - sample.due) * 1000 for sample in good]
    refusals = [(sample.end - sample.due) * 1000 for sample in refused]
    seconds = max(end - begin, 1e-9)
    return Summary(
        calls=len(due),
        answered=len(good),
        refused=len(refused),
        dropped=len(dropped),
        failed=dict(Counter(f"{sample.code}/{sample.reason}" for sample in others)),
        wrong=sum(sample.wrong for sample in due),
        unanswered=sum(sample.boxes - sample.right for sample in due if sample.code == "OK"),
        without_retry=sum(not sample.has_retry for sample in refused),
        calls_per_s=len(ended) / seconds,
        crops_per_s=sum(sample.right for sample in ended) / seconds,
        p50=percentile(latencies, 50),
        p95=percentile(latencies, 95),
        p99=percentile(latencies, 99),
        longest=max(latencies, default=math.nan),
        first_p50=percentile([(sample.first - sample.due) * 1000 for sample in good], 50),
        refusal_p50=percentile(refusals, 50),
        refusal_p99=percentile(refusals, 99),
        tries=sum(sample.tries for sample in due),
    )


def table(name: str, summary: Summary) -> str:
    """Returns a summary as text."""
    failed = ", ".join(f"{key} {count}" for key, count in summary.failed.items()) or "0"
    return "\n".join(
        (
            f"{name}: {summary.calls} calls, {summary.answered} answered, {summary.refused} refused, "
            f"{summary.dropped} dropped, failed {failed}; {summary.tries} tries",
            f"  {summary.calls_per_s:.1f} calls/s, {summary.crops_per_s:.1f} crops/s",
            f"  latency ms: p50 {summary.p50:.1f}, p95 {summary.p95:.1f}, p99 {summary.p99:.1f}, "
            f"max {summary.longest:.1f}; first message p50 {summary.first_p50:.1f}",
            f"  refusals ms: p50 {summary.refusal_p50:.1f}, p99 {summary.refusal_p99:.1f}",
            f"  wrong results {summary.wrong}, boxes without a result {summary.unanswered}, "
            f"refusals without RetryInfo {summary.without_retry}",
        )
    )
