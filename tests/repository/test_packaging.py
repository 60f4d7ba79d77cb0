"""The wheel holds every package of the repository, and the specs."""

import tomllib

from setuptools import find_packages

from tests.paths import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


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
