"""The playground's life: it says where it is, ends when told, and what it lacks."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from mal_client.client import AsyncClient
from mal_client.playground.server import Listen, serve

from mal_train.core.errors import ConfigError


def test_it_says_where_it_is_and_ends_when_told() -> None:
    async def live() -> list[str]:
        told: list[str] = []
        stop = asyncio.Event()

        def tell(text: str) -> None:
            told.append(text)
            if len(told) == 2:
                stop.set()

        async with AsyncClient("127.0.0.1:1", timeout_s=1) as client:
            await serve(client, Listen(port=0), tell, stop=stop)
        return told

    where, server = asyncio.run(live())
    assert where.startswith("playground: http://127.0.0.1:")
    assert "/?key=" in where
    assert "tries again" in server


def test_a_taken_port_is_a_sentence() -> None:
    async def live() -> None:
        async with AsyncClient("127.0.0.1:1", timeout_s=1) as client:
            taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
            async with taken:
                await serve(client, Listen(port=taken.sockets[0].getsockname()[1]), lambda _: None)

    with pytest.raises(ConfigError, match="cannot listen there"):
        asyncio.run(live())


def test_without_aiohttp_the_command_prints_the_line_to_run() -> None:
    script = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from mal_client.cli.main import main; sys.exit(main(['playground', '--server', 'localhost:1']))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert "pip install 'mask-auto-labeler[playground]'" in ended.stderr
