"""The image of deploy/container, started by compose.yaml: hardened, restarted when killed, not restarted when stopped.

Needs a container engine with a compose tool, and root, to kill a process of a container from outside.
MAL_CONTAINER_IMAGE names an existing image; without it the shipped Dockerfile is built, which downloads PyTorch
(TORCH_INDEX_URL and BASE are passed to the build).
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mal_client.client import Client
from PIL import Image
from skimage import data

from benchmarks.load.run import ROOT
from mal_server.ops.health_probe import HealthProbe
from mal_train.kernel.checkpoint.builtin import BUILTIN, resolve
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key, write_identity
from tests.chaos.test_load import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SHIPPED = ROOT / "deploy" / "container"
TOOLS = [("docker", ["docker", "compose"]), ("docker", ["docker-compose"]), ("podman", ["podman-compose"])]
"""Engines, each with a command for compose files."""
USER = 10001
FACE = (170.0, 70.0, 130.0, 150.0)
"""Box of the face in scikit-image's portrait: x, y, width, height in px."""


def succeeds(*line: str) -> bool:
    return shutil.which(line[0]) is not None and subprocess.run(line, capture_output=True, check=False).returncode == 0


def output(*line: str) -> str:
    """Returns the output of a command that must succeed. Podman keeps health checks only in Docker's image format."""
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env={**os.environ, "BUILDAH_FORMAT": "docker"}
    )
    assert done.returncode == 0, f"{' '.join(line)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def wait_for(condition: Callable[[], bool], description: str, within_s: float = 300) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"timed out: {description}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def tools() -> tuple[str, list[str]]:
    if os.geteuid() != 0:
        pytest.skip("only root may kill a process in a container from outside, as a crash would")
    for engine, compose in TOOLS:
        if succeeds(engine, "info") and succeeds(*compose, "version"):
            return engine, compose
    pytest.skip("no container engine answers that has a tool for compose files: " + ", ".join(c[-1] for _, c in TOOLS))


@pytest.fixture(scope="module")
def image(tools: tuple[str, list[str]]) -> str:
    if "MAL_CONTAINER_IMAGE" in os.environ:
        return os.environ["MAL_CONTAINER_IMAGE"]
    engine, _ = tools
    base = os.environ.get("BASE") or (SHIPPED / "Dockerfile").read_text().partition("ARG BASE=")[2].split()[0]
    if not succeeds(engine, "image", "inspect", base):
        pytest.skip(f"neither MAL_CONTAINER_IMAGE is set nor is the base image here: {engine} pull {base}")
    given = [part for name in ("BASE", "TORCH_INDEX_URL") if name in os.environ for part in ("--build-arg", name)]
    output(engine, "build", *given, "-f", str(SHIPPED / "Dockerfile"), "-t", "mal-server-test", str(ROOT))
    return "mal-server-test"


@dataclass
class Service:
    """The shipped service, running.

    Attributes:
        engine: docker or podman.
        compose: the command that started it.
        container: id of its container.
        address: its address on this machine.
    """

    engine: str
    compose: list[str]
    container: str
    address: str

    def inspect(self) -> Any:
        return json.loads(output(self.engine, "inspect", self.container))[0]

    def inside(self, *line: str) -> str:
        return output(self.engine, "exec", self.container, *line)

    def logs(self) -> str:
        line = [self.engine, "logs", self.container]
        return subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout

    def is_serving(self) -> bool:
        return HealthProbe(self.address, timeout_s=1.0).check() == "SERVING"

    def mask(self) -> bytes:
        """Returns the mask of a portrait as run lengths."""
        astronaut: Any = data.astronaut
        image = Image.fromarray(astronaut())
        with Client(self.address) as client:
            (label,) = client.label_image(image, [FACE])
        assert label.ok, label.error
        assert label.rle is not None
        return label.rle.counts


def write_files(folder: Path) -> None:
    """Writes the files that compose.yaml mounts: settings, an encrypted checkpoint, and its identity."""
    (folder / "etc").mkdir()
    (folder / "models").mkdir()
    recipient = write_identity(folder / "identity.txt")
    os.chown(folder / "identity.txt", USER, USER)
    key = parse_key(recipient, purpose="encryption", source="command line")
    save_checkpoint(folder / "models" / "mal.malckpt", load_checkpoint(resolve(BUILTIN), None), key)
    settings = {
        "checkpoint": "/models/mal.malckpt",
        "decryption_key": "file:/run/secrets/identity",
        "listen": {"host": "0.0.0.0", "allow_plaintext": True},
        "metrics": {"port": 9090, "host": "0.0.0.0"},
        # Longer than the default stop_grace_period of 10 s.
        "drain_delay_s": 12.0,
    }
    (folder / "etc" / "server.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture
def service(tools: tuple[str, list[str]], image: str, tmp_path: Path) -> Iterator[Service]:
    """The shipped service with another image name and host port."""
    engine, compose = tools
    write_files(tmp_path)
    settings = yaml.safe_load((SHIPPED / "compose.yaml").read_text())
    (mal,) = settings["services"].values()
    del mal["build"]
    port = free_port()
    mal |= {"image": image, "ports": [f"127.0.0.1:{port}:50051"]}
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(settings))
    project = f"maltest{os.getpid()}"
    line = [*compose, "-p", project, "-f", str(tmp_path / "compose.yaml")]
    try:
        output(*line, "up", "-d")
        label = f"label=com.docker.compose.project={project}"
        found = Service(engine, line, output(engine, "ps", "-aq", "--filter", label), f"127.0.0.1:{port}")
        wait_for(found.is_serving, "the container is serving")
        yield found
    finally:
        subprocess.run([*line, "down", "-t", "0"], check=False, capture_output=True)


def test_a_killed_server_is_restarted_and_a_stopped_one_drains_and_stays_stopped(service: Service) -> None:
    before = service.mask()

    # The hardening of the compose file, and the health check of the image.
    status = dict(line.split(":\t", 1) for line in service.inside("cat", "/proc/1/status").splitlines())
    assert status["Uid"].split() == [str(USER)] * 4
    assert (int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, "1")
    assert "Read-only file system" in service.inside("sh", "-c", "touch /new 2>&1 || true")
    assert service.inside(*service.inspect()["Config"]["Healthcheck"]["Test"][1:]).endswith(": SERVING")

    killed = service.inspect()["State"]["Pid"]
    killed_at = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    wait_for(
        lambda: service.inspect()["State"]["Pid"] not in (0, killed) and service.is_serving(),
        "a new process serves",
    )
    print(f"killed; a new process served {time.monotonic() - killed_at:.1f} s later")
    assert service.mask() == before
    assert service.inspect()["RestartCount"] == 1

    output(*service.compose, "stop")
    assert "draining" in service.logs()
    # A restart would happen immediately.
    time.sleep(3)
    state = service.inspect()
    assert (state["State"]["Status"], state["State"]["ExitCode"], state["RestartCount"]) == ("exited", 0, 1)
