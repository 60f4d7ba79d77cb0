"""Claims about the servers that are found behind an address."""

import socket
from collections.abc import Sequence
from weakref import ref

import pytest
from mal_client.client import Client
from mal_client.errors import CallCancelled, ServerUnavailable
from mal_client.transport import resolver
from mal_client.transport.resolver import resolve, system_lookup

from mal_train.core.errors import ConfigError


def lookup(*addresses: str) -> resolver.Lookup:
    return lambda host, port: addresses


def found(address: str, *ips: str) -> list[tuple[str, str | None]]:
    return [(server.address, server.authority) for server in resolve(address, lookup(*ips))]


def never(host: str, port: int) -> Sequence[str]:
    raise AssertionError(host)


@pytest.mark.parametrize("address", ["10.0.0.1:1", "[::1]:1", "unix:/run/mal.sock"])
def test_what_is_no_name_is_not_resolved(address: str) -> None:
    (server,) = resolve(address, never)
    assert (server.address, server.authority) == (address, None)


@pytest.mark.parametrize("address", ["mal:50051", "dns:mal:50051", "dns:///mal:50051"])
def test_each_address_of_a_name_is_a_server_with_the_authority_of_the_name(address: str) -> None:
    assert found(address, "10.0.0.1", "10.0.0.2") == [("10.0.0.1:50051", "mal:50051"), ("10.0.0.2:50051", "mal:50051")]


def test_ipv6_addresses_are_in_brackets_and_the_default_port_is_that_of_grpc() -> None:
    assert found("dns:mal", "2001:db8::1") == [("[2001:db8::1]:443", "mal:443")]


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")])
def test_a_name_without_an_address_is_one_error_with_the_name(error: Exception) -> None:
    def fail(host: str, port: int) -> Sequence[str]:
        raise error

    for without in (fail, lookup()):
        with pytest.raises(ServerUnavailable, match="mal-server"):
            resolve("mal-server:50051", without)


def test_a_job_cannot_ask_another_dns_server() -> None:
    with pytest.raises(ConfigError, match="dns:///mal:50051"):
        resolve("dns://10.0.0.53/mal:50051", never)


def test_the_resolver_of_the_system_resolves_localhost_to_one_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (server,) = resolve(f"localhost:{port}", system_lookup)
        assert (server.address, server.authority) == (f"127.0.0.1:{port}", f"localhost:{port}")


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_name_with_both_ip_versions_stands_for_the_one_that_answers(family: int, host: str) -> None:
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {host} on this machine")
    with listener:
        servers = resolve(f"mal:{listener.getsockname()[1]}", lookup("::1", "127.0.0.1"))
        assert len(servers) == 1
        assert host in servers[0].address


def test_without_an_answer_a_name_with_both_ip_versions_stands_for_ipv4() -> None:
    assert [server for server, _ in found("mal:1", "::1", "127.0.0.1")] == ["127.0.0.1:1"]


def test_a_name_behind_a_proxy_is_left_to_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "localhost, .internal")
    assert [server.address for server in resolve("mal.example.org:1", never)] == ["mal.example.org:1"]
    assert found("mal.internal:1", "10.0.0.1") == [("10.0.0.1:1", "mal.internal:1")]


def test_the_servers_of_a_client_are_clients_that_close_with_it() -> None:
    with Client("mal:50051", timeout_s=7) as client:
        first, second = client.servers(lookup("10.0.0.1", "10.0.0.2"))
        assert (first.address, first.timeout_s) == ("10.0.0.1:50051", 7)
        assert client.servers(lookup("10.0.0.3", "10.0.0.1"))[1] is first
        first.close()
        (again,) = client.servers(lookup("10.0.0.1"))
        assert again is not first
    assert again.is_closed
    assert second.is_closed
    with pytest.raises(CallCancelled):
        client.servers(lookup("10.0.0.1"))


def test_a_client_keeps_no_client_of_a_server_that_nobody_uses() -> None:
    with Client("mal:50051") as client:
        used = client.servers(lookup("10.0.0.1"))
        gone = [ref(client.servers(lookup(f"10.0.1.{number}"))[0]) for number in range(100)]
        assert client.servers(lookup("10.0.0.1")) == used
        assert not any(server() for server in gone)


def test_an_address_of_one_server_is_its_own_client_and_a_list_has_several() -> None:
    with Client("10.0.0.1:1") as client:
        assert client.servers(never) == [client]
    with Client("ipv4:10.0.0.1:1,10.0.0.2:1,10.0.0.1:1") as client:
        assert [server.address for server in client.servers(never)] == ["10.0.0.1:1", "10.0.0.2:1"]


def test_a_token_is_not_sent_in_plain_text_to_an_address_that_the_name_of_this_machine_has() -> None:
    with Client("localhost:1", token="secret") as client, pytest.raises(ConfigError, match="TLS"):
        client.servers(lookup("10.0.0.1"))
