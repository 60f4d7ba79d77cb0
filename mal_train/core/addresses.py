"""Rules for host names and server addresses, shared by the server and its clients. Opens no connection."""

import ipaddress
import re
import socket

from mal_train.core.errors import ConfigError

PORTS = range(1, 65536)
"""Ports of an address. gRPC reduces a larger number modulo 65536 and calls another service."""

DEFAULT_PORT = 443
"""Port that gRPC takes for a `dns:` address without one."""

_GRPC_SCHEMES = ("unix:", "dns:", "ipv4:", "ipv6:")
_IPV4_NUMBERS = re.compile(r"(?:0x[0-9a-f]+|[0-9]+)(?:\.(?:0x[0-9a-f]+|[0-9]+)){0,3}", re.IGNORECASE)
_VERSION_OF_SCHEME = {"ipv4:": 4, "ipv6:": 6}
_HOST = re.compile(r"[^\s;/]+")
"""Host of an address; a list that is separated by other characters than commas would be one strange name."""


def ip_address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns the IP address that a host is; None for a name. An IPv4 address inside IPv6 is returned as IPv4.

    >>> ip_address_of("::ffff:7f00:1"), ip_address_of("127.1")
    (IPv4Address('127.0.0.1'), None)
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def numeric_host(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns the IP address that the C library reads a host as; None for a name. Opens no connection.

    It reads one to four decimal, octal or hexadecimal numbers as an IPv4 address, as HTTP libraries then do. gRPC takes
    them for names, and asks DNS.

    >>> [str(numeric_host(host)) for host in ("127.1", "2130706433", "0x7f000001", "0177.0.0.1")]
    ['127.0.0.1', '127.0.0.1', '127.0.0.1', '127.0.0.1']
    >>> numeric_host("127.1.example"), numeric_host("face"), numeric_host("127.256")
    (None, None, IPv4Address('127.0.1.0'))
    """
    address = ip_address_of(host)
    if address is not None or not _IPV4_NUMBERS.fullmatch(host):
        return address
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def is_loopback(host: str) -> bool:
    """Returns True for a host that only this machine can reach.

    >>> is_loopback("::1"), is_loopback("127.9.9.9"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    address = ip_address_of(host)
    return host == "localhost" if address is None else address.is_loopback


def format_address(host: str, port: int) -> str:
    """Returns HOST:PORT, with an IPv6 address in brackets.

    >>> format_address("127.0.0.1", 50051), format_address("::1", 50051)
    ('127.0.0.1:50051', '[::1]:50051')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_addresses(text: str) -> list[str]:
    """Returns the servers of a comma-separated list; the schemes `ipv4:` and `ipv6:` are dropped.

    >>> split_addresses("ipv4:10.0.0.1:1,10.0.0.2:1"), split_addresses("gpu-1:1, dns:///gpu-2:1")
    (['10.0.0.1:1', '10.0.0.2:1'], ['gpu-1:1', 'dns:///gpu-2:1'])
    """
    parts = [part.strip() for part in text.split(",")]
    return [part.removeprefix("ipv4:").removeprefix("ipv6:") for part in parts if part]


def host_of(address: str) -> str:
    """Returns the host of the address of one server, without brackets; empty for a `unix:` address.

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


def port_of(address: str) -> int:
    """Returns the port of the address of one server; gRPC's default, 443, if a `dns:` address has none.

    >>> port_of("dns:///example.org:50051"), port_of("dns:///example.org")
    (50051, 443)
    """
    port = address.rpartition(":")[2]
    return int(port) if port.isdecimal() else DEFAULT_PORT


def name_server_of(address: str) -> str:
    """Returns the DNS server that a `dns:` address names; empty for any other address.

    >>> name_server_of("dns://10.0.0.53/example.org:50051"), name_server_of("dns:///example.org:50051")
    ('10.0.0.53', '')
    """
    return address.removeprefix("dns://").partition("/")[0] if address.startswith("dns://") else ""


def ip_version(host: str) -> int:
    """Returns 4 or 6 for an IP address, 0 for a name.

    >>> ip_version("10.0.0.1"), ip_version("::1"), ip_version("example.org")
    (4, 6, 0)
    """
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return 0


def is_local_address(address: str) -> bool:
    """Returns True if every server of an address is on this machine: a Unix socket or a loopback host.

    >>> is_local_address("unix:/run/mal.sock"), is_local_address("[::1]:50051"), is_local_address("10.0.0.7:50051")
    (True, True, False)
    >>> is_local_address("ipv4:127.0.0.1:1,127.0.0.1:2"), is_local_address("ipv4:127.0.0.1:1,10.0.0.2:1")
    (True, False)
    """
    servers = split_addresses(address)
    return bool(servers) and all(map(_is_local_server, servers))


def has_several_servers(address: str) -> bool:
    """Returns True for an address that is written as one of several servers: a list, or a `dns:` name.

    >>> has_several_servers("a:1,b:1"), has_several_servers("dns:///a:1"), has_several_servers("a:1")
    (True, True, False)
    """
    return len(split_addresses(address)) > 1 or address.startswith("dns:")


def grpc_target(address: str, name: str) -> str:
    """Returns the target of a channel to all servers of an address.

    >>> grpc_target("10.0.0.1:1,10.0.0.2:1", "server address"), grpc_target("example.org:1", "server address")
    ('ipv4:10.0.0.1:1,10.0.0.2:1', 'example.org:1')

    Args:
        address: accepted by `check_address`.
        name: setting or command; begins every message.

    Raises:
        ConfigError: a list with a name, or with IP addresses of both versions, which no channel can have.
    """
    servers = split_addresses(address)
    if len(servers) == 1:
        return servers[0]
    versions = {ip_version(host_of(server)) for server in servers}
    if versions not in ({4}, {6}):
        raise ConfigError(
            f"{name}: {address!r} is a list with names, or with IPv4 and IPv6 addresses; give IP addresses of one "
            "version, or one name of all servers, for example dns:///mal-server:50051"
        )
    return f"ipv{versions.pop()}:{','.join(servers)}"


def check_address(address: str, name: str) -> None:
    """Checks the address of a server, or a comma-separated list of them.

    An address is HOST:PORT, or a gRPC target that begins with unix:, dns:, ipv4: or ipv6:.

    Args:
        address: as a user wrote it.
        name: setting or command; begins every message.

    Raises:
        ConfigError: no host; no port, for which gRPC would take 443; a port outside `PORTS`; a name behind ipv4: or
            ipv6:; a URL; or an IP address that gRPC takes for a name, such as 127.1.
    """
    for server in map(str.strip, address.split(",")):
        _check_server(server, f"{name}: {address!r}" if server == address else f"{name}: {address!r}: {server!r}")


def _is_local_server(server: str) -> bool:
    # What another DNS server says of `localhost` is not known here.
    return server.startswith("unix:") or (not name_server_of(server) and is_loopback(host_of(server)))


def _check_server(server: str, start: str) -> None:
    if server.startswith("unix:") and len(server) > len("unix:"):
        return
    if "://" in server and not server.startswith("dns://"):
        raise ConfigError(f"{start} is a URL; give HOST:PORT, for example localhost:50051")
    if not _HOST.fullmatch(host_of(server)) or re.fullmatch(":[0-9]*", server):
        raise ConfigError(f"{start} names no host; give HOST:PORT, or a list of them with commas: A:50051,B:50051")
    if ":" in host_of(server) and "[" not in server:
        raise ConfigError(f"{start} has an IPv6 address without brackets; give [ADDRESS]:PORT, for example [::1]:50051")
    number = numeric_host(host_of(server))
    if number is not None and not ip_version(host_of(server)):
        raise ConfigError(f"{start}: gRPC takes {host_of(server)} for a name, not for a number; give {number}")
    version = _VERSION_OF_SCHEME.get(server[:5], 0)
    if version and ip_version(host_of(server)) != version:
        raise ConfigError(f"{start} needs an IPv{version} address and a port behind ipv{version}:")
    host, _, port = server.rpartition(":")
    is_number = port.isascii() and port.isdecimal()
    if not host or not (is_number or server.startswith("dns:")):
        found = f"has port {port!r}" if host and port and "]" not in port else "has no port"
        raise ConfigError(f"{start} {found}; give HOST:PORT, for example localhost:50051")
    if is_number and int(port) not in PORTS:
        raise ConfigError(f"{start} has port {port}; a port is a number from {PORTS[0]} to {PORTS[-1]}")
