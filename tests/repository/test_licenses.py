"""The license check finds what the list does not allow, in each form in which packages state licenses."""

import re
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.repository.licenses import EXCEPTIONS, findings, installed, stated


def package(folder: Path, name: str, *lines: str) -> Distribution:
    info = folder / f"{name}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1", *lines, ""]))
    return Distribution.at(info)


@pytest.mark.parametrize(
    ("lines", "licenses"),
    [
        (["License-Expression: MIT AND PSF-2.0"], ["MIT", "PSF-2.0"]),
        (["Classifier: License :: OSI Approved :: BSD License"], ["BSD-3-Clause"]),
        (["License: Apache 2.0"], ["Apache-2.0"]),
        ([], ["no license"]),
    ],
)
def test_a_license_is_read_from_each_form_of_metadata(tmp_path: Path, lines: list[str], licenses: list[str]) -> None:
    assert stated(package(tmp_path, "a", *lines)) == licenses


def test_a_package_with_another_license_is_found_and_an_exception_is_not(tmp_path: Path) -> None:
    found = [package(tmp_path, name, "License-Expression: GPL-3.0-only") for name in ("a", *EXCEPTIONS, "nvidia-b")]
    assert [line.split()[0] for line in findings(found)] == ["a"]


def test_every_exception_is_a_package_of_the_lock_file() -> None:
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "deploy" / "locks" / "dev.txt").read_text(), re.MULTILINE))
    assert set(EXCEPTIONS) <= locked


def test_the_installed_packages_have_allowed_licenses() -> None:
    assert list(findings(installed())) == []
