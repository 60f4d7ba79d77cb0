"""What became of each call, and the summary of many: rates, percentiles, refusals, and whether all was right."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One call, or one item of a bulk stream; times in seconds of the machine's monotonic clock.

    Attributes:
        due: when it should have been sent: in an open loop its place in the schedule, so that a late client does not
            hide a slow server.
        first: when the first message of the answer came; 0: none did.
        end: when it was over.
        boxes: how many were asked for.
        right: how many were answered with the right mask.
        wrong: answers that were wrong, twice, for ids that were never sent, or under another request's id.
        code: name of the gRPC status.
        reason: of the status's ErrorInfo.
        has_retry: the refusal said when to come back.
        tries: calls that it took.
        kind: interactive or batch.
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
    kind: str


@dataclass(frozen=True)
class ClientReport:
    """One client process: its samples, its CPU seconds while it called, and when its calls began and ended."""

    samples: list[Sample]
    cpu_s: float
    began: float
    ended: float

    def save(self, path: Path) -> None:
        """Writes it for the parent process."""
        text = json.dumps({**asdict(self), "samples": [tuple(asdict(one).values()) for one in self.samples]})
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "ClientReport":
        """Reads what `save` wrote."""
        data = json.loads(path.read_text())
        return cls([Sample(*row) for row in data["samples"]], data["cpu_s"], data["began"], data["ended"])


@dataclass(frozen=True)
class Summary:
    """Figures of the calls of one kind that were due between two moments; latencies in ms, of answered calls.

    Attributes:
        calls: all of them.
        answered: calls with OK whose every box was right.
        refused: calls that ended UNAVAILABLE with the time to come back.
        dropped: calls that ended DEADLINE_EXCEEDED or CANCELLED.
        failed: any other end, by code and reason.
        wrong: wrong answers; must be 0.
        unanswered: boxes of OK calls without the right answer; must be 0.
        without_retry: refusals that did not say when to come back; must be 0.
        calls_per_s, crops_per_s: answered, by the clock.
        p50, p95, p99, longest: until the last message.
        first_p50: until the first message.
        refusal_p50, refusal_p99: until a refusal.
        tries: calls that it took in all.
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
        """Nothing lost, nothing wrong, nothing unexplained."""
        return not (self.wrong or self.unanswered or self.without_retry or self.failed)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed; NaN for none.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([4.0, 1.0, 3.0, 2.0], 99)
    (2.0, 4.0)
    """
    if not values:
        return math.nan
    place = math.ceil(percent / 100 * len(values)) - 1
    return sorted(values)[min(max(place, 0), len(values) - 1)]


def summarize(samples: Iterable[Sample], begin: float, end: float, kind: str = "") -> Summary:
    """The figures of the calls that were due in [begin, end); of one kind, or of all.

    Rates count the boxes of calls that *ended* in that time: what was due in it may end after it.
    """
    every = [one for one in samples if not kind or one.kind == kind]
    due = [one for one in every if begin <= one.due < end]
    ended = [one for one in every if begin <= one.end < end and one.code == "OK"]
    good = [one for one in due if one.code == "OK" and one.right == one.boxes]
    refused = [one for one in due if one.code == "UNAVAILABLE"]
    dropped = [one for one in due if one.code in {"DEADLINE_EXCEEDED", "CANCELLED"}]
    others = [one for one in due if one.code not in {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"}]
    took = [(one.end - one.due) * 1000 for one in good]
    refusals = [(one.end - one.due) * 1000 for one in refused]
    seconds = max(end - begin, 1e-9)
    return Summary(
        calls=len(due),
        answered=len(good),
        refused=len(refused),
        dropped=len(dropped),
        failed=dict(Counter(f"{one.code}/{one.reason}" for one in others)),
        wrong=sum(one.wrong for one in due),
        unanswered=sum(one.boxes - one.right for one in due if one.code == "OK"),
        without_retry=sum(not one.has_retry for one in refused),
        calls_per_s=len(ended) / seconds,
        crops_per_s=sum(one.right for one in ended) / seconds,
        p50=percentile(took, 50),
        p95=percentile(took, 95),
        p99=percentile(took, 99),
        longest=max(took, default=math.nan),
        first_p50=percentile([(one.first - one.due) * 1000 for one in good], 50),
        refusal_p50=percentile(refusals, 50),
        refusal_p99=percentile(refusals, 99),
        tries=sum(one.tries for one in due),
    )


def table(name: str, found: Summary) -> str:
    """A summary for people."""
    failed = ", ".join(f"{key} {count}" for key, count in found.failed.items()) or "0"
    return "\n".join(
        (
            f"{name}: {found.calls} calls, {found.answered} answered, {found.refused} refused, "
            f"{found.dropped} dropped, failed {failed}; {found.tries} tries",
            f"  {found.calls_per_s:.1f} calls/s, {found.crops_per_s:.1f} crops/s",
            f"  latency ms: p50 {found.p50:.1f}, p95 {found.p95:.1f}, p99 {found.p99:.1f}, max {found.longest:.1f}; "
            f"first message p50 {found.first_p50:.1f}",
            f"  refusals ms: p50 {found.refusal_p50:.1f}, p99 {found.refusal_p99:.1f}",
            f"  wrong answers {found.wrong}, boxes without one {found.unanswered}, "
            f"refusals without RetryInfo {found.without_retry}",
        )
    )
