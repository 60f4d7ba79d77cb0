"""Tests of the start and stop of the playground."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from mal_client.client import AsyncClient
from mal_client.playground.server import Listen, serve

from mal_train.core.errors import ConfigError


def test_it_prints_its_url_and_stops_on_the_event() -> None:
    async def run() -> list[str]:
        lines: list[str] = []
        stop = asyncio.Event()

        def print_line(text: str) -> None:
            lines.append(text)
            if len(lines) == 2:
                stop.set()

        async with AsyncClient("127.0.0.1:1", timeout_s=1) as client:
            await serve(client, Listen(port=0), print_line, stop=stop)
        return lines

    url, status = asyncio.run(run())
    assert url.startswith("playground: http://127.0.0.1:")
    assert "/?key=" in url
    assert "127.0.0.1:1" in status


def test_a_port_in_use_is_a_configuration_error() -> None:
    async def run() -> None:
        async with AsyncClient("127.0.0.1:1", timeout_s=1) as client:
            other = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
            async with other:
                await serve(client, Listen(port=other.sockets[0].getsockname()[1]), lambda _: None)

    with pytest.raises(ConfigError, match="--port"):
        asyncio.run(run())


def test_without_aiohttp_the_command_names_the_extra_to_install() -> None:
    script = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from mal_client.cli.main import main; sys.exit(main(['playground', '--server', 'localhost:1']))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert "mask-auto-labeler[playground]" in ended.stderr
