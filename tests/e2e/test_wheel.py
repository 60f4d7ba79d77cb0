"""The wheel in an empty environment: the client works with the base install, the other commands name their extra."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.paths import ROOT

# Downloads the client's dependencies from the package index.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    # The source tree must not stand in for the wheel.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=check,
        timeout=600,
    )


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment that holds the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, because setuptools writes into the tree that it builds from.
    shutil.copytree(
        ROOT, folder / "tree", ignore=shutil.ignore_patterns(".git", ".venv*", "build", "demo_out", "*.egg-info")
    )
    build: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
    ]
    run(*build, folder / "tree", cwd=folder)
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    (wheel,) = folder.glob("*.whl")
    constraints = ROOT / "constraints.txt"
    run(folder / "venv" / "bin" / "pip", "install", "-q", "-c", constraints, wheel, cwd=folder)
    return folder / "venv" / "bin"


@pytest.mark.parametrize("name", ["mal-client", "mal-server", "mal-train"])
def test_each_command_states_its_version(commands: Path, tmp_path: Path, name: str) -> None:
    printed = run(commands / name, "--version", cwd=tmp_path).stdout.split()
    assert printed[0] == name
    assert printed[1][0].isdigit()


def test_the_client_checks_a_dataset(commands: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 30, "height": 20}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 8], "iscrowd": 0}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    run(commands / "mal-client", "check", "--annotations", "boxes.json", "--images", tmp_path, cwd=tmp_path)


def test_the_client_has_neither_torch_nor_a_server(commands: Path, tmp_path: Path) -> None:
    code = "import importlib.util as u; print([n for n in ('torch', 'pydantic', 'grpc_health') if u.find_spec(n)])"
    assert run(commands / "python", "-c", code, cwd=tmp_path).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        (["mal-server", "serve"], "[server]"),
        (["mal-server", "check"], "[server]"),
        (["mal-train", "train", "-e", "spec.yaml"], "[train]"),
        (["mal-client", "playground", "--server", "127.0.0.1:1"], "[playground]"),
        (["mal-client", "--print-completion", "bash"], "[completion]"),
    ],
)
def test_a_command_without_its_extra_names_it_in_one_line(
    commands: Path, tmp_path: Path, line: list[str], extra: str
) -> None:
    done = run(commands / line[0], *line[1:], cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert extra in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
