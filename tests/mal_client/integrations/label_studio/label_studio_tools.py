"""Where the real Label Studio and a browser are, for the tests that need them."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.paths import ROOT


@dataclass(frozen=True)
class Tools:
    """An environment of its own with Label Studio and playwright, as `make tools-labelstudio` makes it."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def label_studio(self) -> Path:
        """Its server."""
        return self.folder / "bin" / "label-studio"

    @property
    def empty_data(self) -> Path:
        """A data folder whose database is made, without users and projects."""
        return self.folder / "data"


def needs_label_studio() -> Tools:
    """The environment; skips the test where there is none."""
    tools = Tools(Path(os.environ.get("MAL_LABEL_STUDIO", ROOT / ".venv-labelstudio")))
    if not tools.label_studio.exists():
        pytest.skip(f"no Label Studio in {tools.folder}; run make tools-labelstudio, or set MAL_LABEL_STUDIO")
    return tools


def needs_browser() -> str:
    """A Chromium; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on the path; install Debian's package chromium")
    return found
