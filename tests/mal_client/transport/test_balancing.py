"""Claims about the calls of one client to several servers behind one address, with servers in this process."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from mal.v1 import model_pb2, model_pb2_grpc
from mal_client.client import AsyncClient, Client
from mal_client.errors import ServerUnavailable
from mal_client.model_admin import ModelAdmin
from mal_client.transport.channel import channel_options
from mal_client.types import BoxLabel, Progress

from mal_server.api.health import HealthService
from mal_server.server import MalServer
from mal_train.core.errors import ConfigError
from tests.mal_client.datasets import make_dataset, with_masks
from tests.mal_client.name_server import name_server
from tests.mal_client.test_against_server import DISC, served
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, encoded

LABEL_IMAGE = "mal.v1.LabelingService/LabelImage"
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
CALLS = 30
BOXES = [DISC_BOX, DISC_BOX]
NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
LARGE = encoded(NOISE)
"""A file above the size from which a client sends hashes."""


class Group:
    """Servers with the same port on several loopback addresses."""

    def __init__(self, stack: ExitStack, **settings: Any) -> None:
        self._stack = stack
        self._settings = settings
        self._stops: dict[str, ExitStack] = {}
        self.port = 0
        self.servers: dict[str, MalServer] = {}

    def start(self, host: str) -> None:
        """Starts a server on an address."""
        servers: list[MalServer] = []
        listen = {**self._settings.get("listen", {}), "host": host, "port": self.port}
        stop = self._stops[host] = self._stack.enter_context(ExitStack())
        address = stop.enter_context(served(servers=servers, **{**self._settings, "listen": listen}))
        self.port = int(address.rpartition(":")[2])
        (self.servers[host],) = servers

    def drain(self, host: str) -> None:
        """Sets the health of a server to NOT_SERVING, and waits until its watches have sent that."""
        asyncio.run(self.servers[host].drain())
        # A call wakes the event loop of the server, which is another thread's.
        with Client(f"{host}:{self.port}") as client:
            client.server_info()
        time.sleep(0.5)

    def stop(self, host: str) -> None:
        """Ends a server without a grace period."""
        self._stops[host].close()

    @property
    def address(self) -> str:
        """All servers, as a list."""
        return "ipv4:" + ",".join(f"{host}:{self.port}" for host in self.servers)

    def counts(self) -> dict[str, int]:
        """Returns the number of calls that each server has answered."""
        return {host: handled(server) for host, server in self.servers.items()}


def handled(server: MalServer, method: str = LABEL_IMAGE, code: str = "OK") -> int:
    labels = {"method": method, "code": code}
    return int(server.registry.get_sample_value("grpc_server_handled_total", labels) or 0)


@contextmanager
def group(*hosts: str, **settings: Any) -> Iterator[Group]:
    with ExitStack() as stack:
        servers = Group(stack, **settings)
        for host in hosts:
            servers.start(host)
        yield servers


def is_right(labels: list[BoxLabel]) -> bool:
    return [(label.index, label.ok) for label in labels] == [(index, True) for index in range(len(BOXES))]


def infos(servers: Group) -> list[int]:
    """Returns the number of GetServerInfo calls that each server has answered."""
    return [handled(server, "mal.v1.ModelService/GetServerInfo") for server in servers.servers.values()]


def connect_to_all(client: Client, servers: Group) -> None:
    """Calls until the channel is connected to all servers: the first calls go to those that are."""
    before = infos(servers)
    until(lambda: client.server_info() and all(now > then for now, then in zip(infos(servers), before, strict=True)))


def call_blocking(servers: Group, address: str, count: int, **options: Any) -> bool:
    with Client(address, timeout_s=60, **options) as client, ThreadPoolExecutor(4) as threads:
        connect_to_all(client, servers)
        return all(threads.map(lambda _: is_right(client.label_image(DISC, BOXES)), range(count)))


def call_asyncio(servers: Group, address: str, count: int, **options: Any) -> bool:
    async def send() -> bool:
        async with AsyncClient(address, timeout_s=60, **options) as client:
            before = infos(servers)
            while any(now == then for now, then in zip(infos(servers), before, strict=True)):
                await client.server_info()
            answers = await asyncio.gather(*(client.label_image(DISC, BOXES) for _ in range(count)))
            return all(map(is_right, answers))

    return asyncio.run(send())


def until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def until_handled(servers: Group, calls: int) -> None:
    until(lambda: sum(servers.counts().values()) == calls)


@pytest.mark.parametrize("call", [call_blocking, call_asyncio])
def test_calls_go_to_all_servers_of_a_list_and_of_a_name(call: Callable[..., bool]) -> None:
    with group(*HOSTS) as servers, name_server(*HOSTS) as names:
        for address in (servers.address, names.target(servers.port)):
            before = servers.counts()
            assert call(servers, address, CALLS)
            until_handled(servers, sum(before.values()) + CALLS)
            counts = [count - before[host] for host, count in servers.counts().items()]
            assert all(abs(count - CALLS / 3) <= 0.2 * CALLS / 3 for count in counts)


def test_a_draining_server_gets_no_new_calls() -> None:
    with group(*HOSTS[:2]) as servers, Client(servers.address, timeout_s=60) as client:
        connect_to_all(client, servers)
        servers.drain(HOSTS[0])
        before = servers.counts()
        assert all(is_right(client.label_image(DISC, BOXES)) for _ in range(10))
        after = servers.counts()
    assert (after[HOSTS[0]] - before[HOSTS[0]], after[HOSTS[1]] - before[HOSTS[1]]) == (0, 10)


def test_a_server_that_refuses_connections_costs_no_call() -> None:
    with group(HOSTS[0]) as servers:
        closed = ",".join(f"{host}:{servers.port}" for host in HOSTS[1:])
        assert call_blocking(servers, f"ipv4:{closed},{HOSTS[0]}:{servers.port}", 10)


def test_one_server_whose_health_is_bad_is_still_called() -> None:
    """With one address there is nobody else: the call itself gets the status of the server."""
    with group(HOSTS[0]) as servers, Client(f"{HOSTS[0]}:{servers.port}", timeout_s=60) as client:
        servers.drain(HOSTS[0])
        assert is_right(client.label_image(DISC, BOXES))


def test_a_name_without_an_address_is_one_error() -> None:
    with (
        name_server() as names,
        Client(names.target(50051), timeout_s=20) as client,
        pytest.raises(ServerUnavailable, match=r"mal\.test"),
    ):
        client.server_info()


def test_a_server_that_is_added_to_the_name_gets_calls_when_a_connection_has_its_age(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mal_client.transport.channel.DNS_PAUSE_MS", 100)
    aging = {"max_age_s": 1.0, "age_grace_s": 1.0}
    with (
        group(HOSTS[0], connections=aging) as servers,
        name_server(HOSTS[0]) as names,
        Client(names.target(servers.port), timeout_s=60) as client,
    ):
        assert is_right(client.label_image(DISC, BOXES))
        servers.start(HOSTS[1])
        names.addresses.append(HOSTS[1])
        until(lambda: is_right(client.label_image(DISC, BOXES)) and servers.counts()[HOSTS[1]] > 2)


def test_an_image_is_sent_again_to_each_server_and_then_as_a_hash() -> None:
    boxes = [(5.0, 5.0, 20.0, 20.0)]
    with group(*HOSTS) as servers, Client(servers.address, timeout_s=60) as client:
        connect_to_all(client, servers)
        for _ in range(CALLS):
            (label,) = client.label_image(LARGE, boxes)
            assert label.ok
        misses = [handled(server, code="NOT_FOUND") for server in servers.servers.values()]
        hits = sum(
            server.registry.get_sample_value("mal_image_cache_hits_total") or 0 for server in servers.servers.values()
        )
    # Uploads to 3 servers, and a miss before the client sends more of them.
    assert sum(misses) <= 3
    assert hits >= CALLS - 10


def test_models_are_administered_on_one_server_at_a_time() -> None:
    with group(*HOSTS[:2]) as servers, Client(servers.address) as client:
        with pytest.raises(ConfigError, match="2 servers"):
            ModelAdmin(client)
        assert [len(ModelAdmin(server).list_models()) for server in client.servers()] == [1, 1]


def evaluations(servers: Group) -> list[int]:
    """Returns the number of Evaluate calls that each server has ended, in whichever way."""
    codes = ("OK", "CANCELLED", "UNAVAILABLE", "FAILED_PRECONDITION")
    method = "mal.v1.EvaluationService/Evaluate"
    return [sum(handled(server, method, code) for code in codes) for server in servers.servers.values()]


def test_an_evaluation_that_is_cut_resumes_on_the_server_that_has_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a common `resume_key`, another server would start from the beginning each time."""
    monkeypatch.setattr("mal_client.evaluation.stream.RETRY_PAUSE_S", 0.01)
    dataset, notices = with_masks(make_dataset(tmp_path, images=120)), list[str]()
    settings = {"connections": {"max_age_s": 1.6, "age_grace_s": 1.6}, "max_batch_size": 2}
    with (
        group(*HOSTS[:2], predictor=BrightPredictor(wait_s=0.05), **settings) as servers,
        Client(servers.address, timeout_s=60) as client,
    ):
        evaluation = client.evaluate(dataset.json_path, dataset.images_dir, on_notice=notices.append)
        other, used = sorted(evaluations(servers))
    assert (evaluation.images, evaluation.failed_count, notices) == (120, 0, [])
    assert used > 1
    assert other == 0


def test_an_evaluation_goes_on_at_another_server_with_the_same_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.evaluation.stream.RETRY_PAUSE_S", 0.01)
    monkeypatch.setenv("MAL_TEST_RESUME", "0123456789abcdef")
    monkeypatch.setattr("mal_client.evaluation.stream.random.randrange", lambda _: 0)
    dataset, notices = with_masks(make_dataset(tmp_path, images=40)), list[str]()
    predictor = BrightPredictor(wait_s=0.05)
    with group(*HOSTS[:2], predictor=predictor, resume_key="env:MAL_TEST_RESUME", max_batch_size=2) as servers:

        def stop_the_first(progress: Progress) -> None:
            if progress.images_done == 10 and not progress.images_before:
                servers.stop(HOSTS[0])

        with Client(servers.address, timeout_s=60) as client:
            evaluation = client.evaluate(
                dataset.json_path, dataset.images_dir, on_notice=notices.append, on_progress=stop_the_first
            )
        assert evaluations(servers)[1] == 1
    assert (evaluation.images, evaluation.failed_count, notices) == (40, 0, [])
    # Both servers together: images that were measured before are not labeled again.
    assert sum(size for _, size in predictor.batches) < 80 + 2 * 32 + 10


def certificate(folder: Path, *names: str) -> tuple[dict[str, str], Path]:
    """Returns the section `listen` with a certificate for these names, and the file of its authority."""
    authority = trustme.CA()
    issued = authority.issue_cert(*names)
    chain, key, ca = folder / "chain.pem", folder / "key.pem", folder / "ca.pem"
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    ca.write_bytes(authority.cert_pem.bytes())
    return {"tls_certificate": str(chain), "tls_key": str(key)}, ca


def test_tls_verifies_the_name_of_the_address_on_all_servers(tmp_path: Path) -> None:
    listen, ca = certificate(tmp_path, "mal.test")
    with group(*HOSTS[:2], listen=listen) as servers, name_server(*HOSTS[:2]) as names:
        assert call_blocking(servers, names.target(servers.port), 4, tls_ca=ca)
        assert min(servers.counts().values()) > 0
        assert call_blocking(servers, servers.address, 4, tls_ca=ca, authority="mal.test")
        # The servers of a name, each by its address: as in a job.
        with Client(f"mal.test:{servers.port}", tls_ca=ca) as client:
            for server in client.servers(lambda host, port: HOSTS[:2]):
                assert is_right(server.label_image(DISC, BOXES))
        with Client(f"other.test:{servers.port}", tls_ca=ca) as client:
            (server,) = client.servers(lambda host, port: HOSTS[:1])
            with pytest.raises(ServerUnavailable):
                server.server_info()


def test_the_servers_of_a_name_that_is_exempt_from_the_proxy_are_reached_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "mal.test")
    with group(HOSTS[0]) as servers, Client(f"mal.test:{servers.port}", timeout_s=20) as client:
        (server,) = client.servers(lambda host, port: HOSTS[:1])
        assert is_right(server.label_image(DISC, BOXES))


def test_a_list_with_tls_needs_the_name_that_its_servers_share(tmp_path: Path) -> None:
    _, ca = certificate(tmp_path, "mal.test")
    with pytest.raises(ConfigError, match="authority"):
        Client("10.0.0.1:1,10.0.0.2:1", tls_ca=ca)


@pytest.mark.parametrize("address", ["ipv4:127.0.0.1:1,10.0.0.2:1", "10.0.0.2:1,127.0.0.1:1"])
def test_a_token_needs_tls_unless_every_server_of_a_list_is_on_this_machine(address: str) -> None:
    with pytest.raises(ConfigError, match="TLS"):
        Client(address, token="secret")
    Client("ipv4:127.0.0.1:1,127.0.0.2:1", token="secret").close()


def test_a_watch_that_a_server_ends_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else more clients than a server keeps watches of would end those of each other without a pause."""
    ended: list[object] = []
    end = HealthService._end

    def recorded(self: HealthService, watch: Any) -> None:
        ended.append(watch)
        end(self, watch)

    monkeypatch.setattr("mal_server.api.health.MAX_WATCHES", 1)
    monkeypatch.setattr(HealthService, "_end", recorded)
    # Channels of one process share their connections, and so their watches.
    options = [*channel_options(has_several=True), ("grpc.use_local_subchannel_pool", 1)]
    with group(*HOSTS[:2]) as servers, ExitStack() as stack:
        for _ in range(3):
            channel = stack.enter_context(grpc.insecure_channel(servers.address, options=options))
            stub = model_pb2_grpc.ModelServiceStub(channel)
            stub.GetServerInfo(model_pb2.GetServerInfoRequest(), timeout=20)
            time.sleep(0.5)
            for _ in range(4):
                stub.GetServerInfo(model_pb2.GetServerInfoRequest(), timeout=20)
        assert len(ended) == 2 * len(servers.servers)
