"""The check of the .proto files notices what it is there for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

TOOLS = Path(os.environ.get("PROTOS_VENV", ROOT / ".venv-protos"))


@pytest.fixture
def protos(tmp_path: Path) -> Path:
    if not (TOOLS / "bin" / "buf").exists():
        pytest.skip(f"no buf in {TOOLS}; protos/generate.sh --tools puts it there (make test does)")
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    return tmp_path / "protos"


def check(protos: Path) -> tuple[int, str]:
    environment = {**os.environ, "PROTOS_VENV": str(TOOLS)}
    done = subprocess.run(
        [protos / "generate.sh", "--check"], capture_output=True, text=True, env=environment, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("optional double threshold = 2;", "optional float threshold = 2;", "callers of the last committed state"),
        ("  bool flip_test = 4;\n", "", "callers of the last committed state"),
        ("  // Who goes first. It changes no mask.\n", "", "should have a non-empty comment"),
        ("  PRIORITY_BATCH = 2;", "  BATCH = 2;", "break the style"),
        (
            "  bool flip_test = 4;\n",
            "  bool flip_test = 4;\n  // New.\n  bool fresh = 99;\n",
            "baseline.txtpb does not hold",
        ),
    ],
)
def test_a_careless_change_is_told(protos: Path, old: str, new: str, told: str) -> None:
    types = protos / "mal" / "v1" / "types.proto"
    text = types.read_text()
    assert old in text
    types.write_text(text.replace(old, new))
    code, output = check(protos)
    assert code == 1
    assert told in output


def test_the_committed_files_pass(protos: Path) -> None:
    code, output = check(protos)
    assert code == 0, output
