"""The memory of long calls: sizes that prove smaller or larger than estimated."""

import pytest

from mal_server.errors import CallTooLarge
from mal_server.scheduling.memory_quota import MemoryQuota


@pytest.mark.parametrize("size", [-1, 7])
def test_no_more_is_given_back_than_is_held(size: int) -> None:
    quota = MemoryQuota(10, "max_evaluation_bytes")
    with quota.reserve() as memory:
        memory.grow(6)
        with pytest.raises(ValueError, match=str(size)):
            memory.shrink(size)
        with pytest.raises(ValueError, match="-1"):
            memory.grow(-1)
        assert (memory.size, quota.used) == (6, 6)
    assert quota.used == 0


def test_a_size_above_its_estimate_is_charged_like_any_other() -> None:
    quota = MemoryQuota(10, "max_evaluation_bytes")
    with quota.reserve() as memory:
        memory.grow(6)
        memory.adjust(-2)
        assert quota.used == 4
        memory.adjust(3)
        assert quota.used == 7
        with pytest.raises(CallTooLarge):
            memory.adjust(4)
        assert quota.used == 7
    assert quota.used == 0
