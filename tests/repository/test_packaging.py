"""The wheel holds every package of the repository, and the specs; it requires no version that no test ran with."""

import re
import tomllib

from setuptools import find_packages

from tests.deploy.test_locks import LOCKS, canonical, versions
from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETTINGS = PROJECT["tool"]["setuptools"]


def test_every_package_is_part_of_the_wheel() -> None:
    find = SETTINGS["packages"]["find"]
    found = {name for where in find["where"] for name in find_packages(str(ROOT / where), include=find["include"])}
    expected = {
        ".".join(path.relative_to(ROOT / where).parent.parts)
        for where, package in ((".", "mal_train"), (".", "mal_server"), ("clients", "mal_client"), ("protos", "mal"))
        for path in (ROOT / where / package).rglob("*.py")
    }
    assert found == expected


def test_every_shipped_spec_is_package_data() -> None:
    patterns = SETTINGS["package-data"]["mal_train.specs"]
    for path in (ROOT / "mal_train" / "specs").glob("[!_]*.*"):
        if path.suffix != ".py":
            assert any(path.match(pattern) for pattern in patterns), path


def bounds(lines: list[str]) -> dict[str, str]:
    """Returns the lower bound of each requirement, by name."""
    found = (re.match(r"([\w.-]+)>=([\w.]+)", line) for line in lines)
    return {canonical(match[1]): match[2] for match in found if match}


def test_the_lower_bounds_of_the_client_are_the_versions_of_the_oldest_environment() -> None:
    oldest = versions(LOCKS / "oldest.txt")
    required = bounds(PROJECT["project"]["dependencies"])
    assert len(required) == len(PROJECT["project"]["dependencies"])
    for name, bound in required.items():
        assert (oldest[name] + ".").startswith(bound + "."), f"{name}: run `make lock`"


def test_the_lower_bounds_of_every_extra_are_the_versions_of_the_tests() -> None:
    # PyTorch's bound is older, because users pin it to their CUDA; tests of networks, losses and imports ran with it.
    constraints = versions(ROOT / "constraints.txt") | {"torch": "2.6", "torchvision": "0.21"}
    for extra, lines in PROJECT["project"]["optional-dependencies"].items():
        for name, bound in bounds(lines).items():
            assert (constraints[name] + ".").startswith(bound + "."), f"{extra}: {name} was not tested with {bound}"
