"""Files in deploy/: their tools accept them, and their names and times match the server and its settings."""

import json
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import dockerfile_parse
import pytest
import yaml

from mal_server import cli
from mal_server.config.server import ServerConfig
from mal_server.ops.metrics import Metrics
from tests.paths import ROOT
from tests.tools import program

DEPLOY = ROOT / "deploy"
MONITORING = DEPLOY / "monitoring"


def run(tool: str, *arguments: str, cwd: Path = DEPLOY) -> str:
    """Returns the output of a tool, which must succeed."""
    done = subprocess.run([program(tool), *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_prometheus_accepts_its_configuration_and_the_rules() -> None:
    assert "10 rules found" in run("promtool", "check", "config", "prometheus.yml", cwd=MONITORING)


def test_each_alert_fires_on_its_condition() -> None:
    run("promtool", "test", "rules", "alerts.test.yml", cwd=MONITORING)


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return list(group["rules"])


def test_each_alert_is_tested() -> None:
    tested = yaml.safe_load((MONITORING / "alerts.test.yml").read_text())["tests"]
    fired = {rule["alertname"] for test in tested for rule in test["alert_rule_test"] if rule["exp_alerts"]}
    assert fired == {alert["alert"] for alert in alerts()}


def test_each_alert_has_a_runbook() -> None:
    guide = (ROOT / "docs" / "admin.md").read_text()
    for alert in alerts():
        assert f"### {alert['alert']}\n" in guide
        assert alert["annotations"]["runbook"] == f"docs/admin.md#{alert['alert'].lower()}"


def exported() -> set[str]:
    """Returns every series that the server exports, and "up" of Prometheus itself."""
    metrics = Metrics()
    metrics.call_ended("m", "OK", 0.1)
    names = {"up"}
    for family in metrics.registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        names |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    return names


def used(expression: str) -> set[str]:
    """Returns the names of series in an expression, without labels, PromQL keywords and Grafana variables."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|\b(?:by|on|without)\s*\([^)]*\)", " ", expression)
    return set(re.findall(r"\b(?:up|(?:mal|grpc|process)_\w+)\b", bare))


def test_alerts_use_series_that_exist() -> None:
    series = set().union(*(used(alert["expr"]) for alert in alerts()))
    assert len(series) >= 8
    assert series <= exported()


def test_the_dashboard_uses_series_that_exist_and_shows_every_metric() -> None:
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert all(used(expression) for expression in expressions)
    series = set().union(*map(used, expressions))
    assert series <= exported()
    ours = {name for name in exported() if name.startswith("mal_") and name.endswith(("_total", "_bucket"))}
    assert {name.removesuffix("_bucket") for name in ours} <= {
        re.sub("_(bucket|sum|count)$", "", name) for name in series
    }


def test_a_missing_series_is_detected() -> None:
    assert used('sum by (reason) (rate(mal_gone_total{reason="x"}[5m]))') == {"mal_gone_total"}
    assert "mal_gone_total" not in exported()


def test_the_image_runs_a_valid_command_line_as_an_unprivileged_user(tmp_path: Path) -> None:
    parser = dockerfile_parse.DockerfileParser(path=str(tmp_path))
    parser.content = (DEPLOY / "container" / "Dockerfile").read_text()
    steps = {step["instruction"]: step["value"] for step in parser.structure}
    assert json.loads(steps["ENTRYPOINT"]) == ["mal-server"]
    serve = cli.parser().parse_args(json.loads(steps["CMD"]))
    assert serve.command == "serve"
    options, _, line = steps["HEALTHCHECK"].partition("CMD ")
    assert is_health_check_with(json.loads(line), serve.config)
    assert int(re.findall(r"--timeout=(\d+)s", options)[0]) > cli.parser().parse_args(json.loads(line)[1:]).timeout
    assert steps["USER"] == "10001:10001"
    assert steps["STOPSIGNAL"] == "SIGTERM"
    copied = [step["value"].split()[:-1] for step in parser.structure if step["instruction"] == "COPY"]
    assert all((ROOT / name).exists() for names in copied for name in names)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for names in copied for name in names} == kept


def is_health_check_with(line: list[str], config: Path) -> bool:
    """Returns True for `mal-server health` with these settings and no other argument."""
    program, *arguments = line
    args = cli.parser().parse_args(arguments)
    return (program, args.command, args.config, args.address) == ("mal-server", "health", config, "")


@pytest.mark.parametrize("name", ["mal-server.service", "supervisord.conf"])
def test_the_health_check_of_the_other_files_is_valid(name: str) -> None:
    (line,) = re.findall(r"Health check: +(?:\S*/)?(mal-server health -c \S+)", (DEPLOY / name).read_text())
    assert is_health_check_with(line.split(), Path("/etc/mal-server/server.yaml"))


def test_compose_restarts_the_container_unless_it_was_stopped() -> None:
    service = yaml.safe_load((DEPLOY / "container" / "compose.yaml").read_text())["services"]["mal-server"]
    config = ServerConfig(checkpoint=Path("a"))
    assert service["restart"] == "unless-stopped"
    assert int(service["stop_grace_period"].removesuffix("s")) > config.drain_delay_s + config.grace_s
    assert (DEPLOY / "container" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_supervisord_restarts_the_server_unless_it_was_stopped_and_waits_for_the_drain() -> None:
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
