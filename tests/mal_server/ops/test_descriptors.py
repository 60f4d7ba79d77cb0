"""The limit of file descriptors."""

import logging
import resource

import pytest

from mal_server.ops.descriptors import raise_descriptor_limit


def test_the_soft_limit_is_raised_to_the_hard_one_and_a_low_one_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = (64, 300)
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, values: given.append(values))
    with caplog.at_level(logging.WARNING):
        raise_descriptor_limit(10)
        assert not caplog.records
        raise_descriptor_limit(2000)
    assert given == [(300, 300)] * 2
    (record,) = caplog.records
    assert record.args == (300, 2000, 2256)
