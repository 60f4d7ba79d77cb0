"""The rule by which the environment names a proxy."""

import os

import pytest

from mal_train.core.errors import ConfigError
from mal_train.core.proxies import (
    exempt_this_machine,
    grpc_options,
    is_this_machine,
    proxy_of_server,
    proxy_of_url,
    refuse_plaintext,
    server_hint,
    url_hint,
)

PROXY = "http://user:secret@proxy.example:3128"
LOCAL = (
    *("localhost:1", "LOCALHOST:1", "localhost.:1", "mal.localhost:1", "127.0.0.1:1", "127.3.4.5:1", "[::1]:1"),
    *("127.1:1", "127.0.1:1", "2130706433:1", "0x7f000001:1", "0X7F.1:1", "0177.0.0.1:1", "dns:///127.1:1", "0:1"),
    *("[::ffff:7f00:1]:1", "[0:0:0:0:0:0:0:1]:1", "[::ffff:0.0.0.0]:1", "127.0.0.1.:1"),
    *("0.0.0.0:1", "[::]:1", "[::ffff:127.0.0.1]:1", "dns:///localhost:1", "ipv4:127.0.0.1:1", "unix:/run/mal.sock"),
)
VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")


@pytest.mark.parametrize("variable", [spelling for name in VARIABLES for spelling in (name, name.upper())])
def test_each_variable_counts_in_both_cases_but_never_for_this_machine(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, PROXY)
    proxy = proxy_of_server("mal.example:1")
    assert proxy is not None
    assert proxy.variable == variable
    assert ("grpc.http_proxy", PROXY) in grpc_options("mal.example:1")
    for address in LOCAL:
        assert proxy_of_server(address) is None
        assert ("grpc.enable_http_proxy", 0) in grpc_options(address)
    for scheme, names in {"http": ("http_proxy", "all_proxy"), "https": ("https_proxy", "all_proxy")}.items():
        assert (proxy_of_url(f"{scheme}://a.example/x") is not None) == (variable.lower() in names)
        for host in ("127.0.0.1", "127.1", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]"):
            assert proxy_of_url(f"{scheme}://{host}:8080/x") is None


def test_only_names_and_addresses_of_this_machine_are_local() -> None:
    assert not any(map(is_this_machine, ("localhost.example", "128.0.0.1", "10.0.0.1", "::2", "", "notlocalhost")))
    others = ("128.1", "2147483649", "0x0a000001", "[::ffff:10.0.0.1]", "127.1.example", "0x7f.example", "127.0.0.0.1")
    assert not any(map(is_this_machine, others))


def test_the_first_variable_that_is_set_counts_also_if_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", PROXY)
    monkeypatch.setenv("HTTPS_PROXY", "http://other.example:1")
    proxy = proxy_of_server("mal.example:1")
    assert proxy is not None
    assert (proxy.variable, proxy.url) == ("https_proxy", PROXY)
    monkeypatch.setenv("grpc_proxy", "")
    assert proxy_of_server("mal.example:1") is None
    assert proxy_of_url("https://mal.example") == proxy


@pytest.mark.parametrize(
    ("entries", "is_direct"),
    [
        *(("mal.example", True), (".example", True), ("*.example", True), ("EXAMPLE", True), ("*", True)),
        *(("a.example, mal.example", True), ("a mal.example", True), ("mal.example:50051", True)),
        *(("mal.example:1", False), ("al.example", False), ("x.mal.example", False), ("", False), (" , ", False)),
    ],
)
def test_hosts_in_no_proxy_are_direct(entries: str, is_direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    for variable in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, entries)
            assert (proxy_of_server("mal.example:50051") is None) == is_direct
    monkeypatch.setenv("no_proxy", entries)
    assert (proxy_of_url("http://mal.example:50051/a") is None) == is_direct


@pytest.mark.parametrize("entry", ["10.0.0.0/8", "10.1.2.3", "10.1.2.3:50051"])
def test_addresses_and_networks_in_no_proxy_are_direct(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", PROXY)
    monkeypatch.setenv("no_proxy", f"fd00::/8,{entry}")
    assert proxy_of_server("10.1.2.3:50051") is None
    assert proxy_of_server("[fd00::7]:50051") is None
    assert proxy_of_server("11.1.2.3:50051") is not None


def test_a_list_of_servers_behind_a_proxy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", PROXY)
    assert ("grpc.enable_http_proxy", 0) in grpc_options("127.0.0.1:1,127.0.0.1:2")
    with pytest.raises(ConfigError, match="http_proxy"):
        grpc_options("127.0.0.1:1,10.0.0.2:1")
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    assert ("grpc.enable_http_proxy", 0) in grpc_options("10.0.0.1:1,10.0.0.2:1")


def test_a_proxy_that_cannot_carry_grpc_is_not_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy.example:1080")
    assert ("grpc.enable_http_proxy", 0) in grpc_options("mal.example:1")
    assert "ALL_PROXY=socks5://proxy.example:1080" in server_hint("mal.example:1")
    assert server_hint("localhost:1") == ""


def test_messages_name_the_variable_but_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", PROXY)
    with pytest.raises(ConfigError, match="http_proxy") as caught:
        refuse_plaintext("http://me:word@a.example/", "--host", "the token")
    for text in (server_hint("a.example:1"), url_hint("http://a.example/"), str(caught.value)):
        assert "http_proxy=http://proxy.example:3128" in text
        assert "secret" not in text
        assert "word" not in text
    refuse_plaintext("http://127.0.0.1:1/", "--host", "the token")
    refuse_plaintext("https://a.example/", "--host", "the token")


def test_libraries_of_a_command_reach_this_machine_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    exempt_this_machine()
    assert "no_proxy" not in os.environ
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", "a.example,localhost")
    exempt_this_machine()
    exempt_this_machine()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "a.example,localhost,127.0.0.1,::1,[::1]"
