"""Claims about terminal output and progress."""

import io
from collections.abc import Callable
from typing import Any

import pytest

from mal_train.core.console import Console, escape_control, print_result


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(work: Callable[[Any, Clock], None], **options: Any) -> list[str]:
    """Returns the lines of a progress bar of 100 items without a terminal."""
    stream, clock = io.StringIO(), Clock()
    with Console(stream).progress(100, "item", "job", clock=clock, **options) as bar:
        work(bar, clock)
    return stream.getvalue().splitlines()


def test_without_a_terminal_a_line_is_printed_every_few_seconds_and_for_the_last_item() -> None:
    def work(bar: Any, clock: Clock) -> None:
        for done in range(1, 101):
            clock.now += 1.0
            bar.update_to(done)

    lines = lines_of(work, line_every_s=40.0)
    assert lines == [
        "job: item 40/100, 1.00 s/item, 01:00 left",
        "job: item 80/100, 1.00 s/item, 00:20 left",
        "job: item 100/100, 1.00 s/item, 00:00 left",
    ]


def test_items_done_before_do_not_count_into_the_rate() -> None:
    def work(bar: Any, clock: Clock) -> None:
        clock.now = 10.0
        bar.update_to(70)

    assert lines_of(work, initial=50, line_every_s=5.0) == ["job: item 70/100, 2.00 item/s, 00:15 left"]


def test_a_restarted_rate_ignores_the_time_and_the_items_before() -> None:
    def work(bar: Any, clock: Clock) -> None:
        clock.now = 500.0
        bar.restart_rate(1)
        clock.now = 510.0
        bar.update_to(21)

    assert lines_of(work, line_every_s=5.0) == ["job: item 21/100, 2.00 item/s, 00:39 left"]


def test_a_rate_that_restarts_with_every_item_does_not_suppress_the_lines() -> None:
    def work(bar: Any, clock: Clock) -> None:
        for done in range(1, 13):
            clock.now += 1.0
            bar.restart_rate(done)
            bar.update_to(done)

    assert lines_of(work, line_every_s=5.0) == ["job: item 5/100", "job: item 10/100"]


def test_a_restarted_rate_may_postpone_the_next_line() -> None:
    def work(bar: Any, clock: Clock) -> None:
        clock.now = 500.0
        bar.restart_rate(1, postpone_line=True)
        bar.update_to(1)
        clock.now = 506.0
        bar.update_to(4)

    assert lines_of(work, line_every_s=5.0) == ["job: item 4/100, 2.00 s/item, 03:12 left"]


@pytest.mark.parametrize("steps", [100, 3])
def test_items_that_are_counted_one_by_one_end_with_one_last_line(steps: int) -> None:
    def work(bar: Any, clock: Clock) -> None:
        clock.now = 1.0
        for _ in range(steps):
            bar.update()

    lines = ["job: item 100/100, 100.00 item/s, 00:00 left"] if steps == 100 else []
    assert lines_of(work, line_every_s=40.0) == lines


def test_before_the_first_measurement_a_line_has_no_rate() -> None:
    assert lines_of(lambda bar, _: bar.update_to(100)) == ["job: item 100/100"]


def test_details_are_computed_only_for_lines_that_are_printed() -> None:
    calls: list[int] = []

    def details() -> str:
        calls.append(1)
        return "loss 0.5"

    def work(bar: Any, clock: Clock) -> None:
        for done in range(1, 101):
            clock.now += 1.0
            bar.update_to(done, details)

    lines = lines_of(work, line_every_s=40.0)
    assert len(lines) == len(calls) == 3
    assert all(line.endswith(", loss 0.5") for line in lines)


def test_on_a_terminal_progress_is_a_bar_that_lines_do_not_tear() -> None:
    stream = Terminal()
    console = Console(stream)
    with console.progress(3, "item", "job") as bar:
        bar.update_to(2, lambda: "half way")
        console.print("a message")
        bar.update_to(3, lambda: "half way")
    assert "a message\n" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "half way" in stream.getvalue()


def test_a_silent_console_keeps_nothing() -> None:
    console = Console.silent()
    console.print("a message")
    assert isinstance(console.stream, io.StringIO)
    assert console.stream.getvalue() == ""


def test_a_console_works_after_stderr_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    Console().print("a message")


def test_without_a_terminal_a_message_does_not_redraw_the_progress() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(stream)
    with console.progress(100, "item", "job", clock=clock) as bar:
        bar.update_to(1)
        console.print("a message")
    assert stream.getvalue() == "a message\n"


HOSTILE = "cat\x1b]0;owned\x07\x9b2J\u202etxt\r\x00\udce9.png"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_of_names_reach_no_terminal(is_terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal() if is_terminal else io.StringIO()
    console = Console(stream)
    console.print(HOSTILE)
    with console.progress(2, "item", HOSTILE) as bar:
        bar.update_to(1, lambda: HOSTILE, HOSTILE)
        bar.update_to(2)
    print_result(HOSTILE)
    shown = stream.getvalue() + capsys.readouterr().out
    assert not set("\x07\x9b\u202e\x00\udce9") & set(shown)
    assert "\x1b]" not in shown
    assert r"cat\x1b]0;owned\x07\x9b2J\u202etxt\r\x00\udce9.png" in shown


def test_ordinary_text_is_printed_as_it_is() -> None:
    text = "é 猫\t3 %\nsecond line"
    assert escape_control(text) == text
