"""Ends a process whose event loop stands still, so that its supervisor starts a new one."""

import asyncio
import faulthandler
import os
import socket
from collections.abc import Callable

STDERR = 2
"""File descriptor; sys.stderr may be replaced by an object without one."""


async def watch_loop(limit_s: float) -> None:
    """Ends the process with exit code 1 once the event loop stood still for `limit_s` seconds; runs until cancelled.

    Writes the stack of every thread to stderr first. The timer is a thread of C code that needs no GIL, so that it also
    ends a process in which a library holds the GIL forever. It does not run in a stopped process (SIGSTOP): as a
    service of systemd with WatchdogSec, this function also sends a message at each round, which then fails to appear.

    Args:
        limit_s: 0: only the messages.
    """
    send, expected_s = _systemd()
    limits = [limit for limit in (limit_s, expected_s) if limit > 0]
    if not limits:
        return
    try:
        while True:
            if limit_s > 0:
                faulthandler.dump_traceback_later(limit_s, exit=True, file=STDERR)
            send()
            await asyncio.sleep(min(limits) / 4)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _systemd() -> tuple[Callable[[], None], float]:
    """Returns the function that sends systemd a sign of life, and the interval in s at which it expects one; 0: none.

    Source: sd_notify(3), sd_watchdog_enabled(3).
    """
    path, expected_us = os.environ.get("NOTIFY_SOCKET"), os.environ.get("WATCHDOG_USEC", "")
    if not path or not expected_us.isdecimal():
        return lambda: None, 0.0
    address = "\0" + path[1:] if path.startswith("@") else path

    def send() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as one:
            try:
                one.sendto(b"WATCHDOG=1", address)
            # A full or missing socket: the next round tries again, and systemd restarts the service without any.
            except OSError:
                return

    return send, int(expected_us) / 1e6
