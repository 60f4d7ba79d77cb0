"""Tests of the start and stop of the playground."""

from __future__ import annotations

import asyncio
import html
import os
import re
import stat
import subprocess
import sys
import tempfile
import webbrowser
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import url2pathname

import aiohttp
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


def test_open_shows_the_key_to_no_other_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The browser's arguments, which every account can list, name a file of mode 0600 that goes when it was used."""
    seen: list[tuple[str, int, str]] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def run() -> list[str]:
        lines: list[str] = []
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def browse(argument: str) -> bool:
            path = Path(url2pathname(urlsplit(argument).path))
            seen.append((argument, stat.S_IMODE(path.stat().st_mode), path.read_text()))
            asyncio.run_coroutine_threadsafe(follow(path), loop)
            return True

        async def follow(path: Path) -> None:
            link = html.unescape(re.findall(r'href="([^"]+)"', path.read_text())[0])
            async with aiohttp.ClientSession() as session, session.get(link) as page:
                assert page.status == 200
            while path.exists():
                await asyncio.sleep(0)
            stop.set()

        monkeypatch.setattr(webbrowser, "open", browse)
        async with AsyncClient("127.0.0.1:1", timeout_s=1) as client:
            await serve(client, Listen(port=0), lines.append, open_page=True, stop=stop)
        return lines

    old = os.umask(0)
    try:
        lines = asyncio.run(run())
    finally:
        os.umask(old)
    ((argument, mode, content),) = seen
    url = lines[0].removeprefix("playground: ")
    key = parse_qs(urlsplit(url).query)["key"][0]
    assert key not in argument
    assert mode == 0o600
    assert url in html.unescape(content)
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_page_that_was_never_opened_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(webbrowser, "open", lambda _: loop.call_soon_threadsafe(stop.set))
        async with AsyncClient("127.0.0.1:1", timeout_s=1) as client:
            await serve(client, Listen(port=0), lambda _: None, open_page=True, stop=stop)

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


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
