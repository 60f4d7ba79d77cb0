"""Calls with an HTTP proxy in the environment: which go through it, and what it could read."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from mal_client.client import AsyncClient, Client
from mal_client.errors import ServerUnavailable

from mal_train.core.errors import ConfigError
from mal_train.core.images.decoder import encode_png
from tests.mal_client.fake_server import FakeServer, serving
from tests.proxy import RecordingProxy, recording_proxy

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY")
NAME = "mal.example.test"
BOX = (2.0, 2.0, 5.0, 5.0)
PNG = encode_png(np.zeros((16, 16, 3), np.uint8))


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingProxy]:
    with recording_proxy() as proxy:
        for variable in VARIABLES:
            monkeypatch.setenv(variable, proxy.url)
        yield proxy


def label_once(address: str) -> None:
    with Client(address, timeout_s=20) as client:
        assert client.label_image(PNG, [BOX])[0].error is None


def label_once_async(address: str) -> None:
    async def work() -> None:
        async with AsyncClient(address, timeout_s=20) as client:
            assert (await client.label_image(PNG, [BOX]))[0].error is None

    asyncio.run(work())


@pytest.mark.parametrize("label", [label_once, label_once_async])
def test_a_server_on_this_machine_is_never_reached_through_a_proxy(
    label: Callable[[str], None], proxy: RecordingProxy
) -> None:
    with serving(FakeServer()) as address:
        port = address.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost", "dns:///localhost", "ipv4:127.0.0.1"):
            label(f"{host}:{port}")
    assert proxy.requests == []


@pytest.mark.parametrize("label", [label_once, label_once_async])
def test_another_machine_is_reached_through_the_proxy(label: Callable[[str], None], proxy: RecordingProxy) -> None:
    with serving(FakeServer()) as address:
        proxy.hosts[NAME] = address
        label(f"{NAME}:50051")
    assert set(proxy.requests) == {f"CONNECT {NAME}:50051"}


def test_upper_case_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording_proxy() as proxy, serving(FakeServer()) as address:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        proxy.hosts[NAME] = address
        label_once(f"{NAME}:50051")
        assert proxy.requests
        proxy.requests.clear()
        monkeypatch.setenv("NO_PROXY", NAME)
        with Client(f"{NAME}:50051", timeout_s=5) as client, pytest.raises(ServerUnavailable):
            client.server_info()
        assert proxy.requests == []


def test_the_error_of_a_call_through_a_proxy_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording_proxy(status=403) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with Client(f"{NAME}:50051", timeout_s=5) as client, pytest.raises(ServerUnavailable) as caught:
            client.server_info()
        assert f"https_proxy={proxy.url}" in str(caught.value)
        assert "no_proxy" in str(caught.value)
        with Client("127.0.0.1:1", timeout_s=5) as client, pytest.raises(ServerUnavailable) as caught:
            client.server_info()
        assert "proxy" not in str(caught.value)


def test_a_token_never_passes_a_proxy_in_plaintext(proxy: RecordingProxy) -> None:
    with serving(FakeServer()) as address:
        with Client(address, token="topsecret", timeout_s=20) as client:
            client.server_info()
        proxy.hosts[NAME] = address
        with pytest.raises(ConfigError, match="TLS"):
            Client(f"{NAME}:50051", token="topsecret")
    assert proxy.requests == []
    assert b"topsecret" not in proxy.read


def test_grpc_itself_would_have_gone_through_the_proxy(proxy: RecordingProxy) -> None:
    """Keeps the tests above honest: the fake proxy is one that gRPC uses."""
    with serving(FakeServer()) as address, grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/x/y", None, None)(b"", timeout=5)
    assert proxy.requests == [f"CONNECT {address}"]


def test_the_command_reaches_a_server_on_this_machine_directly(proxy: RecordingProxy, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("topsecret")
    with serving(FakeServer()) as address:
        command = [sys.executable, "-m", "mal_client.cli.main", "info", "--server", address, "--token-file", str(token)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert proxy.requests == []
