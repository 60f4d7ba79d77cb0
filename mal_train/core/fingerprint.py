"""Compares the fingerprints of two jobs: the settings and inputs that their results depend on."""

from collections.abc import Mapping
from typing import Any

DESCRIPTIONS = frozenset({"score"})
"""Keys whose value describes other settings in words, which may differ between versions. They are not compared."""


def differences(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Describes each key whose values differ, in the order of `actual`, then of `expected`; a missing key is None.

    >>> differences({"seed": 1, "threshold": 0.5}, {"seed": 1, "threshold": 0.4, "flip": True})
    ['threshold 0.5 instead of 0.4', 'flip None instead of True']
    """
    return [
        f"{key} {actual.get(key)!r} instead of {expected.get(key)!r}"
        for key in {**actual, **expected}
        if key not in DESCRIPTIONS and actual.get(key) != expected.get(key)
    ]
