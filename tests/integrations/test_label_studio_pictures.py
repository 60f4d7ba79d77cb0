"""Claims about where the backend for Label Studio gets pictures from, and where it sends its key."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mal_client.integrations.label_studio.pictures import Pictures
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from mal_train.errors import BadImage, ConfigError
from tests.integrations.http_app import running

PERSONAL_TOKEN = "head.body.signature"


class Host:
    """Stands for Label Studio and for a store; notes who showed which key."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.refreshed = 0
        self.store = ""

    def app(self) -> Starlette:
        """Pictures behind a key, a store without one, and the exchange of tokens."""

        async def upload(request: Request) -> Response:
            shown = request.headers.get("authorization", "")
            self.seen.append((request.url.path, shown))
            return Response(b"picture" if shown in ("Token old", "Bearer fresh") else b"", 200 if shown else 401)

        async def elsewhere(request: Request) -> Response:
            return RedirectResponse(f"{self.store}/free")

        async def free(request: Request) -> Response:
            self.seen.append((request.url.path, request.headers.get("authorization", "")))
            return Response(b"free")

        async def refresh(request: Request) -> Response:
            self.refreshed += 1
            good = (await request.json())["refresh"] == PERSONAL_TOKEN
            return JSONResponse({"access": "fresh"} if good else {"detail": "no"}, 200 if good else 401)

        routes = [Route("/data/upload/{name}", upload), Route("/moved", elsewhere), Route("/free", free)]
        return Starlette(routes=[*routes, Route("/api/token/refresh", refresh, methods=["POST"])])


@pytest.fixture
def host() -> Iterator[tuple[Host, str]]:
    found = Host()
    with running(found.app()) as address:
        yield found, address


def test_uploads_come_from_the_named_server_with_the_key(host: tuple[Host, str]) -> None:
    seen, address = host
    pictures = Pictures(address, "old")
    assert pictures.read("/data/upload/1.png") == b"picture"
    assert pictures.read(f"{address}/data/upload/1.png") == b"picture"
    assert seen.seen == [("/data/upload/1.png", "Token old")] * 2
    pictures.close()


def test_a_personal_token_is_exchanged_once_and_never_shown(host: tuple[Host, str]) -> None:
    seen, address = host
    pictures = Pictures(address, PERSONAL_TOKEN)
    assert [pictures.read("/data/upload/1.png") for _ in range(3)] == [b"picture"] * 3
    assert seen.refreshed == 1
    assert {shown for _, shown in seen.seen} == {"Bearer fresh"}
    pictures.close()


def test_a_wrong_or_missing_key_is_said_with_the_remedy(host: tuple[Host, str]) -> None:
    for key in ("a.b.c", None):
        pictures = Pictures(host[1], key)
        with pytest.raises(BadImage, match="--api-key-file"):
            pictures.read("/data/upload/1.png")
        pictures.close()


def test_a_redirect_to_a_store_does_not_carry_the_key(host: tuple[Host, str]) -> None:
    seen, address = host
    store = Host()
    with running(store.app()) as there:
        seen.store = there
        pictures = Pictures(address, "old")
        assert pictures.read("/moved") == b"free"
        assert store.seen == [("/free", "")]
        pictures.close()


def test_other_hosts_are_asked_only_with_leave_and_without_the_key(host: tuple[Host, str]) -> None:
    seen, address = host
    strict, open_minded = Pictures("http://localhost:1", "old"), Pictures(None, "old", other_hosts=["127.0.0.1"])
    with pytest.raises(BadImage, match=r"--picture-host 127\.0\.0\.1"):
        strict.read(f"{address}/free")
    assert open_minded.read(f"{address}/free") == b"free"
    assert seen.seen == [("/free", "")]
    strict.close()
    open_minded.close()


@pytest.mark.parametrize("address", ["s3://bucket/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA"])
def test_addresses_of_other_kinds_are_refused(address: str) -> None:
    pictures = Pictures("http://localhost:1")
    with pytest.raises(BadImage, match="addresses are not read"):
        pictures.read(address)
    pictures.close()


@pytest.mark.parametrize("address", ["http://localhost:99999/a.png", "http://[/a.png"])
def test_what_is_no_address_is_the_fault_of_its_picture(address: str) -> None:
    pictures = Pictures("http://localhost:1")
    with pytest.raises(BadImage, match="no address"):
        pictures.read(address)
    pictures.close()


def test_local_files_are_read_from_their_folder_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "shared" / "deep").mkdir(parents=True)
    (tmp_path / "shared" / "deep" / "a b.png").write_bytes(b"local")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "shared" / "link.png").symlink_to(tmp_path / "secret.png")
    pictures = Pictures(None, folder=tmp_path / "shared")
    assert pictures.read("/data/local-files/?d=deep/a%20b.png") == b"local"
    for name in ("../secret.png", "%2e%2e/secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(BadImage):
            pictures.read(f"/data/local-files/?d={name}")
    pictures.close()


def test_a_picture_that_is_too_large_is_not_read_to_its_end(host: tuple[Host, str]) -> None:
    pictures = Pictures(host[1], "old", max_bytes=3)
    with pytest.raises(BadImage, match="more than 3 bytes"):
        pictures.read("/data/upload/1.png")
    pictures.close()


def test_without_a_server_uploads_are_refused_with_the_remedy() -> None:
    pictures = Pictures(None)
    with pytest.raises(BadImage, match="--label-studio"):
        pictures.read("/data/upload/1.png")
    pictures.close()
    with pytest.raises(ConfigError, match="http://localhost:8080"):
        Pictures("localhost:8080")
