"""Runs the playground: binds the port, prints the URL and serves until it is interrupted."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass

from mal_client.client import AsyncClient
from mal_client.errors import ClientError
from mal_client.playground.app import build_app
from mal_client.playground.browser import open_browser, redirect_file
from mal_client.playground.security import KEY_FIELD, Guard
from mal_client.web_server import bound, until_interrupted
from mal_train.core.addresses import is_loopback
from mal_train.core.errors import MalError, OutputError


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
    open_page: bool = False,
    stop: asyncio.Event | None = None,
) -> None:
    """Serves the page until SIGINT, SIGTERM or `stop`.

    Args:
        client: client of the labeling server; the caller closes it.
        listen: address of the page.
        print_line: called with each line for the user; the first one contains the URL with the key.
        open_page: also open the page in the default browser.
        stop: ends the service when set; None serves until a signal.

    Raises:
        ConfigError: the address cannot be bound.
    """
    hosts = frozenset(map(str.lower, listen.allowed_hosts))
    guard = Guard(hosts, listen.is_loopback, key=secrets.token_urlsafe(24))
    opened = asyncio.Event()
    # A page that disconnects cancels its handler, and with it the call to the labeling server.
    app = build_app(client, guard, on_open=opened.set)
    async with bound(app, listen.host, listen.port, cancel_on_disconnect=True) as address:
        url = f"{address}/?{KEY_FIELD}={guard.key}"
        await _print_status(client, listen, url, print_line)
        async with _page_opened(url, opened, print_line) if open_page else nullcontext():
            await (until_interrupted() if stop is None else stop.wait())


@asynccontextmanager
async def _page_opened(url: str, opened: asyncio.Event, print_line: Callable[[str], None]) -> AsyncIterator[None]:
    """Opens the page in the default browser, beside the block."""
    opening = asyncio.create_task(_open_page(url, opened, print_line))
    try:
        yield
    finally:
        opening.cancel()
        with suppress(asyncio.CancelledError):
            await opening


async def _open_page(url: str, opened: asyncio.Event, print_line: Callable[[str], None]) -> None:
    """Opens the page; the file that leads the browser there is deleted as soon as the page was opened."""
    try:
        with redirect_file(url) as path:
            # In a thread: starting a browser can take seconds.
            await asyncio.to_thread(open_browser, path)
            await opened.wait()
    except OutputError as error:
        print_line(str(error))


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
