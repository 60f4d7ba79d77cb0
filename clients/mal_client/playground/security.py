"""Restricts access to the playground to its own page, in the browser that opened the printed URL.

Every web page that the user has open and every account of the machine can reach a local port, and the playground uses
the user's token for the labeling server. Three checks, each sufficient against one kind of attack:

- **Host**: a name that an attacker resolves to 127.0.0.1 (DNS rebinding) is not allowed. Numeric addresses cannot be
  rebound; on a loopback socket, only loopback addresses are allowed.
- **Origin** and **Sec-Fetch-Site**: requests that a browser sends for another page are refused.
- **Key**: random at each start and part of the printed URL; from then on a cookie that scripts cannot read carries it.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

KEY_FIELD = "key"
COOKIE = "mal_playground"

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "mal-client",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
"""Headers of every response: load nothing from other origins, forbid framing, reading by others and caching."""


class Forbidden(Exception):
    """A request that is not from the playground's own page; the browser shows the message."""


@dataclass(frozen=True)
class Guard:
    """The three checks.

    Attributes:
        key: the secret in the URL.
        hosts: allowed host names in lower case, besides localhost and numeric addresses.
        loopback: the socket listens on a loopback address, so that only loopback addresses are allowed.
    """

    key: str
    hosts: Collection[str] = ()
    loopback: bool = True

    def check(self, headers: Mapping[str, str], *, is_page: bool) -> None:
        """Raises Forbidden for a host that is not allowed or a request of another page.

        Args:
            headers: headers of the request; lookups ignore case.
            is_page: the request is for the page itself, which other pages may link to.
        """
        host = headers.get("Host", "")
        if not self._is_allowed(host):
            raise Forbidden(f"host {host!r}: not allowed; open the URL that mal-client printed")
        origin = headers.get("Origin")
        if origin is not None and _netloc(origin) != host.lower():
            raise Forbidden(f"origin {origin!r}: not allowed; other pages cannot use the playground")
        site = headers.get("Sec-Fetch-Site")
        if site not in {None, "same-origin", "none"} and not is_page:
            raise Forbidden(f"Sec-Fetch-Site {site!r}: not allowed; other pages cannot use the playground")

    def accepts(self, key: str | None) -> bool:
        """Returns True for the key, in constant time."""
        return key is not None and hmac.compare_digest(key.encode(errors="replace"), self.key.encode())

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


def cookie_name(host: str) -> str:
    """Returns the cookie name for a host; it includes the port, which cookies ignore, so that playgrounds can coexist.

    >>> cookie_name("127.0.0.1:8765")
    'mal_playground_8765'
    """
    port = host.rpartition(":")[2]
    return f"{COOKIE}_{port}" if port.isdigit() else COOKIE
