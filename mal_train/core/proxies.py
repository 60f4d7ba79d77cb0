"""The proxy that the environment names for a connection. One rule for gRPC and HTTP; opens no connection.

    grpc_proxy, https_proxy, http_proxy, all_proxy    gRPC
    https_proxy, all_proxy                            https://
    http_proxy, all_proxy                             http://
    no_grpc_proxy (gRPC), no_proxy                    hosts that are reached directly

The first variable that is set counts, in lower case before upper case; an empty one names no proxy. A connection to
this machine never uses a proxy: another machine cannot reach it, and tokens may be sent to it unencrypted.

`no_proxy` is a list of host names, each with the names below it, of IP addresses and networks, each with `:PORT` or
without; `*` stands for every host.
"""

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from mal_train.core.addresses import DEFAULT_PORT, host_of, is_loopback, numeric_host, port_of, split_addresses
from mal_train.core.errors import ConfigError

GRPC: Final = "grpc"

_VARIABLES: Final = {
    GRPC: ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy"),
    "https": ("https_proxy", "all_proxy"),
    "http": ("http_proxy", "all_proxy"),
}
_EXEMPT_VARIABLES: Final = {GRPC: ("no_grpc_proxy", "no_proxy"), "https": ("no_proxy",), "http": ("no_proxy",)}
_PORTS: Final = {"https": DEFAULT_PORT, "http": 80}

THIS_MACHINE: Final = ("localhost", "127.0.0.1", "::1", "[::1]")
"""Names of this machine, as libraries compare them with the entries of no_proxy."""

DIRECT: Final[Sequence[tuple[str, Any]]] = (("grpc.enable_http_proxy", 0),)
"""Options of a channel that uses no proxy."""

_ADDRESS_VARIABLE: Final = "GRPC_ADDRESS_HTTP_PROXY"
"""Variable of gRPC's experimental proxy for IP addresses, which no other library knows."""

_NO_ADDRESS_PROXY: Final[Sequence[tuple[str, Any]]] = (
    ("grpc.address_http_proxy", ""),
    ("grpc.address_http_proxy_enabled_addresses", ""),
)


@dataclass(frozen=True)
class Proxy:
    """A proxy that the environment names.

    Attributes:
        variable: name of the variable.
        url: its value, with `http://` if that has no scheme; may hold a password.
    """

    variable: str
    url: str = field(repr=False)

    def __str__(self) -> str:
        """Returns variable and address, without the password."""
        return f"{self.variable}={_shown(self.url)}"

    @property
    def carries_http(self) -> bool:
        """True for an HTTP proxy, reached by http or https; False for the other types, such as SOCKS."""
        return self.url.lower().startswith(("http://", "https://"))

    @property
    def carries_grpc(self) -> bool:
        """True for an HTTP proxy, the only type that gRPC speaks with."""
        return self.url.lower().startswith("http://")


def is_this_machine(host: str) -> bool:
    """Returns True for a host that is this machine, also in unusual spelling.

    >>> all(map(is_this_machine, ("LOCALHOST", "localhost.", "a.localhost", "[::1]", "::ffff:127.0.0.1", "0.0.0.0")))
    True
    >>> all(map(is_this_machine, ("127.1", "2130706433", "0x7f000001", "[::ffff:7f00:1]", "0")))
    True
    """
    name = host.strip("[]").lower().removesuffix(".")
    if name.endswith(".localhost") or is_loopback(name):
        return True
    address = numeric_host(name)
    return address is not None and (address.is_loopback or address.is_unspecified)


def proxy_of_url(url: str) -> Proxy | None:
    """Returns the proxy for an http or https URL; None if its host is reached directly."""
    try:
        parts = urlsplit(url)
        return _proxy_of(parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0))
    except ValueError:  # no URL: the library that opens it says so
        return None


def proxy_of_server(address: str) -> Proxy | None:
    """Returns the proxy for the gRPC address of one server; None if it is reached directly or is a Unix socket.

    The proxy may be of a type that gRPC cannot use: see `Proxy.carries_grpc`.
    """
    host = host_of(address)
    return _proxy_of(GRPC, host, port_of(address)) if host else None


def grpc_options(address: str) -> list[tuple[str, Any]]:
    """Returns the options with which a channel follows the rule of this module.

    Args:
        address: of one server or of several, accepted by `check_address`.

    Raises:
        ConfigError: a proxy applies to a list of servers, for which gRPC has no way through a proxy.
    """
    servers = split_addresses(address)
    proxies = [proxy for server in servers if (proxy := _usable(proxy_of_server(server))) is not None]
    if proxies and len(servers) > 1:
        raise ConfigError(
            f"{address}: a list of servers cannot be reached through a proxy ({proxies[0]}); add the servers to "
            "no_proxy, or give one of them"
        )
    is_local = all(is_this_machine(host_of(server)) for server in servers)
    local = _NO_ADDRESS_PROXY if is_local and _ADDRESS_VARIABLE in os.environ else ()
    return [*local, ("grpc.http_proxy", proxies[0].url)] if proxies else [*local, *DIRECT]


def url_hint(url: str) -> str:
    """Returns the end of a message about a failed connection: the proxy, and how to avoid it; empty without a proxy."""
    proxy = proxy_of_url(url)
    return "" if proxy is None else _hint(proxy, urlsplit(url).hostname or url)


def server_hint(address: str) -> str:
    """Returns the end of a message as `url_hint`, for the gRPC address of one server or of several."""
    for server in split_addresses(address):
        proxy = proxy_of_server(server)
        if proxy is not None and not proxy.carries_grpc:
            return f"; the proxy {proxy} was not used: gRPC needs one whose address begins with http://"
        if proxy is not None:
            return _hint(proxy, host_of(server))
    return ""


def refuse_plaintext(url: str, name: str, secret: str, proxy: Proxy | None = None) -> None:
    """Checks that a secret does not reach a proxy unencrypted.

    Args:
        url: address that the secret is sent to.
        name: setting or option that holds the address; begins the message.
        secret: what the secret is.
        proxy: the proxy for a connection that is not encrypted; by default that of a URL that begins with http://.

    Raises:
        ConfigError: a proxy applies.
    """
    if proxy is None and url.lower().startswith("http://"):
        proxy = proxy_of_url(url)
    if proxy is not None:
        raise ConfigError(
            f"{name}: {_shown(url)}: the proxy {proxy} could read {secret}; use https://, or add the host to no_proxy"
        )


def exempt_this_machine() -> None:
    """Adds this machine to no_proxy, for the libraries of a command that connect by themselves (stores, Optuna, Ray).

    Changes nothing if the environment names no proxy.
    """
    if not any(_lookup((name,)) for names in _VARIABLES.values() for name in names):
        return
    for variable in ("no_proxy", "NO_PROXY", *(("no_grpc_proxy",) if "no_grpc_proxy" in os.environ else ())):
        _, value = _lookup((variable.lower(),)) or ("", "")
        known = _entries(value)
        os.environ[variable] = ",".join([*known, *(name for name in THIS_MACHINE if name not in known)])


def _proxy_of(scheme: str, host: str, port: int) -> Proxy | None:
    found = _lookup(_VARIABLES.get(scheme, ()))
    if found is None or not found[1] or is_this_machine(host):
        return None
    if _is_exempt(host, port, (_lookup(_EXEMPT_VARIABLES[scheme]) or ("", ""))[1]):
        return None
    variable, value = found
    return Proxy(variable, value if "://" in value else f"http://{value}")


def _hint(proxy: Proxy, host: str) -> str:
    return f"; {host} is reached through the proxy {proxy}: to connect directly, add it to no_proxy"


def _shown(url: str) -> str:
    """Returns scheme, host and port of a URL, without user and password, also if those are not encoded.

    >>> _shown("http://me:se/cret@proxy.example:3128/x?y")
    'http://proxy.example:3128'
    """
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{re.split('[/?#]', rest.rpartition('@')[2], maxsplit=1)[0]}"


def _usable(proxy: Proxy | None) -> Proxy | None:
    return proxy if proxy is not None and proxy.carries_grpc else None


def _lookup(names: Sequence[str]) -> tuple[str, str] | None:
    """Returns name and value of the first variable that is set, in lower or upper case."""
    spellings = (spelling for name in names for spelling in (name, name.upper()))
    name = next((spelling for spelling in spellings if spelling in os.environ), None)
    return None if name is None else (name, os.environ[name].strip())


def _entries(text: str) -> list[str]:
    return [entry for entry in re.split(r"[,\s]+", text) if entry]


def _is_exempt(host: str, port: int, text: str) -> bool:
    name = host.strip("[]").lower().removesuffix(".")
    return any(_covers(entry.lower(), name, port) for entry in _entries(text))


def _covers(entry: str, host: str, port: int) -> bool:
    """Returns True if an entry of no_proxy stands for a host.

    >>> _covers(".example.org", "a.example.org", 1), _covers("example.org", "anexample.org", 1)
    (True, False)
    >>> _covers("10.0.0.0/8", "10.1.2.3", 1), _covers("[::2]:80", "::2", 80), _covers("a:80", "a", 81)
    (True, True, False)
    """
    if entry == "*":
        return True
    network = _network(entry)
    if network is None:
        stem, colon, number = entry.rpartition(":")
        if colon and number.isdecimal():
            if int(number) != port:
                return False
            entry = stem
        network = _network(entry)
    if network is not None:
        try:
            return ipaddress.ip_address(host) in network
        except ValueError:
            return False
    name = entry.removeprefix("*").lstrip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text.strip("[]"), strict=False)
    except ValueError:
        return None
