"""Options that all three commands share."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence

import mal_client.cli.main
import pytest

import mal_server.cli
import mal_train.cli
from mal_train.core.command_line import RenamedOption
from mal_train.core.version import distribution_version

COMMANDS: dict[str, Callable[[Sequence[str] | None], int]] = {
    "mal-client": mal_client.cli.main.main,
    "mal-server": mal_server.cli.main,
    "mal-train": mal_train.cli.main,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name](["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"{name} {distribution_version()}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_a_completion_script_that_bash_reads(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name](["--print-completion", "bash"])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    offered = subprocess.run(
        ["bash", "-c", f"{script}\ncomplete -p {name}"], capture_output=True, text=True, check=True, timeout=60
    )
    assert name in offered.stdout


def test_completion_without_its_extra_names_the_line_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        mal_train.cli.main(["--print-completion", "zsh"])
    assert ended.value.code == 2
    assert "mask-auto-labeler[completion]" in capsys.readouterr().err


@pytest.mark.parametrize("line", [["--old"], ["--old", "value"], ["--old=value"]])
def test_a_renamed_option_is_refused_with_its_new_name(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--old", action=RenamedOption, new="--new")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(line)
    assert ended.value.code == 2
    assert "--new" in capsys.readouterr().err
    assert "--old" not in parser.format_help()
