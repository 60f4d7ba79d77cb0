"""The systemd unit: systemd accepts it, and its command line is valid."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mal_server import cli
from mal_server.config.server import ServerConfig
from tests.paths import ROOT

UNIT = ROOT / "deploy" / "mal-server.service"
PROGRAM = "/opt/mask-auto-labeler/bin/mal-server"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(PROGRAM, sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_runs_a_valid_command_line() -> None:
    (line,) = re.findall(rf"^ExecStart={PROGRAM} (.*)$", UNIT.read_text(), re.MULTILINE)
    args = cli.parser().parse_args(line.split())
    assert (args.command, str(args.config)) == ("serve", "/etc/mal-server/server.yaml")


def test_systemd_waits_for_a_sign_of_life_longer_than_the_server_for_its_event_loop() -> None:
    (seconds,) = re.findall(r"^WatchdogSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert int(seconds) > ServerConfig(checkpoint=Path("a")).watchdog_s


def test_systemd_waits_until_the_server_has_drained() -> None:
    config = ServerConfig(checkpoint=Path("a"))
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert int(seconds) > config.drain_delay_s + config.grace_s
