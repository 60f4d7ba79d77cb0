"""Each supervisor's file bounds memory, processes and descriptors of the server, above what its settings allow."""

import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import yaml

from mal_server.config.server import ServerConfig
from tests.deploy.rendered import only, pod_of, render
from tests.deploy.test_deploy import DEPLOY

GIB = 2**30
CONFIG = ServerConfig(checkpoint=Path("a"))
BUDGETS = CONFIG.max_queue_bytes + CONFIG.max_decoded_bytes + CONFIG.image_cache_bytes + CONFIG.max_evaluation_bytes
PROGRAM = 2 * GIB
"""PyTorch, its libraries on the host, and a model."""
DESCRIPTORS, TASKS = 10_000, 500


def size(text: str) -> int:
    """Returns bytes of a size such as 12G, 12g or 12Gi."""
    number, unit = re.fullmatch(r"(\d+)([GM])i?", text, re.IGNORECASE).groups()  # type: ignore[union-attr]
    return int(number) * {"g": GIB, "m": 2**20}[unit.lower()]


def test_systemd_bounds_memory_tasks_and_descriptors() -> None:
    unit = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / "mal-server.service").read_text(), re.MULTILINE))
    assert size(unit["MemoryMax"]) >= BUDGETS + PROGRAM
    assert int(unit["TasksMax"]) >= TASKS
    assert int(unit["LimitNOFILE"]) >= DESCRIPTORS


def test_compose_bounds_memory_tasks_descriptors_and_temporary_files() -> None:
    service: Any = yaml.safe_load((DEPLOY / "container" / "compose.yaml").read_text())["services"]["mal-server"]
    assert size(service["mem_limit"]) >= BUDGETS + PROGRAM
    assert service["pids_limit"] >= TASKS
    assert service["ulimits"]["nofile"] >= DESCRIPTORS
    assert all(re.search(r":size=\d+[gm]$", mount) for mount in service["tmpfs"])


def test_kubernetes_bounds_memory_and_temporary_files() -> None:
    pod = pod_of(only(render("base"), "Deployment"))
    (container,) = pod["containers"]
    assert size(container["resources"]["limits"]["memory"]) >= BUDGETS + PROGRAM
    assert [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume] == [{"sizeLimit": "1Gi"}]


def test_supervisord_raises_the_limit_of_descriptors() -> None:
    settings = ConfigParser(inline_comment_prefixes=(" ;",))
    settings.read(DEPLOY / "supervisord.conf")
    assert int(settings["supervisord"]["minfds"]) >= DESCRIPTORS
