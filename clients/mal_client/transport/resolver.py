"""Finds the servers behind an address: one for each IP address that its name has.

A channel does this by itself, but shows neither the addresses nor their changes, and a stream stays on the server that
it began on. Jobs on datasets open a stream to each server, so they need the addresses.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mal_client.errors import ServerUnavailable
from mal_train.core.addresses import format_address, host_of, ip_version, name_server_of, port_of
from mal_train.core.errors import ConfigError
from mal_train.core.proxies import proxy_of_server

CONNECT_TIMEOUT_S = 2.0
"""Time for one connection, where a name has addresses of both IP versions."""

MAX_TRIED = 3
"""Addresses of one IP version to connect to then."""

Lookup = Callable[[str, int], Sequence[str]]
"""Returns the IP addresses of a host, for a port. Raises OSError."""


@dataclass(frozen=True)
class ResolvedAddress:
    """One server.

    Attributes:
        address: its gRPC target, with an IP address where a name was given.
        authority: HOST:PORT with that name, for which the server has its certificate; None where none was given.
    """

    address: str
    authority: str | None = None


def system_lookup(host: str, port: int) -> list[str]:
    """Returns the IP addresses of a host by the resolver of the system, each once. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


def resolve(address: str, lookup: Lookup = system_lookup) -> list[ResolvedAddress]:
    """Returns the servers behind the address of one server or one name.

    An IP address and a Unix socket are one server, and so is a name that only an HTTP proxy resolves. A name with IPv4
    and IPv6 addresses stands for the servers of one version: of IPv4 if any of those accepts a connection, or none of
    IPv6 does.

    Args:
        address: accepted by `check_address`, without commas.
        lookup: resolves the name.

    Raises:
        ServerUnavailable: the name has no IP address.
        ConfigError: the address names a DNS server, which only a channel can ask.
    """
    host, port = host_of(address), port_of(address)
    if not host or ip_version(host) or _is_behind_proxy(address):
        return [ResolvedAddress(address)]
    if name_server_of(address):
        raise ConfigError(
            f"{address}: dataset jobs, evaluations and changes of models cannot ask this DNS server; give "
            f"dns:///{host}:{port}, which the system resolves"
        )
    authority = format_address(host, port)
    return [
        ResolvedAddress(format_address(ip, port), authority)
        for ip in _of_one_version(_look_up(host, port, lookup), port)
    ]


def _is_behind_proxy(address: str) -> bool:
    """Returns True if gRPC reaches a server through the proxy of the environment, which resolves its name."""
    proxy = proxy_of_server(address)
    return proxy is not None and proxy.carries_grpc


def _look_up(host: str, port: int, lookup: Lookup) -> Sequence[str]:
    try:
        addresses = lookup(host, port)
    except (OSError, UnicodeError) as error:
        # UnicodeError: a name with an empty or too long label.
        raise _no_address(host, str(error)) from error
    if not addresses:
        raise _no_address(host, "no record")
    return addresses


def _no_address(host: str, reason: str) -> ServerUnavailable:
    return ServerUnavailable(f"{host}: the name has no IP address ({reason}); check the name and the DNS server")


def _of_one_version(addresses: Sequence[str], port: int) -> Sequence[str]:
    four, six = ([ip for ip in addresses if ip_version(ip) == version] for version in (4, 6))
    if not (four and six):
        return addresses
    prefers_six = not _any_accepts(four, port) and _any_accepts(six, port)
    return six if prefers_six else four


def _any_accepts(addresses: Sequence[str], port: int) -> bool:
    return any(_accepts(ip, port) for ip in addresses[:MAX_TRIED])


def _accepts(ip: str, port: int) -> bool:
    try:
        with socket.create_connection((ip, port), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
