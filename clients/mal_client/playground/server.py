"""The playground's life: bind, say where, serve until it is interrupted."""

from __future__ import annotations

import asyncio
import secrets
import webbrowser
from collections.abc import Callable, Collection
from dataclasses import dataclass

from mal_client.client import AsyncClient
from mal_client.errors import ClientError
from mal_client.playground.app import build_app
from mal_client.playground.security import KEY_FIELD, Guard
from mal_client.web import bound, until_interrupted
from mal_train.core.errors import MalError
from mal_train.core.net import is_loopback


@dataclass(frozen=True)
class Listen:
    """Where the page is served.

    Attributes:
        host: an address of this machine; one that others reach is the user's explicit wish.
        port: 0 lets the system choose.
        allowed_hosts: further names under which the page may be opened.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    allowed_hosts: Collection[str] = ()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)


async def serve(
    client: AsyncClient,
    listen: Listen,
    tell: Callable[[str], None],
    *,
    open_browser: bool = False,
    stop: asyncio.Event | None = None,
) -> None:
    """Serves the page until SIGINT, SIGTERM or `stop`.

    Args:
        client: of the labeling server; closed by the caller.
        listen: where.
        tell: told the address, key included, and what the user should know.
        open_browser: also open it.
        stop: ends the service; None: signals alone do.

    Raises:
        ConfigError: the port cannot be bound.
    """
    guard = Guard(secrets.token_urlsafe(24), frozenset(map(str.lower, listen.allowed_hosts)), listen.is_loopback)
    # A page that goes away cancels its handler, and with it the call to the labeling server.
    async with bound(build_app(client, guard), listen.host, listen.port, cancel_gone=True) as address:
        url = f"{address}/?{KEY_FIELD}={guard.key}"
        await _say(client, listen, url, tell)
        if open_browser:
            # Starting a browser can take seconds.
            await asyncio.to_thread(webbrowser.open, url)
        await (until_interrupted() if stop is None else stop.wait())


async def _say(client: AsyncClient, listen: Listen, url: str, tell: Callable[[str], None]) -> None:
    tell(f"playground: {url}")
    if not listen.is_loopback:
        tell(
            f"{listen.host} is reached from other machines, and pictures, masks and the key above travel unencrypted; "
            "an SSH tunnel to 127.0.0.1 does not show them"
        )
    try:
        info = await client.server_info()
    except ClientError as error:
        tell(f"{error}; the page is there and tries again")
    except MalError as error:
        tell(f"{error}; the page shows the same")
    else:
        tell(f"labels by {info.model.name} on {client.address}; Ctrl-C ends the playground")
