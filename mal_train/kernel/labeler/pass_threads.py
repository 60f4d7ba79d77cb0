"""Distributes forward passes on the CPU over threads: one core for each of many passes, all cores for a lone one.

A pass on one core has no barriers at which threads wait for each other, so it is steady beside other busy threads, and
two such passes are faster than one on two cores. A lone pass on all cores ends sooner, but only while the cores are
idle: a thread that another process displaces holds up all others at each barrier. Whether that happens is measured
during the pass itself (`SharedCores`).
"""

import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, Generic, TypeVar

import torch

Batch = TypeVar("Batch")
Result = TypeVar("Result")

MIN_RUNNING_SHARE: Final = 0.7
"""Share of a pass on several cores in which its first thread must run or spin. Measured on two cores with
`threads.spin_briefly`: 0.93 to 1.0 on an idle machine, 0.3 to 0.54 beside one busy process."""
FIRST_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 30.0

START_S: Final = 60.0
"""Time for the threads of a pool to start."""


class SharedCores:
    """Decides whether a pass may use several cores: not for a while after other threads held up such a pass.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause_s = 0.0
        self._paused_until = -float("inf")

    @property
    def are_idle(self) -> bool:
        """True unless a pass on several cores was held up recently."""
        return self._clock() >= self._paused_until

    def record(self, running_share: float) -> None:
        """Records a pass on several cores.

        Args:
            running_share: CPU time of its first thread, divided by its duration.
        """
        if running_share >= MIN_RUNNING_SHARE:
            self._pause_s = 0.0
            return
        self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), MAX_PAUSE_S)
        self._paused_until = self._clock() + self._pause_s


class PassThreads:
    """Threads for the forward passes of one calling thread.

    Args:
        count: number of threads that compute at a time.
        cores: state of the cores.
    """

    def __init__(self, count: int, cores: SharedCores | None = None) -> None:
        self.count = count
        self._cores = cores or SharedCores()
        self._pools: dict[int, ThreadPoolExecutor] = {}
        """Pools by the threads of a pass, each for `count` threads together."""

    def run(
        self, function: Callable[[Batch], Result], batches: Sequence[Batch], *, one_core_each: bool = False
    ) -> list[Result]:
        """Returns the result of each batch, in order. After an error no pass runs any more.

        Args:
            function: runs one pass.
            batches: arguments of the passes.
            one_core_each: never use several cores for one pass; its bits then do not depend on `count`.
        """
        per_pass = 1 if one_core_each else self.threads_per_pass(len(batches))
        if per_pass == self.count:
            return [self._measured(function, batch) for batch in batches]
        pool = self._pool(per_pass)
        futures = [pool.submit(self._measured if per_pass > 1 else _call, function, batch) for batch in batches]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def threads_per_pass(self, passes: int) -> int:
        """Returns the number of threads of each of several passes that run at a time: a power of two, or all."""
        share = self.count // max(passes, 1)
        if share <= 1 or not self._cores.are_idle:
            return 1
        return self.count if passes == 1 else 1 << (share.bit_length() - 1)

    def _measured(self, function: Callable[[Batch], Result], batch: Batch) -> Result:
        began, cpu_began = time.perf_counter(), time.thread_time()
        result = function(batch)
        if self.count > 1:
            self._cores.record((time.thread_time() - cpu_began) / (time.perf_counter() - began))
        return result

    def _pool(self, per_pass: int) -> ThreadPoolExecutor:
        if per_pass not in self._pools:
            size = self.count // per_pass
            pool = ThreadPoolExecutor(size, "pass", initializer=_set_own_threads, initargs=(per_pass, self.count))
            # All threads have started when this returns: none changes the number for new threads later.
            started = threading.Barrier(size)
            for waiting in [pool.submit(started.wait, START_S) for _ in range(size)]:
                waiting.result()
            self._pools[per_pass] = pool
        return self._pools[per_pass]


class EqualBits(Generic[Result]):
    """Runs lone passes on all cores where that gives the same bits as one core.

    Matrix kernels may add in another order on another number of cores, and in float32 the mask of a box must not depend
    on how many passes run beside its own. Which kernel runs depends on shapes only, so the first pass of a kind runs
    both ways, and decides for all later ones. Several threads may share an object: at worst each of them decides for a
    kind, with the same result.

    Args:
        are_equal: compares two results to the bit.
    """

    def __init__(self, are_equal: Callable[[Result, Result], bool]) -> None:
        self._are_equal = are_equal
        self._kinds: dict[Hashable, bool] = {}

    def run(self, threads: PassThreads, function: Callable[[Batch], Result], batch: Batch, kind: Hashable) -> Result:
        """Returns the result of one pass, with the bits of a pass on one core.

        Args:
            threads: threads of the pass.
            function: runs the pass.
            batch: its argument.
            kind: all that the shapes in the pass depend on.
        """
        if threads.threads_per_pass(1) == 1:
            return threads.run(function, [batch], one_core_each=True)[0]
        kind = (threads.count, kind)
        if self._kinds.get(kind, False):
            return threads.run(function, [batch])[0]
        alone = threads.run(function, [batch], one_core_each=True)[0]
        if kind not in self._kinds:
            self._kinds[kind] = self._are_equal(alone, function(batch))
        return alone


def pass_threads() -> PassThreads:
    """Returns the threads for the passes of the calling thread, as many as `torch.get_num_threads()`."""
    count = torch.get_num_threads()
    threads: PassThreads | None = getattr(_of_this_thread, "threads", None)
    # A forked process has none of the threads.
    if threads is None or threads.count != count or _of_this_thread.pid != os.getpid():
        threads = _of_this_thread.threads = PassThreads(count)
        _of_this_thread.pid = os.getpid()
    return threads


_of_this_thread = threading.local()


def pass_sizes(crops: int, max_crops: int, threads: int) -> list[int]:
    """Returns the number of crops in each pass: about equal, and a pass for each thread if there are crops enough.

    >>> pass_sizes(16, 10, 2), pass_sizes(7, 3, 2), pass_sizes(3, 10, 4)
    ([8, 8], [2, 2, 2, 1], [1, 1, 1])
    """
    parallel = min(threads, crops)
    passes = min(-(-crops // (max_crops * parallel)) * parallel, crops)
    return [crops // passes + (index < crops % passes) for index in range(passes)]


def _call(function: Callable[[Batch], Result], batch: Batch) -> Result:
    return function(batch)


def _set_own_threads(count: int, others: int) -> None:
    """Sets the number of torch threads of the calling thread, and leaves it as it is for threads that start later."""
    # A thread takes the number that any thread set last, unless it has asked for it before it sets its own.
    torch.get_num_threads()
    torch.set_num_threads(count)
    restoring = threading.Thread(target=torch.set_num_threads, args=(others,))
    restoring.start()
    restoring.join()
