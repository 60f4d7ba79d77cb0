"""Events of the batcher, for metrics."""

from typing import Protocol


class BatchObserver(Protocol):
    """Receives events for metrics."""

    def batch_ended(self, size: int, took_s: float) -> None:
        """Records a batch of `size` items that succeeded."""

    def waited(self, priority: str, seconds: float) -> None:
        """Records the longest wait of a request's items in one batch."""

    def dropped(self, reason: str, count: int) -> None:
        """Records items whose results are not read.

        Args:
            reason: CAUSE_STAGE, such as `deadline_queue`. Causes are cancelled and deadline. Stages are entry (before
                the items are queued), queue, device (the items ran, but their results are discarded) and encoding.
            count: number of items.
        """


class NullObserver:
    """Ignores all events."""

    def batch_ended(self, size: int, took_s: float) -> None:
        """Does nothing."""

    def waited(self, priority: str, seconds: float) -> None:
        """Does nothing."""

    def dropped(self, reason: str, count: int) -> None:
        """Does nothing."""
