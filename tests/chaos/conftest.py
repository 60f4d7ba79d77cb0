"""Load and faults, each in a short form (`make test`) and a full one (`make chaos`, which sets MAL_CHAOS=full).

Every test prints what it measured, with its seed; `make chaos` shows the lines. The short form claims nothing that
depends on the machine's speed: it may run beside anything. The full form claims times too, and wants a quiet machine.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from benchmarks.load.run import stand_in_deck

T = TypeVar("T")

SEED = int(os.environ.get("MAL_CHAOS_SEED", "20261125"))


@dataclass(frozen=True)
class Form:
    """Which form runs, and the seed of everything random in it."""

    is_full: bool
    seed: int

    def pick(self, short: T, full: T) -> T:
        """The figure of this form."""
        return full if self.is_full else short


FORM = Form(os.environ.get("MAL_CHAOS") == "full", SEED)
LIMIT_S = FORM.pick(900, 1500)
"""Of one test. Servers are started as processes, which takes a busy machine long."""

TIMED = pytest.mark.skipif(not FORM.is_full, reason="claims a time; `make chaos` takes it on a quiet machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "chaos" in item.path.parts:
            item.add_marker(pytest.mark.timeout(LIMIT_S))


@pytest.fixture(scope="session")
def form() -> Form:
    return FORM


@pytest.fixture(scope="session")
def say() -> Callable[..., None]:
    """Prints a row's figures."""

    def show(row: str, **figures: object) -> None:
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        print(f"\nchaos {row} [{'full' if FORM.is_full else 'short'}, seed {FORM.seed}]: {shown}")

    return show


@pytest.fixture(scope="session")
def deck_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, boxes and their right masks."""
    folder = tmp_path_factory.mktemp("deck")
    stand_in_deck(folder, seed=FORM.seed)
    return folder
