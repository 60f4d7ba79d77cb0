"""Options that all three commands share."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence

import mal_client.cli.main
import pytest

import mal_server.cli
import mal_train.cli
from mal_train.core.command_line import RenamedOption, parse_arguments
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


@pytest.mark.parametrize(
    "argv",
    [
        ["serve", "-c", "FILE", "threads=1", "gpu_ids=[]"],
        ["serve", "threads=1", "-c", "FILE", "gpu_ids=[]"],
        ["serve", "threads=1", "gpu_ids=[]", "--log-level", "INFO", "-c", "FILE"],
        ["check", "-c", "FILE", "threads=1", "gpu_ids=[]"],
        ["check", "threads=1", "gpu_ids=[]"],
    ],
)
def test_overrides_of_the_server_may_come_before_and_after_options(argv: list[str]) -> None:
    assert parse_arguments(mal_server.cli.parser(), argv).overrides == ["threads=1", "gpu_ids=[]"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["serve", "-e", "FILE", "threads=1"], "-e"),
        (["serve", "--threads=1"], "--threads=1"),
        (["health", "127.0.0.1:1", "threads=1"], "threads=1"),
        (["default-config", "threads=1"], "threads=1"),
    ],
)
def test_other_arguments_are_named(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(mal_server.cli.parser(), argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(f"unrecognized arguments: {named}")
