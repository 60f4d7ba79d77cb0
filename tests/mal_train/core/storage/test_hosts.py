"""Hosts that may be contacted: named ones anywhere, others only at public addresses."""

import pytest

from mal_train.core.errors import ConfigError
from mal_train.core.storage.hosts import AllowedHosts, is_public

PRIVATE = [
    *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
    *(
        "::1",
        "fe80::1",
        "fd00:ec2::254",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "::ffff:0:7f00:1",
        "fec0::1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "ff02::1",
        "::",
    ),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_address_of_an_inner_network_is_not_public(address: str) -> None:
    assert not is_public(address)
    assert AllowedHosts(any_public=True).address_problem("evil.example", address) is not None
    assert AllowedHosts(any_public=True).problem("https", address) is not None


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
def test_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)
    assert AllowedHosts(any_public=True).problem("https", address) is None


def test_named_host_may_be_anywhere_and_use_http() -> None:
    hosts = AllowedHosts.parse(["Images.Intranet"], "--image-host")
    assert hosts.problem("http", "images.intranet") is None
    assert hosts.address_problem("images.intranet", "10.0.0.7") is None
    assert hosts.problem("https", "example.org") is not None


def test_any_public_host_needs_https() -> None:
    hosts = AllowedHosts.parse(["*"], "--image-host")
    assert hosts.problem("https", "example.org") is None
    assert hosts.problem("http", "example.org") is not None
    assert hosts.problem("file", "example.org") is not None


def test_address_of_the_user_names_its_host() -> None:
    hosts = AllowedHosts.of_address("http://u:p@localhost:8000/a")
    assert hosts.problem("http", "localhost") is None
    assert hosts.problem("http", "127.0.0.1") is not None


@pytest.mark.parametrize("name", ["münchen.example", "xn--mnchen-3ya.example"])
def test_name_with_other_letters_is_compared_as_it_is_resolved(name: str) -> None:
    for hosts in (AllowedHosts.parse([name], "--image-host"), AllowedHosts.of_address(f"http://{name}/a")):
        assert hosts.problem("http", "xn--mnchen-3ya.example") is None
        assert hosts.address_problem("xn--mnchen-3ya.example", "10.0.0.7") is None


@pytest.mark.parametrize("name", ["https://example.org", "", "a/b", "*.example.org", "u@h", "example.org:8080"])
def test_entry_that_is_no_host_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        AllowedHosts.parse([name], "--image-host")
