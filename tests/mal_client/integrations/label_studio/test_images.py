"""Claims about where the backend for Label Studio gets pictures from, and where it sends its key."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from mal_client.integrations.label_studio.images import MOST_REDIRECTS, ImageFetcher

from mal_train.core.errors import BadImage, ConfigError
from tests.mal_client.integrations.http_app import running

PERSONAL_TOKEN = "head.body.signature"


class Host:
    """Stands for Label Studio and for a store; notes who showed which key."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.refreshed = 0
        self.store = ""
        self.refresh_moves_to = ""

    def app(self) -> web.Application:
        """Pictures behind a key, a store without one, and the exchange of tokens."""
        app = web.Application()
        app.router.add_get("/data/upload/{name}", self._upload)
        app.router.add_get("/moved", self._moved)
        app.router.add_get("/moved/{times}", self._moved_often)
        app.router.add_get("/free", self._free)
        app.router.add_get("/answers/{status}", self._answers)
        app.router.add_post("/api/token/refresh", self._refresh)
        app.router.add_post("/thief", self._thief)
        return app

    def _note(self, request: web.Request) -> str:
        shown = request.headers.get("Authorization", "")
        self.seen.append((request.path, shown))
        return shown

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        shown = self._note(request)
        good = shown in ("Token old", "Bearer fresh")
        return web.Response(body=b"picture" if good else b"", status=200 if shown else 401)

    async def _moved(self, _: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(self.store)

    async def _moved_often(self, request: web.Request) -> web.StreamResponse:
        times = int(request.match_info["times"])
        raise web.HTTPFound(f"/moved/{times - 1}" if times > 1 else "/data/upload/1.png")

    async def _free(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        return web.Response(body=b"free")

    async def _answers(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=int(request.match_info["status"]))

    async def _refresh(self, request: web.Request) -> web.StreamResponse:
        self.refreshed += 1
        if self.refresh_moves_to:
            raise web.HTTPTemporaryRedirect(self.refresh_moves_to)
        good = (await request.json())["refresh"] == PERSONAL_TOKEN
        return web.json_response({"access": "fresh"} if good else {"detail": "no"}, status=200 if good else 401)

    async def _thief(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        return web.json_response({"access": "fresh"})


@pytest.fixture
def host() -> Iterator[tuple[Host, str]]:
    found = Host()
    with running(found.app()) as address:
        yield found, address


def test_uploads_come_from_the_named_server_with_the_key(host: tuple[Host, str]) -> None:
    seen, address = host
    pictures = ImageFetcher(address, "old")
    assert pictures.read("/data/upload/1.png") == b"picture"
    assert pictures.read(f"{address}/data/upload/1.png") == b"picture"
    assert seen.seen == [("/data/upload/1.png", "Token old")] * 2
    pictures.close()


def test_a_personal_token_is_exchanged_once_and_never_shown(host: tuple[Host, str]) -> None:
    seen, address = host
    pictures = ImageFetcher(address, PERSONAL_TOKEN)
    assert [pictures.read("/data/upload/1.png") for _ in range(3)] == [b"picture"] * 3
    assert seen.refreshed == 1
    assert {shown for _, shown in seen.seen} == {"Bearer fresh"}
    pictures.close()


def test_a_wrong_or_missing_key_is_said_with_the_remedy(host: tuple[Host, str]) -> None:
    for key in ("a.b.c", None):
        pictures = ImageFetcher(host[1], key)
        with pytest.raises(BadImage, match="--api-key-file"):
            pictures.read("/data/upload/1.png")
        pictures.close()


@pytest.fixture
def store() -> Iterator[tuple[Host, str]]:
    """Another host than Label Studio's: by another name, since ports do not make one."""
    found = Host()
    with running(found.app()) as address:
        yield found, address.replace("127.0.0.1", "localhost")


def test_a_redirect_to_a_store_that_was_named_is_followed_without_the_key(
    host: tuple[Host, str], store: tuple[Host, str]
) -> None:
    host[0].store = f"{store[1]}/free"
    pictures = ImageFetcher(host[1], "old", other_hosts=["localhost"])
    assert pictures.read("/moved") == b"free"
    assert store[0].seen == [("/free", "")]
    pictures.close()


@pytest.mark.parametrize("target", ["{store}/free", "http://169.254.169.254/latest/meta-data", "//localhost:1/free"])
def test_a_redirect_to_a_host_that_nobody_named_is_refused_with_the_remedy(
    host: tuple[Host, str], store: tuple[Host, str], target: str
) -> None:
    host[0].store = target.format(store=store[1])
    pictures = ImageFetcher(host[1], "old")
    with pytest.raises(BadImage, match=r"/moved leads to http://\S+, which is not on .* --picture-host"):
        pictures.read("/moved")
    assert store[0].seen == []
    pictures.close()


@pytest.mark.parametrize("path", ["/answers/403", "/answers/404", "/free", "/cut"])
def test_what_a_store_answers_is_told_without_the_signature_of_its_address(
    host: tuple[Host, str], store: tuple[Host, str], path: str
) -> None:
    at = "http://localhost:1" if path == "/cut" else store[1]
    host[0].store = f"{at}{path}?X-Signature=hidden"
    pictures = ImageFetcher(host[1], "old", other_hosts=["localhost"], max_bytes=3)
    with pytest.raises(BadImage) as refused:
        pictures.read("/moved")
    assert str(refused.value).startswith(f"/moved (from {at}): ")
    assert not any(part in str(refused.value) for part in (path, "hidden"))
    pictures.close()


@pytest.mark.parametrize("key", ["old", None])
def test_a_store_that_refuses_is_not_taken_for_label_studio_that_refuses_the_key(
    host: tuple[Host, str], store: tuple[Host, str], key: str | None
) -> None:
    host[0].store = f"{store[1]}/answers/403"
    pictures = ImageFetcher(host[1], key, other_hosts=["localhost"])
    with pytest.raises(BadImage, match=r"refused \(403\) without a key, and .*pre-signed URLs") as refused:
        pictures.read("/moved")
    assert "--api-key-file" not in str(refused.value)
    pictures.close()


def test_a_key_that_is_refused_is_told_apart_from_one_that_lacks(host: tuple[Host, str]) -> None:
    for key, said in (("wrong", "refuses the key"), (None, "asks for a key")):
        pictures = ImageFetcher(host[1], key)
        with pytest.raises(BadImage, match=rf"{said} \(403\); give .* --api-key-file"):
            pictures.read("/answers/403")
        pictures.close()


def test_a_redirect_to_another_scheme_is_refused(host: tuple[Host, str]) -> None:
    host[0].store = "file:///etc/passwd"
    pictures = ImageFetcher(host[1], "old")
    with pytest.raises(BadImage):
        pictures.read("/moved")
    pictures.close()


def test_redirects_end_somewhere(host: tuple[Host, str]) -> None:
    pictures = ImageFetcher(host[1], "old")
    assert pictures.read(f"/moved/{MOST_REDIRECTS}") == b"picture"
    with pytest.raises(BadImage, match=f"sent on more than {MOST_REDIRECTS} times"):
        pictures.read(f"/moved/{MOST_REDIRECTS + 1}")
    pictures.close()


def test_the_personal_token_is_not_carried_along_by_a_redirect(host: tuple[Host, str], store: tuple[Host, str]) -> None:
    host[0].refresh_moves_to = f"{store[1]}/thief"
    pictures = ImageFetcher(host[1], PERSONAL_TOKEN, other_hosts=["localhost"])
    with pytest.raises(BadImage, match="answered 307"):
        pictures.read("/data/upload/1.png")
    assert store[0].seen == []
    pictures.close()


def test_other_hosts_are_asked_only_with_leave_and_without_the_key(host: tuple[Host, str]) -> None:
    seen, address = host
    strict, open_minded = (
        ImageFetcher("http://localhost:1", "old"),
        ImageFetcher(None, "old", other_hosts=["127.0.0.1"]),
    )
    with pytest.raises(BadImage, match=r"--picture-host 127\.0\.0\.1"):
        strict.read(f"{address}/free")
    assert open_minded.read(f"{address}/free") == b"free"
    assert seen.seen == [("/free", "")]
    strict.close()
    open_minded.close()


@pytest.mark.parametrize("address", ["s3://bucket/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA"])
def test_addresses_of_other_kinds_are_refused(address: str) -> None:
    pictures = ImageFetcher("http://localhost:1")
    with pytest.raises(BadImage, match="addresses are not read"):
        pictures.read(address)
    pictures.close()


@pytest.mark.parametrize("address", ["http://localhost:99999/a.png", "http://[/a.png", "http://a\x00b/"])
def test_what_is_no_address_is_the_fault_of_its_picture(address: str) -> None:
    pictures = ImageFetcher("http://localhost:1")
    with pytest.raises(BadImage, match="no address"):
        pictures.read(address)
    pictures.close()


def test_local_files_are_read_from_their_folder_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "shared" / "deep").mkdir(parents=True)
    (tmp_path / "shared" / "deep" / "a b.png").write_bytes(b"local")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "shared" / "link.png").symlink_to(tmp_path / "secret.png")
    pictures = ImageFetcher(None, folder=tmp_path / "shared")
    assert pictures.read("/data/local-files/?d=deep/a%20b.png") == b"local"
    for name in ("../secret.png", "%2e%2e/secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(BadImage):
            pictures.read(f"/data/local-files/?d={name}")
    pictures.close()


def test_a_picture_that_is_too_large_is_not_read_to_its_end(host: tuple[Host, str]) -> None:
    pictures = ImageFetcher(host[1], "old", max_bytes=3)
    with pytest.raises(BadImage, match="more than 3 bytes"):
        pictures.read("/data/upload/1.png")
    pictures.close()


def test_without_a_server_uploads_are_refused_with_the_remedy() -> None:
    pictures = ImageFetcher(None)
    with pytest.raises(BadImage, match="--label-studio"):
        pictures.read("/data/upload/1.png")
    pictures.close()
    with pytest.raises(ConfigError, match="http://localhost:8080"):
        ImageFetcher("localhost:8080")
