"""Server addresses: what gRPC understands, and what it would misread."""

import pytest

from mal_train.core.addresses import check_address, host_of, is_local_address
from mal_train.core.errors import ConfigError


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:50051", "[::1]:50051", "example.org:1", "example.org:65535"),
        *("unix:/run/mal.sock", "unix:/run/a:99999999", "dns:///mal-server:50051", "ipv4:10.0.0.1:1,10.0.0.2:1"),
    ],
)
def test_addresses_that_grpc_understands_are_accepted(address: str) -> None:
    check_address(address, "server address")


@pytest.mark.parametrize(
    "address",
    [
        *("", "nowhere", ":50051", "127.0.0.1", "localhost:", "localhost:x", "localhost:²"),
        *("localhost:0", "localhost:65536", "127.0.0.1:99999999", "http://localhost", "https://localhost:50051"),
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


def test_only_this_machine_is_local() -> None:
    local = ("localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/a", "dns:///localhost:1", "dns:localhost:1")
    assert all(map(is_local_address, local))
    assert not any(map(is_local_address, ("0.0.0.0:1", "[::]:1", "example.org:1", "ipv4:10.0.0.1:1")))
