"""Refuses requests that a browser sends to a local web application for another page.

Every web page that the user has open can reach a port of this machine. Two checks, each sufficient against one kind of
attack:

- **Host**: a name that an attacker resolves to 127.0.0.1 (DNS rebinding) is not allowed. Numeric addresses cannot be
  rebound; on a loopback socket, only loopback addresses are allowed.
- **Origin** and **Sec-Fetch-Site**: requests that a browser sends for another page are refused. Programs send neither.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

MAX_SHOWN_CHARS = 100


class Forbidden(Exception):
    """A request that another page may have caused; the client that sent it gets the message."""


@dataclass(frozen=True)
class WebGuard:
    """The two checks.

    Attributes:
        hosts: allowed host names in lower case, besides localhost and numeric addresses.
        loopback: the socket listens on a loopback address, so that only loopback addresses are allowed.
    """

    hosts: Collection[str] = ()
    loopback: bool = True

    def check(self, headers: Mapping[str, str], *, is_page: bool = False) -> None:
        """Raises Forbidden for a host that is not allowed or a request of another page.

        Args:
            headers: headers of the request; lookups ignore case.
            is_page: the request is for the page itself, which other pages may link to.
        """
        host = headers.get("Host", "")
        if not self._is_allowed(host):
            raise Forbidden(f"host {_shown(host)}: not allowed; use the printed address, or allow it with --allow-host")
        origin = headers.get("Origin")
        if origin is not None and _netloc(origin) != host.lower():
            raise Forbidden(f"origin {_shown(origin)}: not allowed; other pages cannot use this service")
        site = headers.get("Sec-Fetch-Site")
        if site not in {None, "same-origin", "none"} and not is_page:
            raise Forbidden(f"Sec-Fetch-Site {_shown(str(site))}: not allowed; other pages cannot use this service")

    def _is_allowed(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if not name:
            return False
        if name == "localhost" or name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.loopback


def _netloc(origin: str) -> str | None:
    """Returns host and port of an origin in lower case; None if it is not a valid origin."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _shown(value: str) -> str:
    """Returns a value of a request for a message, in quotation marks and cut to a length for a log."""
    return repr(value[:MAX_SHOWN_CHARS])
