"""The check of the .proto files rejects incompatible, badly styled and stale files."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.tools import missing

TOOLS = Path(os.environ.get("PROTOS_VENV", ROOT / ".venv-protos"))


@pytest.fixture
def protos(tmp_path: Path) -> Path:
    if not (TOOLS / "bin" / "buf").exists():
        missing("buf", f"protos/generate.sh --tools puts it into {TOOLS} (make test does)")
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    return tmp_path / "protos"


def check(protos: Path) -> tuple[int, str]:
    environment = {**os.environ, "PROTOS_VENV": str(TOOLS)}
    done = subprocess.run(
        [protos / "generate.sh", "--check"], capture_output=True, text=True, env=environment, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("optional double threshold = 2;", "optional float threshold = 2;", "--break"),
        ("  bool flip_test = 4;\n", "", "--break"),
        ("  // Priority of the crops; it does not change any mask.\n", "", "should have a non-empty comment"),
        ("  PRIORITY_BATCH = 2;", "  BATCH = 2;", "buf.yaml"),
        (
            "  bool flip_test = 4;\n",
            "  bool flip_test = 4;\n  // New.\n  bool fresh = 99;\n",
            "baseline.txtpb",
        ),
    ],
)
def test_a_careless_change_fails_the_check_with_its_cause(protos: Path, old: str, new: str, cause: str) -> None:
    types = protos / "mal" / "v1" / "types.proto"
    text = types.read_text()
    assert old in text
    types.write_text(text.replace(old, new))
    code, output = check(protos)
    assert code == 1
    assert cause in output


def test_the_committed_files_pass(protos: Path) -> None:
    code, output = check(protos)
    assert code == 0, output
