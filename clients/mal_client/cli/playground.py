"""`mal-client playground`: a page to draw boxes on and see their masks."""

from __future__ import annotations

import argparse
import asyncio
import sys

from mal_client.cli.common import Commands, add_connection, add_verb, async_client_of
from mal_train.core.errors import ConfigError


def add_playground(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    playground = add_verb(commands, "playground", "a page in your browser: draw boxes, see their masks")
    playground.set_defaults(run=_playground)
    add_connection(playground)
    playground.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where the page listens (default %(default)s: this machine alone); others then reach it unencrypted",
    )
    playground.add_argument("--port", type=int, default=8765, metavar="N", help="0: any (default %(default)s)")
    playground.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which the page may be opened, besides localhost and addresses; may be repeated",
    )
    playground.add_argument("--open", action="store_true", help="also open the page in the browser")


def _playground(arguments: argparse.Namespace) -> int:
    try:
        # Imported here: it needs aiohttp, which the other verbs do without.
        from mal_client.playground.server import Listen, serve  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "aiohttp":
            raise
        raise ConfigError("the playground needs aiohttp: pip install 'mask-auto-labeler[playground]'") from None
    if not 0 <= arguments.port < 65536:
        raise ConfigError(f"--port {arguments.port}: a number from 0 to 65535 is needed")
    listen = Listen(arguments.host, arguments.port, arguments.allow_host)

    async def live() -> None:
        async with async_client_of(arguments) as client:
            await serve(client, listen, _tell, open_browser=arguments.open)

    asyncio.run(live())
    return 0


def _tell(text: str) -> None:
    # Flushed: whoever reads this through a pipe waits for the address.
    print(text, flush=True, file=sys.stdout)
