"""The caller of the running call, and what is its own: turns in the queues, cached images, folders that it may name."""

from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address
from typing import Any
from urllib.parse import unquote

from mal_server.errors import FolderDenied
from mal_server.security.auth import TokenScopes


@dataclass(frozen=True)
class Caller:
    """Identity of the program that calls.

    Attributes:
        name: identity in the queues, where callers take turns and have a share. With tokens the name of the token,
            however many connections use it. Without tokens nobody is known by name, and it is the connection: a program
            has one, so two programs are two callers even on one machine. A caller without a token may open more
            connections to get more turns; only tokens prevent that.
        token: name of the token; empty without. Images that it sent are found by their hash only under this name.
        data_folders: folders of the server that it may name; None: all.
    """

    name: str = ""
    token: str = ""
    data_folders: frozenset[str] | None = None

    def may_name(self, folder: str) -> bool:
        """Returns False for a folder that the settings of the token leave out."""
        return self.data_folders is None or folder in self.data_folders

    def check_folder(self, folder: str) -> None:
        """Raises FolderDenied for such a folder, also if it does not exist: the error must not tell."""
        if not self.may_name(folder):
            allowed = ", ".join(sorted(self.data_folders or ())) or "none"
            raise FolderDenied(f"token {self.token!r} may not name this folder of the server; it may name: {allowed}")


NOBODY = Caller()
"""Outside a call."""

current_caller: ContextVar[Caller] = ContextVar("current_caller", default=NOBODY)
"""Set by the interceptor; each call runs in a task, and so in a context, of its own."""


def caller_of(token: TokenScopes | None, context: Any) -> Caller:
    """Returns the caller of a call; `context` is that of gRPC."""
    if token is None:
        return Caller(str(context.peer()))
    return Caller(token.name, token.name, token.data_folders)


@lru_cache(4096)
def host_of(peer: str) -> str:
    """Returns the host of a peer of gRPC, without its port; of IPv6 the 64 bits that one host has for itself.

    >>> host_of("ipv4:192.0.2.1:50000"), host_of("ipv6:%5B2001:db8::1%5D:50000"), host_of("unix:")
    ('192.0.2.1', '2001:db8::', 'unix:')
    """
    family, _, address = peer.partition(":")
    if family not in ("ipv4", "ipv6"):
        return peer
    host = unquote(address).rpartition(":")[0].strip("[]")
    if family == "ipv4":
        return host
    # Without the zone of a link-local address.
    return str(IPv6Address(int(IPv6Address(host.partition("%")[0])) >> 64 << 64))
