"""The byte-bounded cache."""

import hashlib
import random
import threading

from mal_train.core.lru import LruCache, sha256_of


def test_the_least_recently_used_entries_are_evicted_until_the_new_one_fits() -> None:
    cache = LruCache[int](max_bytes=30)
    for key, size in (("a", 10), ("b", 5), ("c", 15)):
        cache.put(key, size, size)
    assert cache.get("a") == 10
    cache.put("d", 20, 20)
    assert [key in cache for key in "abcd"] == [True, False, False, True]
    assert cache.size_bytes == 30


def test_a_membership_test_does_not_mark_an_entry_as_used() -> None:
    cache = LruCache[int](max_bytes=2)
    cache.put("a", 1, 1)
    cache.put("b", 1, 1)
    assert "a" in cache
    cache.put("c", 1, 1)
    assert "a" not in cache


def test_a_replaced_entry_counts_once() -> None:
    cache = LruCache[int](max_bytes=10)
    cache.put("a", 1, 6)
    cache.put("a", 2, 7)
    assert (cache.get("a"), cache.size_bytes) == (2, 7)


def test_a_discarded_entry_frees_its_bytes() -> None:
    cache = LruCache[int](max_bytes=10)
    cache.put("a", 1, 6)
    for _ in range(2):
        cache.discard("a")
    assert (cache.get("a"), cache.size_bytes) == (None, 0)


def test_an_entry_over_the_limit_is_dropped_and_evicts_nothing() -> None:
    cache = LruCache[int](max_bytes=10)
    cache.put("a", 1, 10)
    cache.put("b", 2, 11)
    assert (cache.get("a"), cache.get("b")) == (1, None)


def test_the_newest_entry_is_kept_over_the_limit_on_request() -> None:
    cache = LruCache[int](max_bytes=10, keep_newest=True)
    cache.put("a", 1, 10)
    cache.put("b", 2, 11)
    assert (cache.get("a"), cache.get("b"), cache.size_bytes) == (None, 2, 11)


def test_a_limit_of_zero_disables_the_cache() -> None:
    cache = LruCache[int](max_bytes=0)
    cache.put("a", 1, 1)
    assert "a" not in cache


def test_threads_never_see_a_size_over_the_limit() -> None:
    cache = LruCache[int](max_bytes=1000)
    peaks = []

    def fill(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(2000):
            cache.put(str(rng.randrange(50)), 0, rng.randrange(1, 300))
            cache.discard(str(rng.randrange(50)))
            peaks.append(cache.size_bytes)

    threads = [threading.Thread(target=fill, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 500 < max(peaks) <= 1000
    for key in range(50):
        cache.discard(str(key))
    assert cache.size_bytes == 0


def test_the_key_is_the_sha256_in_lower_case_hex() -> None:
    assert sha256_of(b"content") == hashlib.sha256(b"content").hexdigest()
