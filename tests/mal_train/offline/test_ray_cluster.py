"""Actors for a cluster, and the errors before any work: no Ray, no cluster, no resources. Ray itself is a stand-in."""

import importlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mal_train.core.errors import ConfigError
from mal_train.offline import ray_cluster
from mal_train.offline.ray_cluster import ActorPool, RayCluster, plan_actors

GPU_NODE = {"CPU": 16.0, "GPU": 4.0, "memory": 1e9}
SMALL = {"CPU": 2.0}


def pool(*nodes: dict[str, float], use_gpus: bool = True, count: int = 0, cpus: int = 0) -> ActorPool:
    return plan_actors(nodes, use_gpus=use_gpus, count=count, cpus=cpus)


def test_each_gpu_gets_an_actor_with_its_share_of_the_cpus() -> None:
    assert pool(GPU_NODE, GPU_NODE, SMALL) == ActorPool(8, cpus=4, gpus=1)
    assert pool(GPU_NODE, {"CPU": 4.0, "GPU": 2.0}).cpus == 2, "of the node with the fewest"
    assert pool(GPU_NODE).device == "cuda"


def test_without_gpus_actors_share_the_cpus_and_may_hold_them_all() -> None:
    assert pool({"CPU": 10.0}) == ActorPool(2, cpus=4, gpus=0)
    assert pool(SMALL, {"CPU": 8.0}) == ActorPool(5, cpus=2, gpus=0)
    assert pool(GPU_NODE, use_gpus=False) == ActorPool(4, cpus=4, gpus=0)
    assert pool({"CPU": 0.0}, SMALL, cpus=1) == ActorPool(2, cpus=1, gpus=0)
    assert pool(SMALL).device == "cpu"


def test_settings_choose_number_and_cpus() -> None:
    assert pool(GPU_NODE, count=2, cpus=3) == ActorPool(2, cpus=3, gpus=1)


@pytest.mark.parametrize(
    ("nodes", "options", "numbers"),
    [
        ([], {}, ["1 actors", "no resources", "0 fit"]),
        ([{"CPU": 0.0}], {}, ["1 actors", "0 CPU"]),
        ([SMALL, SMALL], {"count": 3, "cpus": 2}, ["3 actors of 2 CPU", "2 CPU, 2 CPU", "2 fit"]),
        ([SMALL], {"cpus": 4}, ["1 actors of 4 CPU", "2 CPU", "0 fit"]),
        ([{"CPU": 1.0, "GPU": 4.0}], {"count": 4, "cpus": 1}, ["4 actors of 1 CPU + 1 GPU", "1 CPU + 4 GPU", "1 fit"]),
    ],
)
def test_a_cluster_without_the_resources_is_refused_with_the_numbers(
    nodes: list[dict[str, float]], options: dict[str, Any], numbers: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        pool(*nodes, **options)
    assert [text for text in numbers if text not in str(caught.value)] == []


class StandInRay(SimpleNamespace):
    """The module ray, as far as a connection uses it."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(
            shutdowns=0,
            options={},
            nodes=lambda: [{"Alive": True, "Resources": SMALL}, {"Alive": False, "Resources": GPU_NODE}],
            available_resources=lambda: dict(SMALL),
        )
        vars(self).update(changes)

    def init(self, **options: Any) -> None:
        self.options = options
        signal.signal(signal.SIGTERM, lambda *_: None)

    def shutdown(self) -> None:
        self.shutdowns += 1


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandInRay:
    stand_in = StandInRay()
    monkeypatch.setattr(ray_cluster, "load_ray", lambda environment: stand_in)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the test")
    return stand_in


@pytest.fixture
def address() -> Iterator[str]:
    """Yields an address at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_connection_ends_and_keeps_the_handler_of_sigterm(ray: StandInRay, address: str) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with RayCluster(address) as cluster:
        assert signal.getsignal(signal.SIGTERM) is handler
        assert ray.options["address"] == address
        assert cluster.plan(use_gpus=True, count=0, cpus=1) == ActorPool(2, cpus=1, gpus=0), "living nodes alone"
    assert ray.shutdowns == 1


def test_without_an_address_a_cluster_of_this_machine_starts_without_dashboard(ray: StandInRay) -> None:
    with RayCluster(""):
        assert (ray.options["address"], ray.options["include_dashboard"]) == ("local", False)
    assert ray.shutdowns == 1


@pytest.mark.parametrize("text", ["127.0.0.1:1", "127.0.0.1", "ray://127.0.0.1:10001"])
def test_an_address_without_a_cluster_is_refused(text: str, ray: StandInRay) -> None:
    with pytest.raises(ConfigError, match=r"inference\.ray_address"), RayCluster(text):
        pass
    assert ray.options == {}


@pytest.mark.parametrize("error", [ConnectionError("no cluster"), RuntimeError("Version mismatch\nRay: 2.1\n")])
def test_a_cluster_that_refuses_the_connection_is_an_error(
    error: Exception, ray: StandInRay, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match=str(error).partition("\n")[0]), RayCluster(address):
        pass
    assert ray.shutdowns == 1


def test_resources_that_other_jobs_use_are_waited_for_and_then_refused(
    ray: StandInRay, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([{"CPU": 0.0}, {"CPU": 1.0}, {"CPU": 2.0}])
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(ray, "available_resources", lambda: next(free))
    with RayCluster(address) as cluster:
        assert cluster.plan(use_gpus=False, count=2, cpus=1).count == 2
        monkeypatch.setattr(ray, "available_resources", dict)
        monkeypatch.setattr(ray_cluster, "FREE_TIMEOUT_S", 0.0)
        with pytest.raises(ConfigError, match="2 CPU, of which 0 are free"):
            cluster.plan(use_gpus=False, count=2, cpus=1)


def test_a_node_that_is_noticed_as_dead_while_waiting_gets_no_actor(
    ray: StandInRay, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = iter([[SMALL, SMALL], [SMALL]])
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in next(nodes)])
    with RayCluster(address) as cluster:
        assert cluster.plan(use_gpus=False, count=0, cpus=1).count == 2


@pytest.mark.parametrize("missing", ["ray", "pandas"])
def test_without_ray_the_error_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ConfigError, match=r"mask-auto-labeler\[ray\]"):
        ray_cluster.load_ray({})


def test_a_trace_of_ray_becomes_one_line() -> None:
    try:
        raise RuntimeError("in the code of Ray\nThe actor died: out of memory")
    except RuntimeError:
        record = logging.LogRecord("ray.data", logging.ERROR, "", 1, "100 %% of a %s failed", ("task",), sys.exc_info())
    assert ray_cluster._shorten(record)
    assert logging.Formatter().format(record) == "The actor died: out of memory: 100 % of a task failed"
