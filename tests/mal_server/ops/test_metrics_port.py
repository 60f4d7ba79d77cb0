"""The HTTP port of metrics and its strangers."""

import socket
import urllib.request
from collections.abc import Iterator

import pytest

from mal_server.ops import metrics_port
from mal_server.ops.metrics import Metrics
from mal_server.ops.metrics_port import MAX_CONNECTIONS, MetricsPort
from mal_train.core.errors import ConfigError


@pytest.fixture
def port() -> Iterator[int]:
    served = MetricsPort(Metrics().registry, "127.0.0.1", 0)
    yield served.port
    served.close()


def scrape(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        content: bytes = response.read()
        return content


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 60)
    connection.sendall(b"GET /metrics HTTP/1.1\r\nx: ")
    return connection


def test_a_metrics_port_in_use_is_named(port: int) -> None:
    with pytest.raises(ConfigError, match=r"^metrics: .*127\.0\.0\.1:\d+"):
        MetricsPort(Metrics().registry, "127.0.0.1", port)


def test_metrics_are_served_on_ipv6_too() -> None:
    served = MetricsPort(Metrics().registry, "::1", 0)
    served.close()


def test_one_connection_too_many_ends_the_oldest_and_scrapes_go_on(port: int) -> None:
    slow = [connect(port) for _ in range(MAX_CONNECTIONS)]
    assert b"mal_queue_crops" in scrape(port)
    assert slow[0].recv(1) == b""
    for connection in slow:
        connection.close()


def test_a_slow_request_is_ended(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_port, "CONNECTION_S", 0.1)
    with connect(port) as connection:
        assert connection.recv(1) == b""


def test_other_methods_are_refused(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(b"DELETE /metrics HTTP/1.0\r\n\r\n")
        assert b" 501 " in connection.recv(100)
