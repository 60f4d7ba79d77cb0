"""Runs the playground: binds the port, prints the URL and serves until it is interrupted."""

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
from mal_client.web_server import bound, until_interrupted
from mal_train.core.addresses import is_loopback
from mal_train.core.errors import MalError


@dataclass(frozen=True)
class Listen:
    """Address of the page.

    Attributes:
        host: address to listen on; loopback unless the user chose another one.
        port: port to listen on; 0 lets the system choose.
        allowed_hosts: additional host names under which browsers may open the page.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    allowed_hosts: Collection[str] = ()

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can connect."""
        return is_loopback(self.host)


async def serve(
    client: AsyncClient,
    listen: Listen,
    print_line: Callable[[str], None],
    *,
    open_browser: bool = False,
    stop: asyncio.Event | None = None,
) -> None:
    """Serves the page until SIGINT, SIGTERM or `stop`.

    Args:
        client: client of the labeling server; the caller closes it.
        listen: address of the page.
        print_line: called with each line for the user; the first one contains the URL with the key.
        open_browser: also open the page in the default browser.
        stop: ends the service when set; None serves until a signal.

    Raises:
        ConfigError: the address cannot be bound.
    """
    guard = Guard(secrets.token_urlsafe(24), frozenset(map(str.lower, listen.allowed_hosts)), listen.is_loopback)
    # A page that disconnects cancels its handler, and with it the call to the labeling server.
    async with bound(build_app(client, guard), listen.host, listen.port, cancel_on_disconnect=True) as address:
        url = f"{address}/?{KEY_FIELD}={guard.key}"
        await _print_status(client, listen, url, print_line)
        if open_browser:
            # Starting a browser can take seconds.
            await asyncio.to_thread(webbrowser.open, url)
        await (until_interrupted() if stop is None else stop.wait())


async def _print_status(client: AsyncClient, listen: Listen, url: str, print_line: Callable[[str], None]) -> None:
    print_line(f"playground: {url}")
    if not listen.is_loopback:
        print_line(
            f"warning: {listen.host} is open to other machines, and images, masks and the key are sent unencrypted; an "
            "SSH tunnel to 127.0.0.1 protects them"
        )
    try:
        info = await client.server_info()
    except ClientError as error:
        print_line(f"{error}; the page retries")
    except MalError as error:
        print_line(f"{error}; the page shows this error too")
    else:
        print_line(f"model {info.model.name} on {client.address}; press Ctrl-C to stop")
