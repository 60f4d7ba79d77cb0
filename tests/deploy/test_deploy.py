"""What deploy/ holds is what its tools accept, names what exists, and fits the server's own settings."""

import json
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import dockerfile_parse
import kubernetes_validate
import pytest
import yaml

from mal_server import cli
from mal_server.config.server import ServerConfig
from mal_server.ops.metrics import Metrics
from mal_train.core.yaml_config import validate
from tests.paths import ROOT

DEPLOY = ROOT / "deploy"
MONITORING = DEPLOY / "monitoring"
KUBERNETES_VERSION = "1.31"


def run(tool: str, *arguments: str, cwd: Path = DEPLOY) -> str:
    """The output of a tool that must be content; skips where it is not installed."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (Debian: prometheus, haproxy, nginx-light)")
    done = subprocess.run([tool, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_prometheus_accepts_its_configuration_and_the_rules() -> None:
    assert "10 rules found" in run("promtool", "check", "config", "prometheus.yml", cwd=MONITORING)


def test_each_alert_fires_for_what_it_is_made_for() -> None:
    run("promtool", "test", "rules", "alerts.test.yml", cwd=MONITORING)


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return list(group["rules"])


def test_each_alert_is_tested() -> None:
    tested = yaml.safe_load((MONITORING / "alerts.test.yml").read_text())["tests"]
    fired = {one["alertname"] for test in tested for one in test["alert_rule_test"] if one["exp_alerts"]}
    assert fired == {alert["alert"] for alert in alerts()}


def test_each_alert_has_its_runbook() -> None:
    guide = (ROOT / "docs" / "admin.md").read_text()
    for alert in alerts():
        assert f"### {alert['alert']}\n" in guide
        assert alert["annotations"]["runbook"] == f"docs/admin.md#{alert['alert'].lower()}"


def exported() -> set[str]:
    """Every series that the server shows; "up" is Prometheus' own."""
    metrics = Metrics()
    metrics.call_ended("m", "OK", 0.1)
    names = {"up"}
    for family in metrics.registry.collect():
        kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        names |= {family.name + end for end in kinds.get(family.type, ("",))}
    return names


def used(expression: str) -> set[str]:
    """Names of series in an expression: what is neither a label, a word of PromQL, nor a Grafana variable."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|\b(?:by|on|without)\s*\([^)]*\)", " ", expression)
    return set(re.findall(r"\b(?:up|(?:mal|grpc|process)_\w+)\b", bare))


def test_alerts_ask_for_series_that_exist() -> None:
    asked = set().union(*(used(alert["expr"]) for alert in alerts()))
    assert len(asked) >= 8
    assert asked <= exported()


def test_the_dashboard_asks_for_series_that_exist() -> None:
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert all(used(expression) for expression in expressions)
    asked = set().union(*map(used, expressions))
    assert asked <= exported()
    # Every figure that the server counts has its place on the board.
    ours = {name for name in exported() if name.startswith("mal_") and name.endswith(("_total", "_bucket"))}
    assert {name.removesuffix("_bucket") for name in ours} <= {
        re.sub("_(bucket|sum|count)$", "", name) for name in asked
    }


def test_a_series_that_does_not_exist_would_be_seen() -> None:
    assert used('sum by (reason) (rate(mal_gone_total{reason="x"}[5m]))') == {"mal_gone_total"}
    assert "mal_gone_total" not in exported()


def manifests() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


@pytest.mark.parametrize("kind", ["ConfigMap", "Service", "Deployment", "PodDisruptionBudget"])
def test_kubernetes_knows_every_field_of_the_manifests(kind: str) -> None:
    kubernetes_validate.validate(manifests()[kind], KUBERNETES_VERSION, strict=True)


def test_a_wrong_field_of_a_manifest_is_seen() -> None:
    broken = manifests()["Deployment"]
    broken["spec"]["replica"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES_VERSION, strict=True)


def test_the_manifests_serve_with_settings_that_the_server_takes_on_the_ports_that_are_probed() -> None:
    settings = yaml.safe_load(manifests()["ConfigMap"]["data"]["server.yaml"])
    config = validate(ServerConfig, settings, source="kubernetes.yaml")
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {port["containerPort"] for port in container["ports"]} == {config.listen.port, config.metrics.port}
    assert (
        container["startupProbe"]["grpc"]["port"] == container["readinessProbe"]["grpc"]["port"] == config.listen.port
    )
    assert pod["terminationGracePeriodSeconds"] > config.drain_delay_s + config.grace_s
    assert cli.parser().parse_args(container["args"]).command == "serve"
    assert manifests()["Service"]["spec"]["clusterIP"] == "None"


def test_the_image_runs_a_command_line_that_the_program_takes_and_not_as_root(tmp_path: Path) -> None:
    parser = dockerfile_parse.DockerfileParser(path=str(tmp_path))
    parser.content = (DEPLOY / "container" / "Dockerfile").read_text()
    steps = {step["instruction"]: step["value"] for step in parser.structure}
    assert json.loads(steps["ENTRYPOINT"]) == ["mal-server"]
    serve = cli.parser().parse_args(json.loads(steps["CMD"]))
    assert serve.command == "serve"
    options, _, line = steps["HEALTHCHECK"].partition("CMD ")
    assert asks_by_the_settings(json.loads(line), serve.config)
    assert int(re.findall(r"--timeout=(\d+)s", options)[0]) > cli.parser().parse_args(json.loads(line)[1:]).timeout
    assert steps["USER"] == "10001:10001"
    assert steps["STOPSIGNAL"] == "SIGTERM"
    copied = [step["value"].split()[:-1] for step in parser.structure if step["instruction"] == "COPY"]
    assert all((ROOT / name).exists() for names in copied for name in names)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for names in copied for name in names} == kept


def asks_by_the_settings(line: list[str], config: Path) -> bool:
    """Whether it is `mal-server health` with these settings and nothing else."""
    program, *arguments = line
    args = cli.parser().parse_args(arguments)
    return (program, args.command, args.config, args.address) == ("mal-server", "health", config, "")


def test_the_probe_for_tls_in_the_manifests_comment_is_one_and_asks_by_the_settings() -> None:
    text = (DEPLOY / "kubernetes.yaml").read_text()
    (line,) = re.findall(r"^ *# +(exec: .*)$", text, re.MULTILINE)
    (numbers,) = re.findall(r"^ *# and (.*), since", text, re.MULTILINE)
    probe = yaml.safe_load(line) | yaml.safe_load("{" + numbers + "}")
    deployment = manifests()["Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    for name in ("startupProbe", "readinessProbe"):
        del container[name]["grpc"]
        container[name] |= probe
    kubernetes_validate.validate(deployment, KUBERNETES_VERSION, strict=True)
    serve = cli.parser().parse_args(container["args"])
    assert asks_by_the_settings(probe["exec"]["command"], serve.config)
    assert probe["timeoutSeconds"] > cli.parser().parse_args(probe["exec"]["command"][1:]).timeout


@pytest.mark.parametrize("name", ["mal-server.service", "supervisord.conf"])
def test_the_health_line_of_the_other_files_is_one(name: str) -> None:
    (line,) = re.findall(r"How it is: +(?:\S*/)?(mal-server health -c \S+)", (DEPLOY / name).read_text())
    assert asks_by_the_settings(line.split(), Path("/etc/mal-server/server.yaml"))


def test_compose_starts_a_new_container_after_every_end_but_a_wanted_one() -> None:
    service = yaml.safe_load((DEPLOY / "container" / "compose.yaml").read_text())["services"]["mal-server"]
    config = ServerConfig(checkpoint=Path("a"))
    assert service["restart"] == "unless-stopped"
    assert int(service["stop_grace_period"].removesuffix("s")) > config.drain_delay_s + config.grace_s
    assert (DEPLOY / "container" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_supervisord_restarts_after_every_end_but_a_wanted_one_and_waits_for_the_drain() -> None:
    settings = ConfigParser(inline_comment_prefixes=(" ;",))
    settings.read(DEPLOY / "supervisord.conf")
    program = settings["program:mal-server"]
    config = ServerConfig(checkpoint=Path("a"))
    assert (program["autorestart"], program["exitcodes"]) == ("unexpected", "0,2")
    assert int(program["stopwaitsecs"]) > config.drain_delay_s + config.grace_s
    assert cli.parser().parse_args(program["command"].split()[1:]).command == "serve"


def test_haproxy_accepts_its_configuration() -> None:
    run("haproxy", "-c", "-f", "proxy/haproxy.cfg")


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    run("nginx", "-t", "-c", str(DEPLOY / "proxy" / "nginx.conf"), "-g", f"pid {tmp_path}/pid;")
