"""What a wheel holds: every package of the repository, and the specs."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_part_of_the_wheel() -> None:
    listed = set(SETTINGS["packages"])
    for package, folder in (
        ("mal_train", "mal_train"),
        ("mal_server", "mal_server"),
        ("mal_client", "clients/mal_client"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).parent.parts
            assert ".".join((package, *parts)) in listed, path


def test_every_shipped_spec_is_package_data() -> None:
    patterns = SETTINGS["package-data"]["mal_train.specs"]
    for path in (ROOT / "mal_train" / "specs").glob("[!_]*.*"):
        if path.suffix != ".py":
            assert any(path.match(pattern) for pattern in patterns), path
