"""The program `age` opens this project's files, and this project opens the program's."""

import subprocess
from pathlib import Path

import pytest

from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key, write_identity
from tests.mal_train.kernel.checkpoint.checkpoints import equal, weights_checkpoint
from tests.tools import program


def age(*arguments: str | Path) -> None:
    subprocess.run([program("age"), *map(str, arguments)], check=True, capture_output=True)


@pytest.mark.promise("checkpoints", "The stock `age` program opens an encrypted checkpoint, and its files open here")
def test_the_age_program_and_this_project_open_each_others_checkpoints(tmp_path: Path) -> None:
    identity, ours, plain, theirs = (
        tmp_path / name for name in ("identity.txt", "a.malckpt", "b.malckpt", "c.malckpt")
    )
    recipient = write_identity(identity)
    save_checkpoint(ours, weights_checkpoint(), parse_key(recipient, purpose="encryption", source="command line"))
    key = parse_key(f"file:{identity}", purpose="decryption", source="command line")
    weights = load_checkpoint(ours, key).weights

    age("--decrypt", "--identity", identity, "--output", plain, ours)
    assert equal(load_checkpoint(plain, None).weights, weights)

    age("--recipient", recipient, "--output", theirs, plain)
    assert equal(load_checkpoint(theirs, key).weights, weights)
