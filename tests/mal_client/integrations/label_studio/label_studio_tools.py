"""Finds the real Label Studio for the tests that need it."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.paths import ROOT


@dataclass(frozen=True)
class Tools:
    """A separate environment with Label Studio and playwright, as `make tools-labelstudio` creates it."""

    folder: Path

    @property
    def python(self) -> Path:
        """Interpreter of the environment."""
        return self.folder / "bin" / "python"

    @property
    def label_studio(self) -> Path:
        """Executable of the Label Studio server."""
        return self.folder / "bin" / "label-studio"

    @property
    def empty_data(self) -> Path:
        """Data folder with an initialized database, without users and projects."""
        return self.folder / "data"


def needs_label_studio() -> Tools:
    """Returns the environment; skips the test if it does not exist."""
    tools = Tools(Path(os.environ.get("MAL_LABEL_STUDIO", ROOT / ".venv-labelstudio")))
    if not tools.label_studio.exists():
        pytest.skip(f"no Label Studio in {tools.folder}; run make tools-labelstudio, or set MAL_LABEL_STUDIO")
    return tools
