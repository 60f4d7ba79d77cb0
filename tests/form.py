"""The form in which load and fault tests run: short, or full with MAL_CHAOS=full, which `make chaos` sets."""

import os
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

SEED = int(os.environ.get("MAL_CHAOS_SEED", "20261125"))


@dataclass(frozen=True)
class Form:
    """The form that runs, and the seed of all its random choices."""

    is_full: bool
    seed: int

    def pick(self, short: T, full: T) -> T:
        """Returns the value for this form."""
        return full if self.is_full else short


FORM = Form(os.environ.get("MAL_CHAOS") == "full", SEED)
