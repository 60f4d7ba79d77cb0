"""The probes of deploy/ on a real server: a process that is stopped fails them, and they allow for a drain."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.load.run import Server, environment, fake_server
from mal_server.config.server import ServerConfig
from mal_server.ops.health_probe import HealthProbe
from tests.deploy.rendered import only, pod_of, render
from tests.deploy.test_deploy import DEPLOY

CLI = [sys.executable, "-c", "import sys; from mal_server.cli import main; sys.exit(main(sys.argv[1:]))"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with fake_server(tmp_path_factory.mktemp("server")) as running:
        yield running


def liveness(folder: str = "base") -> Any:
    (container,) = pod_of(only(render(folder), "Deployment"))["containers"]
    return container["livenessProbe"]


def kubelet_finds_it_alive(server: Server) -> bool:
    """Probes as the kubelet does: one health check for the service of the manifest, within its time limit."""
    probe = liveness()
    check = HealthProbe(server.address, probe["grpc"].get("service", ""), timeout_s=probe["timeoutSeconds"])
    return check.check() == "SERVING"


def shipped_commands() -> dict[str, list[str]]:
    """Returns the health command of each other file, as arguments of `mal-server`."""
    healthcheck = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", (DEPLOY / "container" / "Dockerfile").read_text(), re.M)
    found = {"Dockerfile": json.loads(healthcheck[0])}
    for name in ("mal-server.service", "supervisord.conf"):
        (line,) = re.findall(r"Health check: +(?:\S*/)?(mal-server health -c \S+)", (DEPLOY / name).read_text())
        found[name] = shlex.split(line)
    found["kubernetes with TLS"] = liveness("overlays/tls")["exec"]["command"]
    return {name: command[1:] for name, command in found.items()}


def command_finds_it_healthy(server: Server, folder: Path) -> bool:
    """Runs the health command of the files, which is the same, with the settings of this server."""
    (command,) = {tuple(command) for command in shipped_commands().values()}
    settings = folder / "server.yaml"
    host, _, port = server.address.rpartition(":")
    settings.write_text(yaml.safe_dump({"listen": {"host": host, "port": int(port)}}))
    line = [*CLI, *(str(settings) if part == "/etc/mal-server/server.yaml" else part for part in command)]
    return subprocess.run(line, env=environment(), capture_output=True, check=False).returncode == 0


@pytest.mark.promise("deployment", "A server process that is stopped fails every shipped probe, until it continues")
def test_a_stopped_process_fails_every_probe_although_the_kernel_accepts_connections(
    server: Server, tmp_path: Path, record: Callable[..., None]
) -> None:
    def found() -> list[bool]:
        with ThreadPoolExecutor() as pool:
            command = pool.submit(command_finds_it_healthy, server, tmp_path)
            return [kubelet_finds_it_alive(server), command.result()]

    assert found() == [True, True]
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        host, _, port = server.address.rpartition(":")
        socket.create_connection((host, int(port)), 60).close()
        stopped = found()
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert stopped == [False, False]
    assert found() == [True, True]
    record("stopped process", tcp="connected", kubernetes="unhealthy", commands=len(shipped_commands()))


@pytest.mark.parametrize("folder", ["base", "overlays/tls"])
def test_liveness_allows_longer_than_a_drain_and_than_the_watchdog(folder: str) -> None:
    probe, config = liveness(folder), ServerConfig(checkpoint=Path("a"))
    until_restart_s = probe["periodSeconds"] * (probe["failureThreshold"] - 1) + probe["timeoutSeconds"]
    assert until_restart_s > config.drain_delay_s + config.grace_s
    assert probe["periodSeconds"] * probe["failureThreshold"] >= config.watchdog_s
