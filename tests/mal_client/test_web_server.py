"""Claims about the server of the local web applications."""

import asyncio

import aiohttp
import pytest
from aiohttp import web
from mal_client import web_server
from mal_client.web_server import bound


async def answer(_: web.Request) -> web.Response:
    return web.Response(text="here")


def test_callers_who_send_half_a_request_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server, "MAX_CONNECTIONS", 4)

    async def run() -> tuple[bytes, bytes, int]:
        app = web.Application()
        app.router.add_get("/", answer)
        async with bound(app, "127.0.0.1", 0) as address:
            port = int(address.rpartition(":")[2])
            waiting = [await asyncio.open_connection("127.0.0.1", port) for _ in range(12)]
            for _, writer in waiting:
                writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
            async with aiohttp.ClientSession() as session, session.get(address) as response:
                text = await response.read()
            # The oldest were ended, the newest was not.
            ended = await waiting[0][0].read()
            reader, writer = waiting[-1]
            writer.write(b"Connection: close\r\n\r\n")
            last = await reader.read()
            for _, writer in waiting:
                writer.close()
            return text, ended, int(last.split()[1])

    assert asyncio.run(run()) == (b"here", b"", 200)
