"""Who may talk to the playground: its own page in the browser that was given its address."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from mal_client.playground import label_stream
from mal_client.playground.app import PAGES
from mal_client.playground.security import HEADERS, Guard, Refused, cookie_name

from tests.mal_client.playground.playground_page import KEY, Page, playground, refusal, visit
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import DISC_PNG


@pytest.mark.parametrize(
    ("host", "loopback", "is_ours"),
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
def test_a_host_that_could_be_rebound_is_refused(host: str, loopback: bool, is_ours: bool) -> None:
    guard = Guard(KEY, {"studio.example"}, loopback)
    if is_ours:
        guard.check({"Host": host}, is_page=False)
    else:
        with pytest.raises(Refused, match="not this playground"):
            guard.check({"Host": host}, is_page=False)


@pytest.mark.parametrize(
    ("headers", "is_page", "is_ours"),
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
def test_what_another_page_sends_is_refused(headers: dict[str, str], is_page: bool, is_ours: bool) -> None:
    given = {"Host": "127.0.0.1:8765", **headers}
    if is_ours:
        Guard(KEY).check(given, is_page=is_page)
    else:
        with pytest.raises(Refused, match="other pages"):
            Guard(KEY).check(given, is_page=is_page)


def test_nothing_is_given_without_the_key() -> None:
    async def knock(address: str) -> list[int]:
        async with playground(address, key=None) as page:
            wrong = [page.get("/"), page.get("/", params={"key": "wrong"}), page.get("/main.js"), page.get("/?key=%ff")]
            wrong += [page.get("/api/server"), page.post("/api/images", data=DISC_PNG), page.post("/api/coco", json={})]
            return [(await refusal(answer))[0] for answer in wrong]

    with served() as address:
        assert asyncio.run(knock(address)) == [403] * 7


def test_the_printed_address_hands_out_a_cookie_that_no_script_and_no_other_site_gets() -> None:
    async def open_page(page: Page) -> Any:
        async with page.get("/", params={"key": KEY}) as answer:
            return answer.cookies[cookie_name(f"127.0.0.1:{page.port}")]

    cookie = visit(open_page)
    assert cookie.value == KEY
    assert cookie["httponly"]
    assert cookie["samesite"] == "Strict"


def test_foreign_host_and_origin_are_refused_with_the_key_in_hand() -> None:
    async def try_both(page: Page) -> list[tuple[int, dict[str, Any]]]:
        return [
            await refusal(page.get("/api/server", headers={"Host": "evil.example"})),
            await refusal(page.post("/api/images", data=DISC_PNG, headers={"Origin": "https://evil.example"})),
        ]

    for status, error in visit(try_both):
        assert (status, error["reason"]) == (403, "NOT_OUR_PAGE")


@pytest.mark.parametrize("path", ["/", "/main.js", "/api/server", "/nothing", "/api/images/00/pixels"])
def test_every_answer_carries_the_headers_that_lock_the_page(path: str) -> None:
    async def headers(page: Page) -> dict[str, str]:
        async with page.get(path) as answer:
            return dict(answer.headers)

    found = visit(headers)
    assert {name: found.get(name) for name in HEADERS} == HEADERS


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script_of_its_text() -> None:
    folder = Path(label_stream.__file__).parent / "static"
    assert {path.name for path in folder.iterdir()} == set(PAGES)
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|[\"'(]//|@import|eval\(|innerHTML", text), path.name
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert "<script>" not in index
    assert "style=" not in index
