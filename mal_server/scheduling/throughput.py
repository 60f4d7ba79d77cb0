"""Estimates queueing time from the speed of recent batches. Reads no clock."""

MIN_RETRY_S = 0.05
MAX_RETRY_S = 60.0
FIRST_RETRY_S = 1.0
"""Retry delay for refused requests until a batch has been measured."""

RATE_WEIGHT = 0.2
"""Weight of the latest batch in the moving averages."""


class Throughput:
    """Exponential moving averages of items per second and of the duration of a batch.

    Args:
        runner_count: batches that run at a time.
        max_batch_size: items in a full batch.
    """

    def __init__(self, runner_count: int, max_batch_size: int) -> None:
        self._runner_count = runner_count
        self._max_batch_size = max_batch_size
        self._items_per_s: float | None = None
        self._batch_s = 0.0

    def record(self, size: int, took_s: float) -> None:
        """Adds a batch of `size` items that succeeded."""
        rate = size / max(took_s, 1e-6)
        if self._items_per_s is None:
            self._items_per_s, self._batch_s = rate, took_s
        else:
            self._items_per_s += RATE_WEIGHT * (rate - self._items_per_s)
            self._batch_s += RATE_WEIGHT * (took_s - self._batch_s)

    def wait_s(self, items_ahead: int) -> float:
        """Returns the time of the full batches ahead; an underestimate if recent batches were small."""
        return items_ahead // (self._max_batch_size * self._runner_count) * self._batch_s

    def retry_after_s(self, excess_items: float) -> float:
        """Returns the time to process `excess_items`, between MIN_RETRY_S and MAX_RETRY_S."""
        if self._items_per_s is None:
            return FIRST_RETRY_S
        return min(max(excess_items / (self._items_per_s * self._runner_count), MIN_RETRY_S), MAX_RETRY_S)
