"""Server addresses: what gRPC understands, and what it would misread."""

import pytest

from mal_train.core.addresses import (
    check_address,
    grpc_target,
    has_several_servers,
    host_of,
    is_local_address,
    port_of,
    split_addresses,
)
from mal_train.core.errors import ConfigError


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:50051", "[::1]:50051", "example.org:1", "example.org:65535"),
        *("unix:/run/mal.sock", "unix:/run/a:99999999", "dns:///mal-server:50051", "ipv4:10.0.0.1:1,10.0.0.2:1"),
        *("ipv6:[::1]:1,[::2]:1", "dns:mal-server", "gpu-1:1,gpu-2:1", "10.0.0.1:1, 10.0.0.2:1"),
    ],
)
def test_addresses_that_grpc_understands_are_accepted(address: str) -> None:
    check_address(address, "server address")


@pytest.mark.parametrize(
    "address",
    [
        *("", "nowhere", ":50051", "127.0.0.1", "localhost:", "localhost:x", "localhost:²"),
        *("localhost:0", "localhost:65536", "127.0.0.1:99999999", "http://localhost", "https://localhost:50051"),
        *("a:1,b:0", "a:65536,b:1", "ipv4:10.0.0.1:1,10.0.0.2:70000", "ipv4:10.0.0.1:1,10.0.0.2", "a,b:1"),
        *(
            "dns:",
            "dns:///",
            "dns:///:50051",
            "dns://10.0.0.53/",
            "xds:///a:1",
            "ftp://a:1",
            "a:1;b:1",
            "a:1 b:1",
            "a b:1",
        ),
        *("a:1,", ",a:1", "a:1,,b:1", "ipv4:10.0.0.1", "ipv4:example.org:1", "ipv4:[::1]:1", "ipv6:10.0.0.1:1"),
    ],
)
def test_addresses_that_grpc_would_misread_are_refused_with_their_name(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_address(address, "server address")
    assert str(caught.value).startswith("server address: ")
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        *(("example.org:1", "example.org"), ("[::1]:1", "::1"), ("unix:/run/mal.sock", "")),
        *(("dns:example.org:1", "example.org"), ("dns:///example.org:1", "example.org"), ("dns:[::1]:1", "::1")),
        *(("dns:example.org", "example.org"), ("dns:///example.org", "example.org")),
        *(("dns://10.0.0.53/example.org:1", "example.org"), ("ipv4:10.0.0.1:1", "10.0.0.1"), ("ipv6:[::1]:1", "::1")),
    ],
)
def test_the_host_of_an_address_is_found_behind_every_scheme(address: str, host: str) -> None:
    assert host_of(address) == host


@pytest.mark.parametrize(
    ("host", "number"),
    [("127.1", "127.0.0.1"), ("2130706433", "127.0.0.1"), ("0x7f000001", "127.0.0.1"), ("010.0.0.1", "8.0.0.1")],
)
def test_an_ip_address_in_a_spelling_that_grpc_takes_for_a_name_is_refused(host: str, number: str) -> None:
    for address in (f"{host}:50051", f"10.0.0.1:1,{host}:50051", f"dns:///{host}:50051"):
        with pytest.raises(ConfigError) as caught:
            check_address(address, "server address")
        assert str(caught.value).endswith(f"give {number}")


@pytest.mark.parametrize(
    ("address", "cause"),
    [
        *((":50051", "names no host"), ("a:1,:50051", "names no host")),
        *(("::1:50051", "[::1]:50051"), ("fe80::1", "brackets"), ("dns:///::1", "brackets")),
        *(("127.0.0.1:50051/", "port '50051/'"), ("localhost:http", "port 'http'")),
        *(("localhost", "no port"), ("localhost:", "no port"), ("[::1]", "no port")),
    ],
)
def test_an_address_is_refused_for_its_own_cause(address: str, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_address(address, "server address")
    assert cause in str(caught.value)


def test_only_this_machine_is_local() -> None:
    local = ("localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/a", "dns:///localhost:1", "dns:localhost:1")
    assert all(map(is_local_address, local))
    assert all(map(is_local_address, ("[::ffff:127.0.0.1]:1", "[::ffff:7f00:1]:1", "ipv6:[::ffff:127.0.0.1]:1")))
    # Names to gRPC, about which DNS may say anything.
    names = ("127.1:1", "2130706433:1", "0x7f000001:1", "0177.0.0.1:1", "dns:///127.1:1")
    assert not any(map(is_local_address, (*names, "10.1:1", "0:1", "[::ffff:10.0.0.1]:1", "127.1.example:1")))
    assert not any(map(is_local_address, ("0.0.0.0:1", "[::]:1", "example.org:1", "ipv4:10.0.0.1:1", "")))


def test_a_list_is_local_only_if_each_of_its_servers_is() -> None:
    local = ("ipv4:127.0.0.1:1,127.0.0.2:1", "ipv6:[::1]:1,[::1]:2", "localhost:1,unix:/a", "127.0.0.1:1, [::1]:1")
    assert all(map(is_local_address, local))
    remote = (
        *("ipv4:127.0.0.1:1,10.0.0.2:1", "ipv4:10.0.0.2:1,127.0.0.1:1", "ipv6:[::1]:1,[2001:db8::1]:1"),
        *("localhost:1,example.org:1", "unix:/a,10.0.0.2:1", "127.0.0.1:1,127.0.0.1.example.org:1"),
    )
    assert not any(map(is_local_address, remote))


def test_a_name_that_another_dns_server_resolves_is_not_local() -> None:
    assert not is_local_address("dns://10.0.0.53/localhost:1")


def test_a_list_is_split_into_its_servers() -> None:
    assert split_addresses("ipv4:10.0.0.1:1,10.0.0.2:2") == ["10.0.0.1:1", "10.0.0.2:2"]
    assert split_addresses("gpu-1:1, dns:///gpu-2:1,") == ["gpu-1:1", "dns:///gpu-2:1"]
    assert [port_of(address) for address in ("[::1]:7", "dns:a", "dns:///a:9")] == [7, 443, 9]
    assert all(map(has_several_servers, ("10.0.0.1:1,10.0.0.2:2", "dns:///a:1", "ipv4:10.0.0.1:1,10.0.0.2:1")))
    assert not any(map(has_several_servers, ("a:1", "unix:/a", "ipv4:10.0.0.1:1")))


@pytest.mark.parametrize(
    ("address", "target"),
    [
        *(("a:1", "a:1"), ("dns:///a:1", "dns:///a:1"), ("unix:/a", "unix:/a"), ("ipv4:10.0.0.1:1", "10.0.0.1:1")),
        *(("10.0.0.1:1,10.0.0.2:1", "ipv4:10.0.0.1:1,10.0.0.2:1"), ("[::1]:1,[::2]:1", "ipv6:[::1]:1,[::2]:1")),
    ],
)
def test_a_list_of_ip_addresses_is_one_target(address: str, target: str) -> None:
    assert grpc_target(address, "server address") == target


@pytest.mark.parametrize("address", ["a:1,b:1", "10.0.0.1:1,[::1]:1", "10.0.0.1:1,unix:/a", "dns:///a:1,10.0.0.1:1"])
def test_a_list_that_no_channel_can_have_is_refused(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grpc_target(address, "server address")
    assert repr(address) in str(caught.value)
