"""Retries: bounded, with growing pauses."""

import pytest

from mal_train.core.errors import StoreUnreachable
from mal_train.core.storage import retry
from mal_train.core.storage.retry import ATTEMPTS, Transient, with_retries


class Flaky:
    """Fails a number of times, then returns its number of calls."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise Transient("HTTP status 503")
        return self.calls


def test_transient_errors_are_repeated_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr("random.uniform", lambda *_: 1.0)
    pauses: list[float] = []
    assert with_retries(Flaky(ATTEMPTS - 1), "s3://b/k", sleep=pauses.append) == ATTEMPTS
    assert pauses == [0.5, 1.0, 2.0, 4.0]


def test_attempts_are_bounded() -> None:
    flaky = Flaky(100)
    with pytest.raises(StoreUnreachable):
        with_retries(flaky, "s3://b/k", sleep=lambda _: None)
    assert flaky.calls == ATTEMPTS


def test_other_errors_are_not_repeated() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise KeyError("x")

    with pytest.raises(KeyError):
        with_retries(fail, "s3://b/k", sleep=lambda _: None)
    assert len(calls) == 1
