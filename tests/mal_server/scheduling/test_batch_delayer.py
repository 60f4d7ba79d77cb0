"""The prediction of further requests that an idle device may wait for."""

import math

from mal_server.scheduling.batch_delayer import BatchDelayer

WINDOW_S = 0.5


def test_without_other_requests_there_is_nothing_to_wait_for() -> None:
    assert BatchDelayer(WINDOW_S).wait_until(3.0) <= 3.0


def test_a_request_in_preparation_is_expected_until_it_is_submitted_or_closed() -> None:
    delayer = BatchDelayer(WINDOW_S)
    delayer.on_admit("a")
    delayer.on_admit("b")
    delayer.on_submit("a")
    assert delayer.wait_until(0.0) == math.inf
    delayer.on_close("b", now=0.0)
    assert delayer.wait_until(0.0) <= 0.0


def test_an_answered_client_is_expected_until_the_window_after_its_request_ends() -> None:
    delayer = BatchDelayer(WINDOW_S)
    delayer.on_admit("a")
    delayer.on_submit("a")
    delayer.on_answer("a")
    assert delayer.wait_until(1.0) == math.inf  # the answer is still being written
    delayer.on_close("a", now=1.0)
    assert delayer.wait_until(1.2) == 1.5
    assert delayer.wait_until(1.5) <= 1.5


def test_a_new_request_counts_as_the_client_that_has_been_expected_for_longest() -> None:
    delayer = BatchDelayer(WINDOW_S)
    for request in ("a", "b"):
        delayer.on_admit(request)
        delayer.on_submit(request)
    for request, end in (("a", 1.0), ("b", 1.1)):
        delayer.on_answer(request)
        delayer.on_close(request, now=end)
    delayer.on_admit("c")
    delayer.on_submit("c")
    assert delayer.wait_until(1.2) == 1.6
    delayer.on_admit("d")
    delayer.on_submit("d")
    assert delayer.wait_until(1.2) <= 1.2
