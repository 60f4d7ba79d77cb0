"""Request priorities, the same in every queue of the server."""

from enum import Enum


class Priority(Enum):
    """Priority of a request: INTERACTIVE for single images, BATCH for bulk streams and evaluations."""

    INTERACTIVE = "interactive"
    BATCH = "batch"
