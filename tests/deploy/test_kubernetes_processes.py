"""The commands of deploy/kubernetes, run with processes in place of pods: serve, probe, label in shards, merge."""

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from mal_client.cli.main import main

from mal_server.ops.health_probe import HealthProbe
from mal_train.distributed.launch import free_port
from mal_train.kernel.checkpoint.builtin import BUILTIN, resolve
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key, write_identity
from tests.deploy.pods import USER, Host, can_restrict, execute
from tests.deploy.rendered import Manifest, only, pod_of, render
from tests.scenes import write_scenes
from tests.tools import missing

SHARDS = 3
"""In place of 16, to start fewer processes."""
IMAGES = 7
SERVER = "mal-server-headless:50051"
SERVICES = ("mal-server", "mal-server-headless")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
EXACT = "precision=float32"
"""Masks do not depend on the batches that crops happen to share."""


def host(folder: Path) -> Host:
    """Returns a machine with free ports and the files of the volumes: a sealed checkpoint, its identity, a dataset."""
    port = free_port()
    replaced = {
        SERVER: f"127.0.0.1:{port}",
        "port: 50051": f"port: {port}",
        "port: 9090": f"port: {free_port()}",
        "0.0.0.0": "127.0.0.1",
    }
    found = Host(folder, replaced)
    recipient = write_identity(found.path("/etc/mal-identity/identity.txt"))
    key = parse_key(recipient, purpose="encryption", source="command line")
    save_checkpoint(found.path("/models/mal.malckpt"), load_checkpoint(resolve(BUILTIN), None), key)
    annotations, _ = write_scenes(found.path("/data/x").parent, images=IMAGES, masks=False)
    annotations.rename(found.path("/data/boxes.json"))
    return found


def address(machine: Host) -> str:
    return machine.replaced[SERVER]


def grpc_probe_succeeds(machine: Host, probe: Manifest) -> bool:
    """Probes as the kubelet does."""
    check = HealthProbe(address(machine), probe["grpc"].get("service", ""), timeout_s=probe.get("timeoutSeconds", 1))
    return check.check() == "SERVING"


@contextmanager
def serving(machine: Host, overlay: str, *settings: str) -> Iterator[Manifest]:
    """Runs the server of an overlay; yields its container as soon as the startup probe succeeds."""
    manifests = render(f"overlays/{overlay}")
    pod = pod_of(only(manifests, "Deployment"))
    (container,) = pod["containers"]
    machine.mount(manifests, pod)
    probe = container["startupProbe"]
    until = time.monotonic() + probe["periodSeconds"] * probe["failureThreshold"]
    with machine.running(container, *settings) as process:
        while not probe_succeeds(machine, container, "startupProbe"):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < until
            time.sleep(0.2)
        yield container
        process.terminate()
        assert process.wait(60) == 0


def probe_succeeds(machine: Host, container: Manifest, name: str) -> bool:
    probe = container[name]
    if "grpc" in probe:
        return grpc_probe_succeeds(machine, probe)
    return execute(machine, container, probe["exec"]["command"]) == 0


def container_of(folder: str, **variables: str) -> Manifest:
    """Returns the container of a job, with other values of its variables."""
    (container,) = pod_of(only(render(folder), "Job"))["containers"]
    assert variables.keys() <= {entry["name"] for entry in container["env"]}
    return {**container, "env": [{"name": name, "value": value} for name, value in variables.items()]}


def action(folder: str, code: int) -> str:
    """Returns what the policy of a job does when its container ends with a code; Count is Kubernetes' own name."""
    job = only(render(folder), "Job")
    (container,) = pod_of(job)["containers"]
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        assert codes["operator"] == "In"
        if code in codes["values"]:
            assert codes["containerName"] == container["name"]
            return str(rule["action"])
    return "Count"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return host(tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="module")
def server(machine: Host) -> Iterator[Manifest]:
    """The server of the overlay `cpu`."""
    with serving(machine, "cpu", "drain_delay_s=0", EXACT) as container:
        yield container


def test_processes_are_restricted_like_pods(machine: Host) -> None:
    if not can_restrict():
        missing("namespaces", "this system permits no user namespaces; run the tests where `unshare --user` works")
    touch = {**container_of("label", SHARDS="1"), "command": ["touch"], "args": []}
    for inside in ("/data/written", "/tmp/written"):
        assert machine.run(touch, str(machine.path(inside))).returncode == 0
    for outside in (machine.path("/no-volume/written"), machine.path("/etc/written"), "/written"):
        assert "Read-only file system" in machine.run(touch, str(outside)).stderr
    status = {**touch, "command": ["grep", "-E", "^(Uid|CapEff):", "/proc/self/status"]}
    assert machine.run(status).stdout.split() == ["Uid:", *[str(USER)] * 4, "CapEff:", "0" * 16]


def test_every_probe_succeeds_on_a_server_that_serves(machine: Host, server: Manifest) -> None:
    for name in PROBES:
        assert probe_succeeds(machine, server, name)


@pytest.mark.promise("deployment", "The shards of the shipped Kubernetes Job merge to the bytes of a single run")
def test_the_shards_of_the_job_merge_to_the_file_of_a_single_run(
    machine: Host, server: Manifest, record: Callable[..., None]
) -> None:
    label, merge = container_of("label", SHARDS=str(SHARDS)), container_of("merge", SHARDS=str(SHARDS))
    for index in reversed(range(SHARDS)):
        done = machine.run(label, JOB_COMPLETION_INDEX=str(index))
        assert done.returncode == 0, done.stderr
    done = machine.run(merge)
    assert done.returncode == 0, done.stderr
    single = machine.path("/data/single.json")
    alone = {**label, "args": [word for word in label["args"] if not word.startswith("--shard=")]}
    done = machine.run(alone, f"--output={single}")
    assert done.returncode == 0, done.stderr
    merged = machine.path("/data/masks.json")
    assert merged.read_bytes() == single.read_bytes()
    rows = json.loads(merged.read_text())["annotations"]
    assert len(rows) == 2 * IMAGES
    assert all(row["area"] > 0 for row in rows)
    assert not list(merged.parent.glob("*.ledger*"))
    record("shards", shards=SHARDS, boxes=len(rows))


def test_shards_from_parquet_to_parquet_need_no_merge(machine: Host, server: Manifest) -> None:
    label = container_of("label-parquet", SHARDS=str(SHARDS))
    source, output = machine.path("/data/boxes.parquet"), machine.path("/data/masks.parquet")
    convert(machine.path("/data/boxes.json"), source, "--row-group-boxes", "4")
    for index in range(SHARDS):
        done = machine.run(label, JOB_COMPLETION_INDEX=str(index))
        assert done.returncode == 0, done.stderr
    labeled, single = machine.path("/data/from-parquet.json"), machine.path("/data/from-json.json")
    convert(output, labeled)
    words = ["--shard=", "--annotations=", "--output="]
    alone = {**label, "args": [word for word in label["args"] if not word.startswith(tuple(words))]}
    done = machine.run(alone, f"--annotations={machine.path('/data/boxes.json')}", f"--output={single}")
    assert done.returncode == 0, done.stderr
    rows, expected = (json.loads(path.read_text())["annotations"] for path in (labeled, single))
    assert len(rows) == 2 * IMAGES
    assert rows == expected


def convert(source: Path, output: Path, *more: str) -> None:
    assert main(["convert", "--from", "coco", "--labels", str(source), "--output", str(output), *more]) == 0


def test_codes_that_a_repeat_cannot_change_end_the_index_and_others_repeat_it(machine: Host, server: Manifest) -> None:
    label = container_of("label", SHARDS=str(SHARDS))
    index = {"JOB_COMPLETION_INDEX": "0"}
    usage = machine.run(label, f"--annotations={machine.path('/data/none.json')}", **index)
    no_server = machine.run(label, f"--server=127.0.0.1:{free_port()}", "--timeout=2", **index)
    file_in_place_of_a_folder = machine.path("/data/boxes.json") / "masks.json"
    disk = machine.run(label, f"--output={file_in_place_of_a_folder}", **index)
    assert [done.returncode for done in (usage, no_server, disk)] == [2, 1, 4]
    assert [action("label", code) for code in (1, 2, 3, 4, 137)] == [
        "Count",
        "FailIndex",
        "Count",
        "FailIndex",
        "Count",
    ]


def test_the_merge_of_missing_shards_fails_at_once(machine: Host) -> None:
    output = machine.path("/data/other.json")
    done = machine.run(container_of("merge", SHARDS="2"), f"--output={output}")
    assert done.returncode == 2
    assert [action("merge", code) for code in (1, 2, 3, 4)] == ["Count", "FailJob", "FailJob", "FailJob"]


@pytest.mark.promise("deployment", "The shipped TLS overlay admits clients with its authority and token only")
def test_the_tls_overlay_serves_clients_with_its_authority_and_token_only(tmp_path: Path) -> None:
    machine = host(tmp_path)
    write_certificate(machine)
    machine.path("/etc/mal-tokens/label").write_text(secrets.token_hex(32))
    with serving(machine, "tls", "drain_delay_s=0") as container:
        for name in PROBES:
            assert probe_succeeds(machine, container, name)
        with_token, plain = container_of("label-tls", SHARDS="1"), container_of("label", SHARDS="1")
        index = {"JOB_COMPLETION_INDEX": "0"}
        assert machine.run(plain, "--timeout=2", **index).returncode == 1
        token = next(word for word in with_token["args"] if word.startswith("--token-file="))
        without = {**with_token, "args": [word for word in with_token["args"] if word != token]}
        assert machine.run(without, **index).returncode == 2
        done = machine.run(with_token, **index)
        assert done.returncode == 0, done.stderr


def write_certificate(machine: Host) -> None:
    """Writes the files of the secret mal-server-tls, for the names of the services and this machine."""
    authority = trustme.CA()
    certificate = authority.issue_cert(*SERVICES, "127.0.0.1")
    chain = b"".join(part.bytes() for part in certificate.cert_chain_pems)
    machine.path("/etc/mal-tls/tls.crt").write_bytes(chain)
    machine.path("/etc/mal-tls/tls.key").write_bytes(certificate.private_key_pem.bytes())
    machine.path("/etc/mal-tls/ca.crt").write_bytes(authority.cert_pem.bytes())
