"""Runs the project's commands as a user would, and ends the processes that it started."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mal_train.core.atomic_io import write_text
from mal_train.core.errors import MalError

SERVER_START_S = 120.0
SERVER_STOP_S = 30.0


class DemoFailed(MalError):
    """A step of the demo failed."""


def say(text: str) -> None:
    """Prints at once: the commands that the demo runs write to the same terminal."""
    print(text, flush=True)


@dataclasses.dataclass(frozen=True)
class RunningServer:
    """A `mal-server` process and its address."""

    process: subprocess.Popen[bytes]
    address: str

    def stop(self) -> None:
        """Sends SIGTERM and waits; sends SIGKILL after `SERVER_STOP_S`."""
        say("\nStopping the server.")
        _end(self.process)


def start_server(out: Path, name: str, settings: Mapping[str, str]) -> RunningServer:
    """Starts `mal-server serve` on a free port and waits until it serves.

    Args:
        out: folder of its settings, log and address files.
        name: stem of these files.
        settings: settings of the server; others keep their defaults.

    Raises:
        DemoFailed: it ended, or did not serve in time; the message holds the end of its log.
    """
    config, port_file, log_file = (out / f"{name}.{suffix}" for suffix in ("yaml", "address", "log"))
    # JSON strings are YAML strings, whatever the path holds.
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()] + ["gpu_ids: []", "drain_delay_s: 0"]
    write_text(config, "\n".join(lines) + "\n")
    command = [_script("mal-server"), "serve", "-c", str(config), "--port-file", str(port_file), "listen.port=0"]
    say(f"      mal-server serve -c {config} listen.port=0")
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SERVER_START_S
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoFailed(f"the server did not start; the end of {log_file}:\n{_tail(log_file)}")
            time.sleep(0.1)
    except BaseException:
        # Also on Ctrl-C: the caller does not hold the server yet.
        _end(process)
        raise
    address = port_file.read_text(encoding="ascii").strip()
    say(f"      serving on {address}; its log: {log_file}")
    return RunningServer(process, address)


def run_command(name: str, *arguments: str) -> None:
    """Runs a command with its output visible; ends it when the demo is interrupted.

    Raises:
        DemoFailed: it is not installed, or its exit code is not 0.
    """
    say("      " + " ".join((name, *arguments[:3], "…")))
    process = subprocess.Popen([_script(name), *arguments])
    try:
        code = process.wait()
    except BaseException:
        # Ctrl-C reaches the child as well; SIGTERM does not.
        _end(process)
        raise
    if code:
        raise DemoFailed(f"{name} {arguments[0]} ended with exit code {code}; see its last lines above")


def command_output(name: str, *arguments: str) -> str:
    """Returns the standard output of a command; raises DemoFailed with its error output if it fails."""
    done = subprocess.run([_script(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoFailed(f"{name} {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def _script(name: str) -> str:
    """Returns the path of a command in this environment, whatever is on the PATH."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise DemoFailed(f"{path}: not installed; run `make demo`, which installs it")
    return str(path)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SERVER_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
