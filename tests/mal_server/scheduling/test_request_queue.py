"""The order of queued items, apart from the batcher: priorities, aging and the credit of BATCH."""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_server.scheduling.priority import Priority
from mal_server.scheduling.request_queue import (
    INTERACTIVE_PER_BATCH,
    NO_HEADS,
    FairnessCredit,
    Heads,
    RequestQueue,
    Turn,
)

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH
AGING_S = 10.0


@dataclass(frozen=True, eq=False)
class Client:
    priority: Priority
    deadline: float = math.inf
    caller: str = ""


def credit(items: int = 0) -> FairnessCredit:
    """Returns a credit for this number of BATCH items."""
    earned = FairnessCredit(batch_size=4, is_first_come_first_served=False)
    for _ in range(items * INTERACTIVE_PER_BATCH):
        earned.earn()
    return earned


def queue_of(**arrivals: float) -> RequestQueue[Client, str]:
    """Returns a queue of one-item requests; names that begin with b are BATCH."""
    queue = RequestQueue[Client, str](AGING_S)
    for name, arrival in arrivals.items():
        queue.add(Client(BATCH if name.startswith("b") else INTERACTIVE), [name], arrival)
    return queue


def popped(queue: RequestQueue[Client, str], available: FairnessCredit) -> str:
    """Returns all items in the order in which they go, each as the end of a turn."""
    items = []
    for turn in range(100, 100 + queue.size):
        item = queue.pop(available, NO_HEADS)
        queue.end_turn(item.client, turn)
        items.append(item.item)
    return "".join(items)


def test_interactive_items_go_first_and_each_priority_is_first_come_first_served() -> None:
    assert popped(queue_of(b=0.0, c=1.0, d=2.0), credit()) == "cdb"


def test_an_aged_batch_item_needs_credit_to_go_first() -> None:
    assert popped(queue_of(b=0.0, i=11.0), credit()) == "ib"
    assert popped(queue_of(b=0.0, i=11.0), credit(1)) == "bi"
    assert popped(queue_of(b=0.0, i=9.0), credit(1)) == "ib"


def test_a_batch_item_goes_first_after_three_interactive_ones_have_passed_it() -> None:
    assert popped(queue_of(b=0.0, i=11.0, j=12.0, k=13.0, l=14.0), credit()) == "ijkbl"


def test_the_credit_never_exceeds_a_full_batch() -> None:
    assert not credit(9).may_preempt(5, is_next=True)
    assert credit(9).may_preempt(4, is_next=True)
    assert not credit(9).may_preempt(1, is_next=False)


def test_a_batch_item_without_credit_sorts_after_interactive_items_of_other_queues() -> None:
    batch = queue_of(b=0.0).sort_key(credit(), 4, NO_HEADS)
    interactive = queue_of(i=100.0).sort_key(credit(), 4, NO_HEADS)
    assert interactive < batch
    assert queue_of(b=0.0).sort_key(credit(1), 4, NO_HEADS) < interactive


@pytest.mark.parametrize("priority", list(Priority))
def test_removing_a_request_returns_the_indices_that_are_still_queued(priority: Priority) -> None:
    queue, client = RequestQueue[Client, str](AGING_S), Client(priority)
    queue.add(client, "abc", 0.0)
    assert queue.pop(credit(), NO_HEADS).index == 0
    assert queue.remove(client) == (1, 2)
    assert queue.remove(client) == ()
    assert (queue.size, queue.oldest_arrival()) == (0, math.inf)


def test_an_expired_request_is_reported_when_it_is_its_turn() -> None:
    queue = RequestQueue[Client, str](AGING_S)
    late, live, behind = (Client(INTERACTIVE, deadline) for deadline in (1.0, 9.0, 1.0))
    for client in (late, live, behind):
        queue.add(client, "x", 0.0)
    assert queue.expired(5.0) == [late]
    queue.remove(late)
    assert queue.expired(5.0) == []
    queue.remove(live)
    assert queue.expired(5.0) == [behind]


def queue_of_callers(**items: str) -> RequestQueue[Client, str]:
    """Returns a queue with one request of each caller, in this order, all INTERACTIVE."""
    queue = RequestQueue[Client, str](AGING_S)
    for turn, (caller, names) in enumerate(items.items()):
        queue.add(Client(INTERACTIVE, caller=caller), names, float(turn), turn)
    return queue


def test_callers_take_turns_and_each_is_first_come_first_served() -> None:
    queue = queue_of_callers(a="123", b="xy", c="?")
    queue.add(Client(INTERACTIVE, caller="a"), "45", 9.0, 9)
    assert popped(queue, credit()) == "1x?2y345"


def test_a_caller_that_joins_waits_for_one_item_of_each_other() -> None:
    queue = queue_of_callers(a="1111", b="2222")
    first = queue.pop(credit(), NO_HEADS)
    queue.end_turn(first.client, 50)
    queue.add(Client(INTERACTIVE, caller="c"), "c", 9.0, 51)
    assert popped(queue, credit()) == "21c21212"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.booleans()), max_size=20))
@settings(max_examples=60, deadline=None)
def test_no_caller_gets_two_items_while_another_of_its_priority_waits_for_one(
    requests: list[tuple[str, int, bool]],
) -> None:
    queue = RequestQueue[Client, str](AGING_S)
    left: Counter[tuple[Priority, str]] = Counter()
    for turn, (caller, count, is_batch) in enumerate(requests):
        priority = BATCH if is_batch else INTERACTIVE
        queue.add(Client(priority, caller=caller), "x" * count, float(turn), turn)
        left[priority, caller] += count
    passed: Counter[tuple[Priority, str]] = Counter()
    for turn in range(100, 100 + queue.size):
        client = queue.pop(credit(), NO_HEADS).client
        queue.end_turn(client, turn)
        own = client.priority, client.caller
        left[own] -= 1
        for other, waiting in left.items():
            if other[0] is own[0] and other != own and waiting:
                passed[other[0], f"{own[1]} passed {other[1]}"] += 1
                assert passed[other[0], f"{own[1]} passed {other[1]}"] <= 1
            passed[own[0], f"{other[1]} passed {own[1]}"] = 0
    assert not +left


def test_the_key_of_the_caller_whose_turn_it_is_goes_first_however_old_the_other_is() -> None:
    flood, single = queue_of_callers(flood="11111111"), queue_of(i=100.0)
    single_heads = Heads(Turn(5, 100.0), NO_HEADS.batch, math.inf)
    flood.end_turn(Client(INTERACTIVE, caller="flood"), 6)  # its first batch has run
    assert single.sort_key(credit(), 4, flood.heads()) < flood.sort_key(credit(), 4, single_heads)
