"""Short pauses between attempts, and no connections of other tests."""

from collections.abc import Iterator

import pytest

from mal_train.core.storage import retry, web_store


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    yield
    web_store.close_sessions()
