"""Load and fault tests, each in a short form (`make test`) and a full one (`make chaos`, which sets MAL_CHAOS=full).

Every test prints its measurements and its seed; `make chaos` shows them. The short form asserts nothing that depends on
the speed of the machine. The full form also asserts times and needs an otherwise idle machine.
"""

from pathlib import Path

import pytest

from benchmarks.load.run import fake_server_images
from tests.form import FORM, Form

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
def deck_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with images, boxes and their expected masks."""
    folder = tmp_path_factory.mktemp("deck")
    fake_server_images(folder, seed=FORM.seed)
    return folder
