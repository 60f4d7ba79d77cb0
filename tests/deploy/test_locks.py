"""The lock files: current, complete, with a hash for every file, and used by the image and by CI."""

import re
import tomllib
from pathlib import Path

import dockerfile_parse
import pytest

from tests.paths import ROOT

LOCKS = ROOT / "deploy" / "locks"
NAMES = ("server", "pytorch", "tools", "dev")
ENTRY = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(path: Path) -> dict[str, str]:
    return {canonical(name): version for name, version in ENTRY.findall(path.read_text())}


def required(*extras: str) -> set[str]:
    """Returns the names that pyproject.toml requires with these extras, which may name other extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines, waiting, seen = list(project["dependencies"]), list(extras), set[str]()
    while waiting:
        extra = waiting.pop()
        if extra not in seen:
            seen.add(extra)
            lines += project["optional-dependencies"][extra]
            waiting += [part for line in lines for part in re.findall(r"^mask-auto-labeler\[(.*)\]", line)]
            waiting = [name.strip() for part in waiting for name in part.split(",")]
    names = {re.split(r"[<>=!~\[; ]", line)[0] for line in lines}
    return {canonical(name) for name in names} - {"mask-auto-labeler"}


@pytest.mark.parametrize("name", NAMES)
def test_every_package_of_a_lock_file_has_its_hashes_and_no_source(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text()
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        lines = [line.rstrip(" \\") for line in entry.splitlines()]
        assert ENTRY.match(lines[0])
        assert len(lines) > 1
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in lines[1:])
    assert "://" not in text


def test_lock_files_hold_the_versions_of_the_constraints_and_agree() -> None:
    constraints = versions(ROOT / "constraints.txt")
    for name in NAMES:
        locked = versions(LOCKS / f"{name}.txt")
        assert {key: locked[key] for key in locked.keys() & constraints.keys()} == {
            key: constraints[key] for key in locked.keys() & constraints.keys()
        }, "run `make lock`"
    everything = versions(LOCKS / "dev.txt")
    server = versions(LOCKS / "server.txt") | versions(LOCKS / "pytorch.txt")
    assert server.items() <= everything.items()


def test_lock_files_hold_all_that_the_project_requires() -> None:
    server, pytorch = versions(LOCKS / "server.txt"), versions(LOCKS / "pytorch.txt")
    assert required("server") <= server.keys() | pytorch.keys(), "run `make lock`"
    assert required("all", "dev", "demo") <= versions(LOCKS / "dev.txt").keys(), "run `make lock`"
    assert {"torch", "torchvision"} <= pytorch.keys()
    assert not {"torch", "torchvision"} & server.keys()


def test_the_build_tool_is_the_locked_one() -> None:
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert requirement == f"setuptools=={versions(LOCKS / 'tools.txt')['setuptools']}"


def test_every_install_of_the_image_has_hashes_except_pytorch_from_an_index_of_its_own(tmp_path: Path) -> None:
    parser = dockerfile_parse.DockerfileParser(path=str(tmp_path))
    parser.content = (ROOT / "deploy" / "container" / "Dockerfile").read_text()
    steps = [step["value"] for step in parser.structure if step["instruction"] == "RUN"]
    installs = [part.strip() for step in steps for part in re.findall(r"pip install ([^;&]*)", step)]
    unhashed = [part for part in installs if not re.match(r"--require-hashes -r \"?deploy/locks/", part)]
    assert unhashed == [
        '--index-url "$TORCH_INDEX_URL" -c constraints.txt torch torchvision',
        "--no-index --no-build-isolation .",
    ]
    assert "extra-index" not in parser.content.lower()
    assert parser.baseimage == "python:3.11-slim"


def test_ci_installs_from_the_lock_files() -> None:
    assert "export LOCKED=1" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_audit_fails_without_an_answer_for_a_package() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\naudit:")[2].partition("\n\n")[0]
    assert "pip-audit --strict" in recipe
    assert all(name in recipe for name in NAMES)
