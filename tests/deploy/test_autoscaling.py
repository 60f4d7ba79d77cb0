"""The autoscalers of deploy/kubernetes: their query, evaluated by Prometheus on the metrics of a loaded server."""

import json
import math
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.load.client import Plan
from benchmarks.load.run import fake_server, fake_server_images, run_clients
from mal_server.config.server import ServerConfig
from mal_train.distributed.launch import free_port
from tests.deploy.rendered import only, render
from tests.tools import program

ADMITTED = 64
"""Crops of eight clients with eight boxes each."""


def trigger() -> dict[str, Any]:
    (found,) = only(render("overlays/keda"), "ScaledObject")["spec"]["triggers"]
    return dict(found)


def hpa_metric() -> dict[str, Any]:
    (found,) = only(render("overlays/hpa"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    return dict(found["pods"])


def scraped(metrics_port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as response:
        return str(response.read().decode())


def waiting(metrics_port: int) -> float:
    """Returns the gauge that the autoscalers use; fails if it has labels or another type."""
    text = scraped(metrics_port)
    assert "# TYPE mal_queue_crops gauge" in text
    (value,) = re.findall(r"^mal_queue_crops (\S+)$", text, re.MULTILINE)
    return float(value)


def wait_for(condition: Callable[[], bool], within_s: float = 60) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@contextmanager
def prometheus(folder: Path, metrics_port: int) -> Iterator[str]:
    """Runs Prometheus with the target labels that the ServiceMonitor gives; yields its address."""
    monitor = only(render("overlays/keda"), "ServiceMonitor")["spec"]
    service = only(render("overlays/keda"), "Service", "mal-server-headless")
    (endpoint,) = monitor["endpoints"]
    labels = {"job": service["metadata"]["labels"][monitor["jobLabel"]], "namespace": "mal", "pod": "mal-server-0"}
    job = {
        "job_name": "unused",
        "metrics_path": endpoint["path"],
        "scrape_interval": "1s",
        "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"], "labels": labels}],
    }
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with subprocess.Popen([program("prometheus"), *options, "--log.level=error"]) as process:
        try:
            yield address
        finally:
            process.kill()


def query(address: str, expression: str) -> list[float]:
    """Returns the values of an instant query; an empty list also while Prometheus starts."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return [float(series["value"][1]) for series in json.load(response)["data"]["result"]]
    except OSError:
        return []


def is_right(values: list[float]) -> bool:
    """Returns True for one value, of the crops that wait; one runs, and up to a call of eight was just answered."""
    return len(values) == 1 and ADMITTED - 9 <= values[0] < ADMITTED


@pytest.mark.promise("deployment", "The query of the shipped autoscalers counts the crops that wait")
def test_the_query_of_the_autoscalers_counts_the_crops_that_wait(tmp_path: Path) -> None:
    program("prometheus")
    images, port = tmp_path / "images", free_port()
    images.mkdir()
    fake_server_images(images, count=1)
    settings = ["--batch-ms", "3000", "max_batch_size=1", f"metrics.port={port}"]
    with fake_server(tmp_path, *settings) as server:
        plan = Plan(server.address, clients=8, seconds=120, boxes=8)
        with run_clients([plan], images):
            wait_for(lambda: is_right([waiting(port)]))
            with prometheus(tmp_path, port) as address:
                expression = trigger()["metadata"]["query"]
                wait_for(lambda: is_right(query(address, expression)))
                # The default rules of prometheus-adapter make this query of the metric of the autoscaler.
                adapter = f'sum({hpa_metric()["metric"]["name"]}{{namespace="mal",pod=~"mal-server-0"}}) by (pod)'
                assert is_right(query(address, adapter))
    threshold = float(trigger()["metadata"]["threshold"])
    assert math.ceil((ADMITTED - 1) / threshold) == 2
    assert float(hpa_metric()["target"]["averageValue"]) == threshold


def test_the_threshold_is_two_full_batches() -> None:
    assert float(trigger()["metadata"]["threshold"]) == 2 * ServerConfig().max_batch_size


def test_both_autoscalers_own_the_replicas_and_keep_the_same_bounds() -> None:
    keda, hpa = render("overlays/keda"), render("overlays/hpa")
    for manifests in (keda, hpa):
        assert "replicas" not in only(manifests, "Deployment")["spec"]
    scaled, plain = only(keda, "ScaledObject")["spec"], only(hpa, "HorizontalPodAutoscaler")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (plain["minReplicas"], plain["maxReplicas"])
    assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == plain["behavior"]
    assert scaled["scaleTargetRef"]["name"] == plain["scaleTargetRef"]["name"] == "mal-server"
    assert trigger()["metricType"] == plain["metrics"][0]["pods"]["target"]["type"] == "AverageValue"
    # One pod may be drained while another one serves.
    assert plain["minReplicas"] > only(hpa, "PodDisruptionBudget")["spec"]["maxUnavailable"]


@pytest.mark.parametrize("kind", ["Service", "Deployment"])
def test_scaling_changes_nothing_else(kind: str) -> None:
    bare = only(render("overlays/gpu"), kind, "mal-server")
    bare["spec"].pop("replicas", None)
    assert only(render("overlays/keda"), kind, "mal-server") == bare
