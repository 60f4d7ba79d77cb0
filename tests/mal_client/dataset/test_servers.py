"""Claims about the servers that a job checks, with clients that answer from memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from mal_client.dataset.servers import FIRST_PAUSE_S, LONGEST_PAUSE_S, JobServers
from mal_client.errors import CallCancelled, ServerUnavailable
from mal_client.types import SERVER_DEFAULTS, ModelRef, ServerInfo, ServerLimits

from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch

LIMITS = ServerLimits(1, 1, 100, 1000, 100, 1000, 4)


def info(sha256: str = "ab", **limits: int) -> ServerInfo:
    return ServerInfo(
        version="1",
        model=ModelRef("default", sha256, Branch.TEACHER),
        arch="a",
        crop_size=64,
        margin_rate=0.5,
        mask_thresholds=(0.5, 0.5, 0.5),
        categories={},
        limits=ServerLimits(**(vars(LIMITS) | limits)),
        devices=(),
        precision="float32",
    )


@dataclass
class FakeClient:
    """A client of one server; `answer` is what it serves, or its error."""

    address: str
    answer: ServerInfo | Exception = field(default_factory=info)
    timeout_s: float = 1.0
    asked: int = 0

    def server_info(self) -> ServerInfo:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def servers(self, lookup: Any = None) -> "Sequence[FakeClient]":
        return [self]

    def open_channel(self) -> grpc.Channel:
        raise NotImplementedError

    def pause(self, pause_s: float) -> None:
        raise NotImplementedError


@dataclass
class Name(FakeClient):
    """A client of a name, whose servers change."""

    found: list[FakeClient] = field(default_factory=list)
    error: Exception | None = None

    def servers(self, lookup: Any = None) -> Sequence[FakeClient]:
        if self.error is not None:
            raise self.error
        return list(self.found)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def job(*clients: FakeClient, clock: Clock | None = None) -> JobServers:
    return JobServers(clients, SERVER_DEFAULTS, lambda _: None, clock=clock or Clock())


def test_a_server_that_fails_is_asked_again_after_pauses_that_double() -> None:
    clock, down = Clock(), FakeClient("b:1", ServerUnavailable("down"))
    servers = job(FakeClient("a:1"), down, clock=clock)
    asked_at = []
    while clock.now < 2000:
        before = down.asked
        servers.refresh(frozenset({"a:1"}))
        if down.asked > before:
            asked_at.append(clock.now)
        clock.now += 1
    pauses = [later - earlier for earlier, later in zip([0.0, *asked_at], asked_at, strict=False)]
    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert max(pauses) == LONGEST_PAUSE_S


def test_a_server_that_comes_back_is_added_and_one_in_use_is_not_asked() -> None:
    clock, down = Clock(), FakeClient("b:1", ServerUnavailable("down"))
    first = FakeClient("a:1")
    servers = job(first, down, clock=clock)
    down.answer, clock.now = info(max_items_in_flight=7), FIRST_PAUSE_S
    assert servers.refresh(frozenset({"a:1"})).added == [(down, 7)]
    assert servers.refresh(frozenset({"a:1", "b:1"})).added == []
    assert first.asked == 1


def test_a_lost_server_is_not_asked_at_once() -> None:
    first, second, clock = FakeClient("a:1"), FakeClient("b:1"), Clock()
    servers = job(first, second, clock=clock)
    servers.note_lost("b:1")
    assert servers.refresh(frozenset({"a:1"})).added == []
    clock.now = FIRST_PAUSE_S
    assert servers.refresh(frozenset({"a:1"})).added == [(second, 4)]


def pauses_after_losses(servers: JobServers, clock: Clock, in_use_s: float, count: int) -> list[float]:
    """Loses b:1 `count` times, each time after `in_use_s`; returns the seconds until it is added again."""
    pauses = []
    for _ in range(count):
        clock.now += in_use_s
        servers.note_lost("b:1")
        lost_at = clock.now
        while not servers.refresh(frozenset({"a:1"})).added:
            clock.now += 1
        pauses.append(clock.now - lost_at)
    return pauses


def test_a_server_that_is_lost_long_after_it_came_back_begins_with_the_first_pause() -> None:
    clock = Clock()
    servers = job(FakeClient("a:1"), FakeClient("b:1"), clock=clock)
    assert pauses_after_losses(servers, clock, LONGEST_PAUSE_S + 1, 8) == [FIRST_PAUSE_S] * 8


def test_a_server_that_answers_checks_and_is_lost_at_once_is_checked_after_pauses_that_double() -> None:
    clock = Clock()
    servers = job(FakeClient("a:1"), FakeClient("b:1"), clock=clock)
    pauses = pauses_after_losses(servers, clock, 1.0, 8)
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S


def test_an_address_that_no_name_has_is_gone_unless_the_name_fails() -> None:
    first, second = FakeClient("10.0.0.1:1"), FakeClient("10.0.0.2:1")
    name = Name("mal:1", found=[first, second])
    servers = job(name)
    name.found = [first]
    in_use = frozenset({"10.0.0.1:1", "10.0.0.2:1"})
    assert servers.refresh(in_use).gone == {"10.0.0.2:1"}
    name.error = ServerUnavailable("mal: no address")
    failed = servers.refresh(frozenset({"10.0.0.1:1"}))
    assert failed.gone == frozenset()
    assert len(failed.notices) == 1
    assert servers.refresh(frozenset({"10.0.0.1:1"})).notices == []


def test_an_address_of_two_names_is_one_server() -> None:
    shared = FakeClient("10.0.0.1:1")
    servers = job(Name("a:1", found=[shared]), Name("b:1", found=[shared]))
    assert servers.reachable == [(shared, 4)]


@pytest.mark.parametrize(("late", "word"), [(info("cd"), "checkpoint_sha256"), (info(max_pixels=999), "max_pixels")])
def test_a_late_server_that_differs_is_not_added(late: ServerInfo, word: str) -> None:
    first, other = FakeClient("10.0.0.1:1"), FakeClient("10.0.0.2:1", late)
    name = Name("mal:1", found=[first])
    servers = job(name)
    name.found = [first, other]
    changes = servers.refresh(frozenset({"10.0.0.1:1"}))
    assert changes.added == []
    (notice,) = changes.notices
    assert "10.0.0.2:1" in notice
    assert word in notice


def test_limits_are_the_lowest_of_the_servers_at_the_start() -> None:
    servers = job(FakeClient("a:1", info(max_boxes=9)), FakeClient("b:1", info(max_image_bytes=7)))
    assert (servers.limits.max_boxes, servers.limits.max_image_bytes) == (9, 7)


def test_without_a_server_the_first_error_is_raised_and_a_difference_is_one() -> None:
    with pytest.raises(ServerUnavailable, match="first"):
        job(FakeClient("a:1", ServerUnavailable("first")), FakeClient("b:1", ServerUnavailable("second")))
    with pytest.raises(ConfigError, match="b:1"):
        job(FakeClient("a:1"), FakeClient("b:1", info("cd")))


def test_a_closed_client_ends_the_look() -> None:
    first = FakeClient("a:1")
    servers = job(first)
    first.answer = CallCancelled("closed")
    with pytest.raises(CallCancelled):
        servers.refresh(frozenset())
