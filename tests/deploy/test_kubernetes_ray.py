"""The entrypoint of the RayJob of deploy/kubernetes, run on a cluster of two nodes on loopback in place of pods."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from mal_client.cli.main import main

from mal_train.kernel.checkpoint.builtin import BUILTIN, resolve
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key, write_identity
from tests.chaos.ray_nodes import RayNodes
from tests.deploy.pods import PATH, Host
from tests.deploy.rendered import only, render
from tests.scenes import write_scenes
from tests.tools import module

IMAGES = 4


@pytest.mark.slow
def test_the_entrypoint_labels_on_the_cluster_of_its_node(tmp_path: Path) -> None:
    module("ray")
    manifests = render("ray")
    spec = only(manifests, "RayJob")["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    machine = Host(tmp_path)
    machine.mount(manifests, head)
    write_volumes(machine)
    with RayNodes() as nodes:
        nodes.add(cpus=1)
        container = {**head["containers"][0], "command": shlex.split(spec["entrypoint"]), "args": []}
        # Ray sets its address for the driver of a job, and KubeRay the token for every pod.
        words, variables = machine.command(container, {"RAY_ADDRESS": nodes.address})
        environment = {**nodes.environment, "PATH": PATH, **variables}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    labels, output = machine.path("/data/masks.parquet"), machine.path("/data/masks.json")
    assert main(["convert", "--from", "coco", "--labels", str(labels), "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["annotations"]
    assert len(rows) == 2 * IMAGES
    assert all(row["area"] > 0 and "score" in row for row in rows)


def write_volumes(machine: Host) -> None:
    """Writes a sealed checkpoint, its identity, and a dataset in parquet."""
    recipient = write_identity(machine.path("/etc/mal-identity/identity.txt"))
    key = parse_key(recipient, purpose="encryption", source="command line")
    save_checkpoint(machine.path("/models/mal.malckpt"), load_checkpoint(resolve(BUILTIN), None), key)
    annotations, _ = write_scenes(machine.path("/data/x").parent, images=IMAGES, masks=False)
    parquet = machine.path("/data/boxes.parquet")
    assert main(["convert", "--from", "coco", "--labels", str(annotations), "--output", str(parquet)]) == 0
