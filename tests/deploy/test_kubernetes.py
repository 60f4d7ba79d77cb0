"""deploy/kubernetes: what the folders render to is hardened, fits together, and has valid settings."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mal_server import cli
from mal_server.config.server import ServerConfig, load_config
from mal_train.config.spec import load_spec
from mal_train.core.version import distribution_version
from tests.deploy import schemas
from tests.deploy.pods import arguments_of
from tests.deploy.rendered import KUBERNETES, Manifest, folders, only, pod_of, pod_templates, render
from tests.deploy.test_locks import versions
from tests.paths import ROOT

SERVERS = [name for name in folders() if name == "base" or name.startswith("overlays/")]
JOBS = [name for name in folders() if name not in SERVERS]
WRITTEN = {"data", "shm", "tmp"}
"""Volumes that pods may write."""


def settings_of(manifests: list[Manifest], tmp_path: Path) -> ServerConfig:
    """Returns the settings with which a server starts."""
    (container,) = pod_of(only(manifests, "Deployment"))["containers"]
    path = tmp_path / "server.yaml"
    path.write_text(only(manifests, "ConfigMap")["data"]["server.yaml"])
    args = cli.parser().parse_args(arguments_of(container))
    assert (args.command, args.config) == ("serve", Path("/etc/mal-server/server.yaml"))
    return load_config(path, args.overrides)


def test_every_overlay_and_job_is_there() -> None:
    assert {"base", *(f"overlays/{name}" for name in ("cpu", "gpu", "hpa", "keda", "tls"))} == set(SERVERS)
    assert set(JOBS) == {"label", "label-parquet", "label-tls", "merge", "ray", "train"}


@pytest.mark.parametrize("folder", folders())
def test_every_pod_is_restricted(folder: str) -> None:
    """The Pod Security Standard `restricted`, a read-only root, limits of memory and of temporary files."""
    for template in pod_templates(render(folder)):
        pod = template["spec"]
        context = pod["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (True, 10001, 10001)
        assert (context["fsGroup"], context["fsGroupChangePolicy"]) == (10001, "OnRootMismatch")
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume)
        assert all(volume["secret"]["defaultMode"] & 0o007 == 0 for volume in pod["volumes"] if has_secret(volume))
        for container in pod["containers"]:
            assert_restricted(container)


def assert_restricted(container: Manifest) -> None:
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")} <= WRITTEN


def has_secret(volume: Manifest) -> bool:
    """Returns True for a volume with a secret; the certificate of an authority is public."""
    return "secret" in volume and [item["key"] for item in volume["secret"].get("items", [])] != ["ca.crt"]


@pytest.mark.parametrize("folder", folders())
def test_every_mount_has_a_volume_and_every_config_map_is_mounted_by_its_hashed_name(folder: str) -> None:
    manifests = render(folder)
    maps = {one["metadata"]["name"] for one in manifests if one["kind"] == "ConfigMap"}
    pods = [template["spec"] for template in pod_templates(manifests)]
    for pod in pods:
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == volumes
    used = {volume["configMap"]["name"] for pod in pods for volume in pod["volumes"] if "configMap" in volume}
    assert used == maps
    assert all(re.fullmatch(r"mal-\w+-\w{10}", name) for name in maps)


@pytest.mark.parametrize("folder", folders())
def test_every_image_has_the_version_of_the_project(folder: str) -> None:
    images = {container["image"] for pod in pod_templates(render(folder)) for container in pod["spec"]["containers"]}
    assert images
    release = re.escape(distribution_version().partition(".dev")[0])
    assert all(re.fullmatch(rf"mal-\w+:{release}", image) for image in images)


@pytest.mark.parametrize("folder", SERVERS)
def test_the_settings_are_valid_and_fit_ports_probes_and_grace_period(folder: str, tmp_path: Path) -> None:
    config = settings_of(render(folder), tmp_path)
    pod = pod_of(only(render(folder), "Deployment"))
    (container,) = pod["containers"]
    assert {port["containerPort"] for port in container["ports"]} == {config.listen.port, config.metrics.port}
    assert pod["terminationGracePeriodSeconds"] > config.drain_delay_s + config.grace_s
    has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
    assert config.gpu_ids == ((0,) if has_gpu else ())
    assert has_gpu == (folder not in {"base", "overlays/cpu"})
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[name]
        if config.listen.tls_certificate is None:
            assert probe["grpc"]["port"] == config.listen.port
        else:
            health = cli.parser().parse_args(probe["exec"]["command"][1:])
            assert (health.command, health.config) == ("health", Path("/etc/mal-server/server.yaml"))
            assert probe["periodSeconds"] > probe["timeoutSeconds"] > health.timeout
        assert not {"tcpSocket", "httpGet"} & probe.keys()


def test_only_the_tls_overlay_needs_tokens_and_encrypts(tmp_path: Path) -> None:
    for folder in SERVERS:
        config = settings_of(render(folder), tmp_path)
        assert (config.listen.tls_certificate is None) == config.listen.allow_plaintext == (folder != "overlays/tls")
        assert len(config.tokens) == (folder == "overlays/tls")


def test_the_settings_with_tls_differ_from_the_others_in_the_section_listen_only() -> None:
    plain, tls = (
        yaml.safe_load(only(render(folder), "ConfigMap")["data"]["server.yaml"]) for folder in ("base", "overlays/tls")
    )
    del plain["listen"], tls["listen"]
    assert plain == tls


def test_the_cpu_overlay_uses_as_many_threads_as_it_has_cores() -> None:
    (container,) = pod_of(only(render("overlays/cpu"), "Deployment"))["containers"]
    (variable,) = container["env"]
    assert variable["name"] == "OMP_NUM_THREADS"
    assert variable["valueFrom"]["resourceFieldRef"]["resource"] == "limits.cpu"
    assert container["args"][-1] == "threads=$(OMP_NUM_THREADS)"
    assert container["resources"]["limits"]["cpu"] == container["resources"]["requests"]["cpu"]


@pytest.mark.parametrize("folder", SERVERS)
def test_services_budget_and_policy_select_the_pods_of_the_server(folder: str) -> None:
    manifests = render(folder)
    labels = only(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    headless, single = (only(manifests, "Service", name) for name in ("mal-server-headless", "mal-server"))
    assert headless["spec"]["clusterIP"] == "None"
    assert "clusterIP" not in single["spec"]
    selectors = [headless["spec"]["selector"], single["spec"]["selector"]]
    selectors += [
        only(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        only(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        only(manifests, "Deployment")["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels for selector in selectors)


def test_the_service_monitor_scrapes_each_pod_once() -> None:
    manifests = render("overlays/keda")
    monitor = only(manifests, "ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    services = [one for one in manifests if one["kind"] == "Service"]
    selected = [
        one for one in services if monitor["selector"]["matchLabels"].items() <= one["metadata"]["labels"].items()
    ]
    ports = [port for one in selected for port in one["spec"]["ports"] if port["name"] == endpoint["port"]]
    assert [port["port"] for port in ports] == [9090]


@pytest.mark.parametrize("folder", ["label", "label-tls"])
def test_the_policy_of_the_server_admits_the_jobs_and_lets_the_server_open_no_connection(folder: str) -> None:
    policy = only(render("base"), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert not policy.get("egress")
    clients, monitoring = policy["ingress"]
    ((peer,), (port,)) = clients["from"], clients["ports"]
    assert port["port"] == 50051
    (template,) = pod_templates(render(folder))
    assert peer["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert "podSelector" not in monitoring["from"][0]


def test_nobody_else_reaches_the_pods_of_jobs() -> None:
    for folder in ("label", "train", "ray"):
        manifests = render(folder)
        policy = only(manifests, "NetworkPolicy")["spec"]
        assert policy["policyTypes"] == ["Ingress"]
        for template in pod_templates([one for one in manifests if one["kind"] != "NetworkPolicy"]):
            selector = policy["podSelector"]["matchLabels"].items()
            assert selector <= template["metadata"]["labels"].items()


def test_the_ray_cluster_has_a_token_and_ends_with_its_job() -> None:
    spec = only(render("ray"), "RayJob")["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["rayVersion"] == versions(ROOT / "constraints.txt")["ray"]
    for template in pod_templates(spec):
        variables = {entry["name"]: entry["value"] for entry in template["spec"]["containers"][0]["env"]}
        assert variables["RAY_USAGE_STATS_ENABLED"] == "0"


def test_the_number_of_shards_is_the_same_everywhere() -> None:
    job, merge = (only(render(folder), "Job") for folder in ("label", "merge"))
    spec: Any = job["spec"]
    assert (spec["completionMode"], pod_of(job)["restartPolicy"]) == ("Indexed", "Never")
    numbers = {spec["completions"], *(int(shards(one)) for one in (job, merge))}
    assert len(numbers) == 1


@pytest.mark.parametrize(("folder", "server"), [("label", "base"), ("label-tls", "overlays/tls")])
def test_the_server_admits_a_stream_of_every_shard(folder: str, server: str, tmp_path: Path) -> None:
    connections = settings_of(render(server), tmp_path).connections
    limit = connections.max_streams_per_token if server == "overlays/tls" else connections.max_streams
    assert only(render(folder), "Job")["spec"]["parallelism"] <= limit


def shards(job: Manifest) -> str:
    (container,) = pod_of(job)["containers"]
    (variable,) = container["env"]
    assert variable["name"] == "SHARDS"
    return str(variable["value"])


def test_the_numbers_of_machines_and_processes_of_the_training_agree() -> None:
    jobset = only(render("train"), "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job, (container,) = replicated["template"]["spec"], pod_of(jobset)["containers"]
    given = dict(word.lstrip("-").split("=", 1) for word in container["args"] if "=" in word)
    assert job["completions"] == job["parallelism"] == int(given["nnodes"]) == int(given["train.num_nodes"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == given["nproc-per-node"] == given["train.num_gpus"]
    name = jobset["metadata"]["name"]
    assert given["master-addr"] == f"{name}-{replicated['name']}-0-0.{name}"


@pytest.mark.parametrize("folder", ["base", "label", "overlays/hpa", "overlays/keda", "ray", "train"])
def test_a_field_that_does_not_exist_is_found_in_every_kind(folder: str) -> None:
    manifests = render(folder)
    for manifest in manifests:
        manifest["spec" if "spec" in manifest else "metadata"]["replica"] = 3
    expected = {one["kind"] for one in manifests} - {"RayJob"}
    assert {fault.split()[0] for fault in schemas.faults(manifests)} == expected


def test_a_value_of_another_type_is_found_in_custom_resources() -> None:
    keda, train = render("overlays/keda"), render("train")
    only(keda, "ScaledObject")["spec"]["maxReplicaCount"] = "8"
    only(keda, "ServiceMonitor")["spec"]["endpoints"][0]["interval"] = 15
    only(train, "JobSet")["spec"]["failurePolicy"]["maxRestarts"] = "3"
    found = {fault.split()[0] for manifests in (keda, train) for fault in schemas.faults(manifests)}
    assert found == {"ScaledObject", "ServiceMonitor", "JobSet"}


def test_the_pods_of_a_kind_without_a_published_schema_are_checked() -> None:
    manifests = render("ray")
    for template in pod_templates(only(manifests, "RayJob")):
        template["spec"]["containers"][0]["imagePullPolice"] = "Always"
    assert len([fault for fault in schemas.faults(manifests) if fault.startswith("Pod")]) == 3 * 2


def test_the_check_of_the_repository_renders_and_checks_every_folder() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert "-m tests.deploy.schemas" in recipe
    assert not schemas.MODELED & schemas.UNCHECKED


@pytest.mark.parametrize("folder", ["ray", "train"])
def test_the_spec_of_a_job_is_valid_and_uses_its_volumes(folder: str, tmp_path: Path) -> None:
    manifests = render(folder)
    path = tmp_path / "spec.yaml"
    path.write_text(only(manifests, "ConfigMap")["data"]["spec.yaml"])
    load_spec(path, [])
    mounts = {mount["mountPath"] for pod in pod_templates(manifests) for mount in mounts_of(pod)}
    used = re.findall(r"(/[\w-]+(?:/[\w-]+)?)/[\w.-]+$", path.read_text(), re.MULTILINE)
    assert used
    assert all(any(f"{name}/".startswith(f"{mount}/") for mount in mounts) for name in used)


def mounts_of(template: Manifest) -> list[Manifest]:
    return [mount for container in template["spec"]["containers"] for mount in container["volumeMounts"]]


def test_the_page_names_every_folder_and_no_other() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    table = page.partition("| folder |")[2].partition("\n\n")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`([\w/-]+)`", line.split("|")[1])}
    assert named == set(folders())
    applied = set(re.findall(r"apply -k deploy/kubernetes/(\S+)", page))
    assert applied
    assert applied <= named
    components = set(re.findall(r"deploy/kubernetes/components/(\S+)", page))
    assert components <= {path.name for path in (KUBERNETES / "components").iterdir()}


def test_the_combination_of_components_on_the_page_is_valid(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    text = example.replace("PATH", os.path.relpath(ROOT, tmp_path.resolve()))
    (tmp_path / "kustomization.yaml").write_text(text)
    manifests = render(tmp_path)
    assert list(schemas.faults(manifests)) == []
    assert {one["metadata"]["namespace"] for one in manifests} == {"mal"}
    (container,) = pod_of(only(manifests, "Deployment"))["containers"]
    assert container["image"].startswith("registry.example/")
    config = settings_of(manifests, tmp_path)
    assert config.gpu_ids
    assert config.tokens
    assert config.listen.tls_certificate
    assert only(manifests, "ScaledObject")["spec"]["scaleTargetRef"]["name"] == "mal-server"


def test_the_command_on_the_page_makes_a_valid_rule_of_the_alerts() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (command,) = re.findall(r"^(\(printf .*?\)) \| kubectl", page, re.DOTALL | re.MULTILINE)
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    rule = yaml.safe_load(done.stdout)
    alerts = yaml.safe_load((ROOT / "deploy" / "monitoring" / "alerts.yml").read_text())
    assert rule["spec"] == alerts
    assert list(schemas.faults([rule])) == []
    del rule["spec"]["groups"][0]["rules"][0]["expr"]
    assert list(schemas.faults([rule])) != []
