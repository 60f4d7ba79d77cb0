"""Differences between the settings of two jobs."""

from mal_train.core.fingerprint import differences


def test_equal_fingerprints_have_no_differences() -> None:
    assert differences({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}) == []


def test_changed_missing_and_added_keys_are_named_with_both_values() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 3, "c": "x"}) == [
        "a 1 instead of 3",
        "b 2 instead of None",
        "c None instead of 'x'",
    ]
