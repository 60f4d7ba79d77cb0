"""Who may talk to the playground: the browser that was given its address, and only from the playground's own pages.

A page on a local port is reachable by every web page that the user has open and by every account of the machine, and
it can spend the user's token for the labeling server. Three locks, each enough against one of them:

- **Host**: a name that an attacker lets point to 127.0.0.1 (DNS rebinding) is not among the allowed ones. Addresses in
  numbers cannot be rebound; on a loopback socket only those of this machine pass.
- **Origin** and **Sec-Fetch-Site**: what a browser sends on behalf of another page is refused.
- **Key**: random at each start, in the printed address; a cookie for scripts out of reach carries it from then on.
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
"""On every answer. Nothing of another origin is loaded, nothing of ours is framed, read or kept by others."""


class Refused(Exception):
    """A request that is not from our own page; the message is for whoever reads it in a browser."""


@dataclass(frozen=True)
class Guard:
    """The three locks.

    Attributes:
        key: what the address has to carry.
        hosts: names, lower case, under which the page may be opened besides localhost and addresses in numbers.
        loopback: the socket listens on this machine alone, so only its own addresses are right.
    """

    key: str
    hosts: Collection[str] = ()
    loopback: bool = True

    def check(self, headers: Mapping[str, str], *, is_page: bool) -> None:
        """Raises Refused for a foreign Host or a request that another page sent.

        Args:
            headers: of the request, by any spelling of their names.
            is_page: the page itself is asked for, which a link elsewhere may lead to.
        """
        host = headers.get("Host", "")
        if not self._is_ours(host):
            raise Refused(f"host {host!r}: not this playground; open the address that the command printed")
        origin = headers.get("Origin")
        if origin is not None and _netloc(origin) != host.lower():
            raise Refused(f"origin {origin!r}: other pages may not use this playground")
        site = headers.get("Sec-Fetch-Site")
        if site not in {None, "same-origin", "none"} and not is_page:
            raise Refused(f"sent from another page (Sec-Fetch-Site: {site}); other pages may not use this playground")

    def knows(self, key: str | None) -> bool:
        """Whether this is the key."""
        return key is not None and hmac.compare_digest(key.encode(errors="replace"), self.key.encode())

    def _is_ours(self, host: str) -> bool:
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
    """Host and port of an origin, lower case; None for what is no origin."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def cookie_name(host: str) -> str:
    """Cookies do not tell ports apart; this name does, so that two playgrounds of one browser keep their keys.

    >>> cookie_name("127.0.0.1:8765")
    'mal_playground_8765'
    """
    port = host.rpartition(":")[2]
    return f"{COOKIE}_{port}" if port.isdigit() else COOKIE
