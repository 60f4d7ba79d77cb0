"""Watches an event loop from inside: how long its callbacks take, and how late a heartbeat comes.

asyncio's own debug mode reports slow callbacks by the clock alone and slows everything down; on a machine shared with
others a callback that was merely not scheduled looks slow in it. So both are measured: the clock, and the CPU time of
the loop's thread, which is what the server's code answers for.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

SLOW_S = 0.020
BEAT_S = 0.010


@dataclass
class LoopWatch:
    """Figures since the watch began, in seconds.

    Attributes:
        callbacks: how many ran.
        slow: (wall, CPU, what) of those that took SLOW_S or longer by the clock.
        longest_s: by the clock.
        longest_cpu_s: by CPU time.
        lateness_s: of each heartbeat.
    """

    callbacks: int = 0
    slow: list[tuple[float, float, str]] = field(default_factory=list)
    longest_s: float = 0.0
    longest_cpu_s: float = 0.0
    lateness_s: list[float] = field(default_factory=list)

    def install(self) -> None:
        """Times every callback of every loop of this process from now on."""
        inner: Callable[[asyncio.Handle], None] = asyncio.Handle._run

        def run(handle: asyncio.Handle) -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                inner(handle)
            finally:
                took, spent = time.perf_counter() - wall, time.thread_time() - cpu
                self.callbacks += 1
                self.longest_s = max(self.longest_s, took)
                self.longest_cpu_s = max(self.longest_cpu_s, spent)
                if took >= SLOW_S:
                    self.slow.append((took, spent, repr(handle)[:300]))

        setattr(asyncio.Handle, "_run", run)  # noqa: B010  no public hook gives the CPU time

    async def beat(self) -> None:
        """Measures by how much a heartbeat comes late, until cancelled."""
        while True:
            due = time.perf_counter() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self.lateness_s.append(max(time.perf_counter() - due, 0.0))

    def forget(self) -> None:
        """Starts anew: loading and warm-up are no load."""
        self.callbacks, self.longest_s, self.longest_cpu_s = 0, 0.0, 0.0
        self.slow.clear()
        self.lateness_s.clear()
