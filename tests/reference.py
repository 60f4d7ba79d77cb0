"""Finds the reference material (published outputs, COCO subsets, weights), which is not part of the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("MAL_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))


def shared(*parts: str) -> Path:
    """Returns a path in the reference folder ($MAL_SHARED, default ../shared). Skips the test if there is no folder.

    A missing file in an existing folder fails the test: a parity test must not be skipped silently.
    """
    if not ROOT.is_dir():
        pytest.skip(f"reference material not found at {ROOT}; set MAL_SHARED to its folder")
    path = ROOT.joinpath(*parts)
    if not path.exists():
        pytest.fail(f"{path} is missing although {ROOT} exists")
    return path


def fixture(name: str) -> Path:
    """Returns the path of an output of the published implementations."""
    return shared("oracle", "fixtures", name)
