"""The watchdog: a loop that stands still ends the process, also with the GIL held; a live one reports to systemd."""

import asyncio
import faulthandler
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.run import environment
from mal_server.config.server import ServerConfig
from mal_server.lifecycle import serve
from mal_server.ops.watchdog import watch_loop
from tests.mal_server.fakes import config_of

HUNG = """
import asyncio, ctypes
from mal_server.ops.watchdog import watch_loop

def hold_the_gil():
    ctypes.PyDLL(None).sleep(300)

async def main():
    watching = asyncio.ensure_future(watch_loop(1.0))
    await asyncio.sleep(0)
    hold_the_gil()

asyncio.run(main())
"""


@pytest.mark.promise("faults", "A process whose event loop hangs ends itself, also while code holds Python's lock")
def test_a_loop_that_stands_still_with_the_gil_held_ends_the_process_and_shows_the_code_that_holds_it() -> None:
    done = subprocess.run([sys.executable, "-c", HUNG], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "hold_the_gil" in done.stderr


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns the limits with which the timer is set; 0 at its end. No timer runs."""
    limits: list[float] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda limit, **_: limits.append(limit))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: limits.append(0))
    return limits


def test_the_timer_is_set_again_while_the_loop_runs_and_ended_with_it(armed: list[float]) -> None:
    async def work() -> None:
        watching = asyncio.ensure_future(watch_loop(0.01))
        while len(armed) < 3:
            await asyncio.sleep(0.001)
        watching.cancel()
        await asyncio.wait([watching])

    asyncio.run(work())
    assert set(armed[:-1]) == {0.01}
    assert armed[-1] == 0


def test_no_timer_is_set_without_a_limit(armed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    asyncio.run(watch_loop(0))
    assert armed == []


def test_systemd_gets_a_message_at_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, armed: list[float]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "10000")

        async def work() -> list[bytes]:
            watching = asyncio.ensure_future(watch_loop(0))
            received = [await asyncio.get_running_loop().sock_recv(systemd, 100) for _ in range(3)]
            watching.cancel()
            return received

        assert asyncio.run(work()) == [b"WATCHDOG=1"] * 3


def test_a_message_that_systemd_cannot_take_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, armed: list[float]
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nothing"))
    monkeypatch.setenv("WATCHDOG_USEC", "10000")
    test_the_timer_is_set_again_while_the_loop_runs_and_ended_with_it(armed)


def test_the_server_is_watched_from_before_its_models_are_loaded(armed: list[float]) -> None:
    class Stopped(Exception):
        pass

    def load(plan: Any) -> Any:
        assert armed == [ServerConfig().watchdog_s]
        raise Stopped

    with pytest.raises(Stopped):
        asyncio.run(serve(config_of(), load=load))
    assert armed[-1] == 0
