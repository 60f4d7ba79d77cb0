"""CI installs the programs of other projects, and a test that misses one fails there instead of being skipped."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.tools import PACKAGES, find_program, missing, module


def test_a_missing_tool_skips_a_test_and_fails_it_where_tools_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAL_REQUIRE_TOOLS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_module"):
        module("no_such_module")
    monkeypatch.setenv("MAL_REQUIRE_TOOLS", "1")
    with pytest.raises(pytest.fail.Exception, match="remedy"):
        missing("x", "remedy")


def test_ci_installs_the_tools_and_requires_them_before_the_first_test() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    first_test = next(n for n, line in enumerate(lines) if line.startswith("make test"))
    assert {"make tools", "export MAL_REQUIRE_TOOLS=1"} <= set(lines[:first_test])
    assert "make test-proxies" in lines


def test_the_packages_of_missing_programs_are_listed(tmp_path: Path) -> None:
    for name in ("prometheus", "promtool"):
        (tmp_path / name).touch(mode=0o755)
    line = [sys.executable, "-I", str(ROOT / "tests" / "tools.py")]
    done = subprocess.run(line, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    in_system_folder = {package for name, package in PACKAGES.items() if Path("/usr/sbin", name).exists()}
    assert set(done.stdout.split()) == set(PACKAGES.values()) - {"prometheus"} - in_system_folder


def test_another_name_of_a_browser_serves_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "google-chrome").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program("chromium") == str(tmp_path / "google-chrome")
