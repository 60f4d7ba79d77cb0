"""Tests of the access control of the playground."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from mal_client.playground import label_stream
from mal_client.playground.app import PAGES
from mal_client.playground.security import HEADERS, cookie_name
from mal_client.web_guard import Forbidden, WebGuard

from tests.mal_client.playground.playground_page import KEY, Page, error_of, playground, with_playground
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import DISC_PNG


@pytest.mark.parametrize(
    ("host", "loopback", "is_allowed"),
    [
        ("127.0.0.1:8765", True, True),
        ("localhost:8765", True, True),
        ("LOCALHOST", True, True),
        ("[::1]:8765", True, True),
        ("studio.example:80", True, True),
        ("evil.example:8765", True, False),
        ("127.0.0.1.evil.example", True, False),
        ("192.168.1.5:8765", True, False),
        ("192.168.1.5:8765", False, True),
        ("evil.example", False, False),
        ("", True, False),
        ("[::1", True, False),
        ("user@localhost", True, True),
    ],
)
def test_a_host_that_could_be_rebound_is_refused(host: str, loopback: bool, is_allowed: bool) -> None:
    guard = WebGuard({"studio.example"}, loopback)
    if is_allowed:
        guard.check({"Host": host}, is_page=False)
    else:
        with pytest.raises(Forbidden, match=r"^host "):
            guard.check({"Host": host}, is_page=False)


@pytest.mark.parametrize(
    ("headers", "is_page", "is_allowed"),
    [
        ({"Origin": "http://127.0.0.1:8765"}, False, True),
        ({"Origin": "http://127.0.0.1:9999"}, False, False),
        ({"Origin": "https://evil.example"}, False, False),
        ({"Origin": "null"}, False, False),
        ({"Origin": "http://["}, False, False),
        ({"Origin": "https://evil.example"}, True, False),
        ({"Sec-Fetch-Site": "same-origin"}, False, True),
        ({"Sec-Fetch-Site": "none"}, True, True),
        ({"Sec-Fetch-Site": "cross-site"}, True, True),
        ({"Sec-Fetch-Site": "cross-site"}, False, False),
        ({"Sec-Fetch-Site": "same-site"}, False, False),
    ],
)
def test_requests_of_other_pages_are_refused(headers: dict[str, str], is_page: bool, is_allowed: bool) -> None:
    given = {"Host": "127.0.0.1:8765", **headers}
    if is_allowed:
        WebGuard().check(given, is_page=is_page)
    else:
        with pytest.raises(Forbidden, match=r"^(origin|Sec-Fetch-Site) "):
            WebGuard().check(given, is_page=is_page)


def test_every_url_needs_the_key() -> None:
    async def request_all(address: str) -> list[int]:
        async with playground(address, key=None) as page:
            wrong = [page.get("/"), page.get("/", params={"key": "wrong"}), page.get("/main.js"), page.get("/?key=%ff")]
            wrong += [page.get("/api/server"), page.post("/api/images", data=DISC_PNG), page.post("/api/coco", json={})]
            return [(await error_of(response))[0] for response in wrong]

    with served() as address:
        assert asyncio.run(request_all(address)) == [403] * 7


def test_the_printed_url_sets_an_http_only_same_site_cookie() -> None:
    async def open_page(page: Page) -> Any:
        async with page.get("/", params={"key": KEY}) as response:
            return response.cookies[cookie_name(f"127.0.0.1:{page.port}")]

    cookie = with_playground(open_page)
    assert cookie.value == KEY
    assert cookie["httponly"]
    assert cookie["samesite"] == "Strict"


def test_other_hosts_and_origins_are_refused_even_with_the_key() -> None:
    async def try_both(page: Page) -> list[tuple[int, dict[str, Any]]]:
        return [
            await error_of(page.get("/api/server", headers={"Host": "evil.example"})),
            await error_of(page.post("/api/images", data=DISC_PNG, headers={"Origin": "https://evil.example"})),
        ]

    for status, error in with_playground(try_both):
        assert (status, error["reason"]) == (403, "NOT_OUR_PAGE")


@pytest.mark.parametrize("path", ["/", "/main.js", "/api/server", "/nothing", "/api/images/00/pixels"])
def test_every_response_has_the_security_headers(path: str) -> None:
    async def headers(page: Page) -> dict[str, str]:
        async with page.get(path) as response:
            return dict(response.headers)

    received = with_playground(headers)
    assert {name: received.get(name) for name in HEADERS} == HEADERS


def test_the_page_has_no_external_urls_and_no_inline_scripts() -> None:
    folder = Path(label_stream.__file__).parent / "static"
    assert {path.name for path in folder.iterdir()} == set(PAGES)
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|[\"'(]//|@import|eval\(|innerHTML", text), path.name
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert "<script>" not in index
    assert "style=" not in index
