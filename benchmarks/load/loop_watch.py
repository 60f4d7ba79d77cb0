"""Measures the callbacks of an event loop, and the lateness of a heartbeat.

The debug mode of asyncio reports slow callbacks by wall time only, and slows the loop down; on a shared machine, a
callback that was not scheduled looks slow. This module measures both wall time and the CPU time of the loop's thread,
which only the code of the server affects.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

SLOW_S = 0.020
BEAT_S = 0.010


@dataclass
class LoopWatch:
    """Statistics of an event loop since the last reset, in seconds.

    Attributes:
        callbacks: number of callbacks.
        slow: (wall time, CPU time, description) of callbacks with a wall time of at least SLOW_S.
        longest_s: maximum wall time.
        longest_cpu_s: maximum CPU time.
        lateness_s: lateness of each heartbeat.
    """

    callbacks: int = 0
    slow: list[tuple[float, float, str]] = field(default_factory=list)
    longest_s: float = 0.0
    longest_cpu_s: float = 0.0
    lateness_s: list[float] = field(default_factory=list)

    def install(self) -> None:
        """Starts to measure every callback of every loop of this process."""
        inner: Callable[[asyncio.Handle], None] = asyncio.Handle._run

        def run(handle: asyncio.Handle) -> None:
            wall_start, cpu_start = time.perf_counter(), time.thread_time()
            try:
                inner(handle)
            finally:
                wall, cpu = time.perf_counter() - wall_start, time.thread_time() - cpu_start
                self.callbacks += 1
                self.longest_s = max(self.longest_s, wall)
                self.longest_cpu_s = max(self.longest_cpu_s, cpu)
                if wall >= SLOW_S:
                    self.slow.append((wall, cpu, repr(handle)[:300]))

        setattr(asyncio.Handle, "_run", run)  # noqa: B010  no public hook measures CPU time

    async def beat(self) -> None:
        """Measures the lateness of a heartbeat until it is cancelled."""
        while True:
            due = time.perf_counter() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self.lateness_s.append(max(time.perf_counter() - due, 0.0))

    def reset(self) -> None:
        """Resets the statistics, to exclude loading and warm-up."""
        self.callbacks, self.longest_s, self.longest_cpu_s = 0, 0.0, 0.0
        self.slow.clear()
        self.lateness_s.clear()
