"""Load and fault tests, each in a short form (`make test`) and a full one (`make chaos`, which sets MAL_CHAOS=full).

Every test prints its measurements and its seed; `make chaos` shows them. The short form asserts nothing that depends on
the speed of the machine. The full form also asserts times and needs an otherwise idle machine.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from benchmarks.load.run import fake_server_images

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
LIMIT_S = FORM.pick(900, 1500)
"""Time limit of one test; starting server processes takes long on a busy machine."""

TIMED = pytest.mark.skipif(not FORM.is_full, reason="asserts a time; run `make chaos` on an idle machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "chaos" in item.path.parts:
            item.add_marker(pytest.mark.timeout(LIMIT_S))


@pytest.fixture(scope="session")
def form() -> Form:
    return FORM


@pytest.fixture(scope="session")
def record() -> Callable[..., None]:
    """Prints the measurements of a test."""

    def show(row: str, **values: object) -> None:
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"\nchaos {row} [{'full' if FORM.is_full else 'short'}, seed {FORM.seed}]: {shown}")

    return show


@pytest.fixture(scope="session")
def deck_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with images, boxes and their expected masks."""
    folder = tmp_path_factory.mktemp("deck")
    fake_server_images(folder, seed=FORM.seed)
    return folder
