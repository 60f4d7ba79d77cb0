"""Callers take turns in the queue of the CPU pool and of the memory limiter."""

from collections import Counter
from threading import Event

from hypothesis import given, settings
from hypothesis import strategies as st

from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.priority import Priority
from mal_server.scheduling.turns import TurnQueue


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_caller_gets_two_turns_while_another_waits(steps: list[tuple[str, bool]]) -> None:
    queue, waiting, passed = TurnQueue[tuple[str, int]](), Counter[str](), Counter[tuple[str, str]]()
    arrived: list[tuple[str, int]] = []
    for number, (caller, pops) in enumerate(steps):
        queue.add((caller, number), caller)
        arrived.append((caller, number))
        waiting[caller] += 1
        assert queue.oldest() == arrived[0]
        if not pops:
            continue
        item = queue.pop()
        assert item == next(one for one in arrived if one[0] == item[0])
        arrived.remove(item)
        waiting[item[0]] -= 1
        for other in "abc":
            passed[other, item[0]] = 0
            if other != item[0] and waiting[other]:
                passed[item[0], other] += 1
                assert passed[item[0], other] <= 1
            if not waiting[other]:
                passed[item[0], other] = 0
    assert len(queue) == len(arrived)


def test_a_removed_item_leaves_nothing_behind() -> None:
    queue = TurnQueue[str]()
    for item in ("a1", "a2", "b1"):
        queue.add(item, item[0])
    for item in ("a1", "b1", "b1", "a2"):
        queue.remove(item)
    assert len(queue) == 0
    queue.add("c1", "c")
    assert queue.pop() == "c1"


def test_a_cpu_task_waits_for_one_of_each_other_caller() -> None:
    pool, begin, order = PriorityThreadPool(1), Event(), list[str]()
    pool.submit(Priority.INTERACTIVE, begin.wait, 60)
    for number in range(5):
        pool.submit(Priority.INTERACTIVE, order.append, f"a{number}", caller="a")
    last = pool.submit(Priority.INTERACTIVE, order.append, "b0", caller="b")
    begin.set()
    last.result(60)
    pool.shutdown()
    assert order[:2] == ["a0", "b0"]
