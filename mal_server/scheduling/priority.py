"""Who goes first, in every queue of the server."""

from enum import Enum


class Priority(Enum):
    """Who goes first."""

    INTERACTIVE = "interactive"
    BATCH = "batch"
