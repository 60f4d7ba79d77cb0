"""Finds the reference material (published outputs, COCO subsets, weights), which is not part of the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("MAL_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))


def shared(*parts: str) -> Path:
    """Path below the reference folder ($MAL_SHARED, else ../shared). Skips the test where the folder is absent.

    Where the folder exists a missing file is a failure: a parity test must not vanish in silence.
    """
    if not ROOT.is_dir():
        pytest.skip(f"reference material not found at {ROOT}; set MAL_SHARED to its folder")
    path = ROOT.joinpath(*parts)
    if not path.exists():
        pytest.fail(f"{path} is missing although {ROOT} exists")
    return path


def fixture(name: str) -> Path:
    """Path of one output of the published implementations."""
    return shared("oracle", "fixtures", name)
