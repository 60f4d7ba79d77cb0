"""Compares the fingerprints of two jobs: the settings and inputs that their results depend on."""

from collections.abc import Mapping
from typing import Any

DESCRIPTIONS = frozenset({"score"})
"""Keys whose value describes other settings in words, which may differ between versions. They are not compared."""

UNRECORDED: Mapping[str, Any] = {"network_engine": "torch"}
"""Values of keys in the jobs of versions that did not record them."""


def differences(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Describes each key whose values differ, in the order of `actual`, then of `expected`.

    A missing key has its value in `UNRECORDED`, or None.

    >>> differences({"seed": 1, "threshold": 0.5}, {"seed": 1, "threshold": 0.4, "flip": True})
    ['threshold 0.5 instead of 0.4', 'flip None instead of True']
    """
    values = {key: [job.get(key, UNRECORDED.get(key)) for job in (actual, expected)] for key in {**actual, **expected}}
    return [
        f"{key} {is_value!r} instead of {expected_value!r}"
        for key, (is_value, expected_value) in values.items()
        if key not in DESCRIPTIONS and is_value != expected_value
    ]
