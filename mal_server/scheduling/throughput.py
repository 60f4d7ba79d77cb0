"""How long work for the runners takes, by the batches that ran so far. Asks no clock."""

MIN_RETRY_S = 0.05
MAX_RETRY_S = 60.0
FIRST_RETRY_S = 1.0
"""Said to refused callers before any batch was measured."""

RATE_WEIGHT = 0.2
"""Weight of the newest batch in the running mean of items per second."""


class Throughput:
    """A running mean of items per second and of the time of a batch.

    Args:
        runner_count: how many batches run at once.
        max_batch_size: items in a full one.
    """

    def __init__(self, runner_count: int, max_batch_size: int) -> None:
        self._runner_count = runner_count
        self._max_batch_size = max_batch_size
        self._items_per_s: float | None = None
        self._batch_s = 0.0

    def ran(self, count: int, took_s: float) -> None:
        """A batch of `count` items ended well."""
        rate = count / max(took_s, 1e-6)
        if self._items_per_s is None:
            self._items_per_s, self._batch_s = rate, took_s
        else:
            self._items_per_s += RATE_WEIGHT * (rate - self._items_per_s)
            self._batch_s += RATE_WEIGHT * (took_s - self._batch_s)

    def wait_s(self, ahead: int) -> float:
        """Time of the full batches that go ahead; rather too little, since batches so far may have been small."""
        return ahead // (self._max_batch_size * self._runner_count) * self._batch_s

    def retry_after_s(self, excess: float) -> float:
        """Time to work off so many items, between MIN_RETRY_S and MAX_RETRY_S."""
        if self._items_per_s is None:
            return FIRST_RETRY_S
        return min(max(excess / (self._items_per_s * self._runner_count), MIN_RETRY_S), MAX_RETRY_S)
