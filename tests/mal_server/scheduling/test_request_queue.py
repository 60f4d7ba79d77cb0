"""The order of queued items, apart from the batcher: priorities, aging and the credit of BATCH."""

import math
from dataclasses import dataclass

import pytest

from mal_server.scheduling.priority import Priority
from mal_server.scheduling.request_queue import INTERACTIVE_PER_BATCH, FairnessCredit, RequestQueue

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH
AGING_S = 10.0


@dataclass(frozen=True, eq=False)
class Client:
    priority: Priority
    deadline: float = math.inf


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
    return "".join(queue.pop(available, math.inf).item for _ in range(queue.size))


def test_interactive_items_go_first_and_each_priority_is_first_come_first_served() -> None:
    assert popped(queue_of(b=0.0, c=1.0, d=2.0), credit()) == "cdb"


def test_an_aged_batch_item_needs_credit_to_go_first() -> None:
    assert popped(queue_of(b=0.0, i=11.0), credit()) == "ib"
    assert popped(queue_of(b=0.0, i=11.0), credit(1)) == "bi"
    assert popped(queue_of(b=0.0, i=9.0), credit(1)) == "ib"


def test_a_batch_item_goes_first_after_three_interactive_ones_have_passed_it() -> None:
    assert popped(queue_of(b=0.0, i=11.0, j=12.0, k=13.0, l=14.0), credit()) == "ijkbl"


def test_the_credit_never_exceeds_a_full_batch() -> None:
    assert not credit(9).may_preempt(5, is_oldest=True)
    assert credit(9).may_preempt(4, is_oldest=True)
    assert not credit(9).may_preempt(1, is_oldest=False)


def test_a_batch_item_without_credit_sorts_after_interactive_items_of_other_queues() -> None:
    batch = queue_of(b=0.0).sort_key(credit(), 4, math.inf)
    interactive = queue_of(i=100.0).sort_key(credit(), 4, math.inf)
    assert interactive < batch
    assert queue_of(b=0.0).sort_key(credit(1), 4, math.inf) < interactive


@pytest.mark.parametrize("priority", list(Priority))
def test_removing_a_request_returns_the_indices_that_are_still_queued(priority: Priority) -> None:
    queue, client = RequestQueue[Client, str](AGING_S), Client(priority)
    queue.add(client, "abc", 0.0)
    assert queue.pop(credit(), math.inf).index == 0
    assert queue.remove(client) == (1, 2)
    assert queue.remove(client) == ()
    assert (queue.size, queue.oldest_arrival()) == (0, math.inf)


def test_only_requests_at_the_front_are_reported_as_expired() -> None:
    queue = RequestQueue[Client, str](AGING_S)
    late, later, live, behind = (Client(INTERACTIVE, deadline) for deadline in (1.0, 2.0, 9.0, 1.0))
    for client in (late, later, live, behind):
        queue.add(client, "x", 0.0)
    assert queue.expired(5.0) == [late, later]
