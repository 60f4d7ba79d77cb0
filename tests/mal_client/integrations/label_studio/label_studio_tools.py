"""Finds the real Label Studio and a browser for the tests that need them."""

import os
import shutil
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


def needs_browser() -> str:
    """Returns the path of Chromium; skips the test if it is not installed."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on the path; install Debian's package chromium")
    return executable
