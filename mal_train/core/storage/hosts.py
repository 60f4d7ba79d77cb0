"""Decides which web hosts are contacted: those that the user named, and public ones where the user allows any.

URLs in annotation files come from strangers. Without a rule, such a file could make this machine fetch pages of its own
network, for example the credentials that cloud machines serve on a link-local address (server-side request forgery).
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

from mal_train.core.errors import ConfigError
from mal_train.core.storage.addresses import WEB_SCHEMES

ANY_PUBLIC: Final = "*"
"""Entry of a list of hosts that allows every host with a public address, by https."""

# Networks whose addresses stand for IPv4 addresses, which may be private: IPv4-compatible, SIIT, NAT64, 6to4, Teredo.
# Python counts the site-local one as global.
_NOT_PUBLIC: Final = tuple(
    map(
        ipaddress.ip_network,
        ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "fec0::/10"),
    )
)


@dataclass(frozen=True)
class AllowedHosts:
    """Web hosts that may be contacted; redirects follow the same rule.

    Attributes:
        named: names of hosts that the user gave: by https or http, at any address.
        any_public: also every other host, by https and at public addresses only.
    """

    named: frozenset[str] = frozenset()
    any_public: bool = False

    @classmethod
    def parse(cls, names: Iterable[str], setting: str) -> Self:
        """Returns the hosts of a setting: host names, and "*" for any public host.

        Raises:
            ConfigError: an entry is no host name, for example a URL.
        """
        hosts = [name.strip().lower() for name in names]
        for host in hosts:
            if not _is_host(host):
                raise ConfigError(
                    f"{setting}: {host!r}; give a host name without a port, such as images.example.org, or {ANY_PUBLIC}"
                )
        return cls(frozenset(map(_encoded, hosts)) - {ANY_PUBLIC}, ANY_PUBLIC in hosts)

    @classmethod
    def of_address(cls, address: str) -> Self:
        """Returns the hosts for an address that the user gave: its own, and public ones that it redirects to."""
        return cls(frozenset({_encoded((urlsplit(address).hostname or "").lower())}), any_public=True)

    def is_named(self, host: str) -> bool:
        """Returns True for a host that the user gave."""
        return _encoded(host.lower()) in self.named

    def listed(self) -> list[str]:
        """Returns the hosts as `parse` takes them, sorted."""
        return sorted(self.named) + [ANY_PUBLIC] * self.any_public

    def problem(self, scheme: str, host: str) -> str | None:
        """Returns why a URL may not be fetched; None if it may, as far as is known before its host is resolved.

        Args:
            scheme: of the URL.
            host: of the URL, in ASCII.
        """
        if scheme not in WEB_SCHEMES:
            return f"scheme {scheme!r}; only https and http are fetched"
        if host in self.named:
            return None
        if not self.any_public:
            return f"host {host} is not allowed; name it if you trust it"
        if scheme == "http":
            return f"http, which anyone on the path can change; host {host} is read by https unless you name it"
        try:
            return self.address_problem(host, host)
        except ValueError:  # a name
            return None

    def address_problem(self, host: str, address: str) -> str | None:
        """Returns why an IP address that a host resolves to may not be contacted; None if it may.

        Raises:
            ValueError: the text is no IP address.
        """
        if is_public(address) or host in self.named:
            return None
        return f"host {host} is at {address}, which is not a public address; name the host if you trust it"


def _is_host(text: str) -> bool:
    if text == ANY_PUBLIC:
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return bool(text) and not any(character in text for character in "/@?#:*")
    return True


def _encoded(host: str) -> str:
    """Returns a host name in ASCII, as it is resolved: IDNA for other letters."""
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:  # no host name
        return host


def is_public(address: str) -> bool:
    """Returns True for an IP address of the internet: not private, loopback, link-local, multicast or translated.

    >>> is_public("93.184.215.14"), is_public("169.254.169.254"), is_public("::ffff:10.0.0.1")
    (True, False, False)

    Raises:
        ValueError: the text is no IP address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if any(ip in network for network in _NOT_PUBLIC):
            return False
    return ip.is_global and not ip.is_multicast
