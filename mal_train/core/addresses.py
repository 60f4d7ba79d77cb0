"""Rules for host names and server addresses, shared by the server and its clients. Opens no connection."""

import ipaddress

from mal_train.core.errors import ConfigError

PORTS = range(1, 65536)
"""Ports of an address. gRPC reduces a larger number modulo 65536 and calls another service."""

_GRPC_SCHEMES = ("unix:", "dns:", "ipv4:", "ipv6:")


def is_loopback(host: str) -> bool:
    """Returns True for a host that only this machine can reach.

    >>> is_loopback("::1"), is_loopback("127.9.9.9"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def format_address(host: str, port: int) -> str:
    """Returns HOST:PORT, with an IPv6 address in brackets.

    >>> format_address("127.0.0.1", 50051), format_address("::1", 50051)
    ('127.0.0.1:50051', '[::1]:50051')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """Returns the host of a server address, without brackets; empty for a `unix:` address.

    >>> host_of("dns:///example.org:50051"), host_of("[::1]:50051"), host_of("unix:/run/mal.sock")
    ('example.org', '::1', '')
    """
    scheme, _, target = address.partition(":")
    if scheme == "unix":
        return ""
    if f"{scheme}:" not in _GRPC_SCHEMES:
        target = address
    # Targets with a scheme may have no port.
    host = target.rpartition(":")[0] or target
    return host.rpartition("/")[2].strip("[]")


def is_local_address(address: str) -> bool:
    """Returns True for a server address on this machine: a Unix socket or a loopback host.

    >>> is_local_address("unix:/run/mal.sock"), is_local_address("[::1]:50051"), is_local_address("10.0.0.7:50051")
    (True, True, False)
    """
    return address.startswith("unix:") or is_loopback(host_of(address))


def check_address(address: str, name: str) -> None:
    """Checks a server address: HOST:PORT, or a gRPC target that begins with unix:, dns:, ipv4: or ipv6:.

    Args:
        address: as a user wrote it.
        name: setting or command; begins every message.

    Raises:
        ConfigError: no port, for which gRPC would take 443; a port outside `PORTS`; or a URL.
    """
    if address.startswith(("http://", "https://")):
        raise ConfigError(f"{name}: {address!r} is a URL; give HOST:PORT, for example localhost:50051")
    host, _, port = address.rpartition(":")
    is_number = port.isascii() and port.isdecimal()
    if not host or not (is_number or address.startswith(_GRPC_SCHEMES)):
        raise ConfigError(f"{name}: {address!r} has no port; give HOST:PORT, for example localhost:50051")
    if is_number and int(port) not in PORTS and not address.startswith("unix:"):
        raise ConfigError(f"{name}: port {port} in {address!r}; a port is a number from {PORTS[0]} to {PORTS[-1]}")
