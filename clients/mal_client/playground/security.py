"""Restricts access to the playground to its own page, in the browser that opened the printed URL.

Every account of the machine can reach a local port, and the playground uses the user's token for the labeling server.
Besides the checks of `WebGuard` against other pages, every request needs a key: random at each start and part of the
printed URL; from then on a cookie that scripts cannot read carries it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

from mal_client.web_guard import WebGuard

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


@dataclass(frozen=True)
class Guard(WebGuard):
    """The checks of `WebGuard`, and the key.

    Attributes:
        key: the secret in the URL.
    """

    key: str = field(kw_only=True, repr=False)

    def accepts(self, key: str | None) -> bool:
        """Returns True for the key, in constant time."""
        return key is not None and hmac.compare_digest(key.encode(errors="replace"), self.key.encode())


def cookie_name(host: str) -> str:
    """Returns the cookie name for a host; it includes the port, which cookies ignore, so that playgrounds can coexist.

    >>> cookie_name("127.0.0.1:8765")
    'mal_playground_8765'
    """
    port = host.rpartition(":")[2]
    return f"{COOKIE}_{port}" if port.isdigit() else COOKIE
