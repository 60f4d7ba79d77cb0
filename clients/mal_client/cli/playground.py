"""The command `mal-client playground`: a web page for drawing boxes and viewing their masks."""

from __future__ import annotations

import argparse
import asyncio

from mal_client.cli.common import Commands, add_command, add_connection_options, make_async_client, print_line
from mal_train.core.errors import ConfigError


def add_playground(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    playground = add_command(commands, "playground", "serve a web page for drawing boxes and viewing their masks")
    playground.set_defaults(run=_playground)
    add_connection_options(playground)
    playground.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; any other address than the default is open to other machines and unencrypted "
        "(default: %(default)s)",
    )
    playground.add_argument(
        "--port",
        type=int,
        default=8765,
        metavar="N",
        help="port to listen on, 0 to 65535; 0 chooses a free one (default: %(default)d)",
    )
    playground.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name under which browsers may open the page, besides localhost and IP addresses; repeatable "
        "(default: none)",
    )
    playground.add_argument("--open", action="store_true", help="open the page in the default browser (default: off)")


def _playground(arguments: argparse.Namespace) -> int:
    try:
        # Imported here: it needs aiohttp, which the other commands do not.
        from mal_client.playground.server import Listen, serve  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "aiohttp":
            raise
        raise ConfigError("aiohttp is not installed; run: pip install 'mask-auto-labeler[playground]'") from None
    if not 0 <= arguments.port < 65536:
        raise ConfigError(f"--port {arguments.port}: expected 0 to 65535")
    listen = Listen(arguments.host, arguments.port, arguments.allow_host)

    async def run() -> None:
        async with make_async_client(arguments) as client:
            await serve(client, listen, print_line, open_page=arguments.open)

    asyncio.run(run())
    return 0
