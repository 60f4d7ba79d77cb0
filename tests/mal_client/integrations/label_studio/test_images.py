"""Tests of the hosts and folders that the Label Studio backend reads images from, and of the tokens that it sends."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from mal_client.integrations.label_studio.images import MAX_REDIRECTS, ImageFetcher

from mal_train.core.errors import BadImage, ConfigError
from tests.mal_client.integrations.http_app import running
from tests.proxy import recording_proxy

PERSONAL_TOKEN = "head.body.signature"


class FakeHost:
    """A fake Label Studio and image store; records the path and Authorization header of each request."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.refreshed = 0
        self.store = ""
        self.refresh_moves_to = ""

    def app(self) -> web.Application:
        """Builds an application with images that need a token, a public store, and the exchange of tokens."""
        app = web.Application()
        app.router.add_get("/data/upload/{name}", self._upload)
        app.router.add_get("/moved", self._moved)
        app.router.add_get("/moved/{times}", self._moved_often)
        app.router.add_get("/free", self._free)
        app.router.add_get("/status/{status}", self._status)
        app.router.add_post("/api/token/refresh", self._refresh)
        app.router.add_post("/thief", self._thief)
        return app

    def _record(self, request: web.Request) -> str:
        token = request.headers.get("Authorization", "")
        self.requests.append((request.path, token))
        return token

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        token = self._record(request)
        valid = token in ("Token old", "Bearer fresh")
        return web.Response(body=b"image" if valid else b"", status=200 if token else 401)

    async def _moved(self, _: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(self.store)

    async def _moved_often(self, request: web.Request) -> web.StreamResponse:
        times = int(request.match_info["times"])
        raise web.HTTPFound(f"/moved/{times - 1}" if times > 1 else "/data/upload/1.png")

    async def _free(self, request: web.Request) -> web.StreamResponse:
        self._record(request)
        return web.Response(body=b"free")

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=int(request.match_info["status"]))

    async def _refresh(self, request: web.Request) -> web.StreamResponse:
        self.refreshed += 1
        if self.refresh_moves_to:
            raise web.HTTPTemporaryRedirect(self.refresh_moves_to)
        valid = (await request.json())["refresh"] == PERSONAL_TOKEN
        return web.json_response({"access": "fresh"} if valid else {"detail": "no"}, status=200 if valid else 401)

    async def _thief(self, request: web.Request) -> web.StreamResponse:
        self._record(request)
        return web.json_response({"access": "fresh"})


@pytest.fixture
def host() -> Iterator[tuple[FakeHost, str]]:
    fake = FakeHost()
    with running(fake.app()) as address:
        yield fake, address


def test_uploads_are_fetched_from_label_studio_with_the_token(host: tuple[FakeHost, str]) -> None:
    fake, address = host
    images = ImageFetcher(address, "old")
    assert images.read("/data/upload/1.png") == b"image"
    assert images.read(f"{address}/data/upload/1.png") == b"image"
    assert fake.requests == [("/data/upload/1.png", "Token old")] * 2
    images.close()


def test_a_personal_token_is_exchanged_once_and_not_sent_with_requests_for_images(host: tuple[FakeHost, str]) -> None:
    fake, address = host
    images = ImageFetcher(address, PERSONAL_TOKEN)
    assert [images.read("/data/upload/1.png") for _ in range(3)] == [b"image"] * 3
    assert fake.refreshed == 1
    assert {token for _, token in fake.requests} == {"Bearer fresh"}
    images.close()


def test_a_wrong_or_missing_token_names_the_option(host: tuple[FakeHost, str]) -> None:
    for key in ("a.b.c", None):
        images = ImageFetcher(host[1], key)
        with pytest.raises(BadImage, match="--api-key-file"):
            images.read("/data/upload/1.png")
        images.close()


@pytest.fixture
def store() -> Iterator[tuple[FakeHost, str]]:
    """Runs another host than Label Studio, under another name, because the port does not distinguish hosts."""
    fake = FakeHost()
    with running(fake.app()) as address:
        yield fake, address.replace("127.0.0.1", "localhost")


def test_a_redirect_to_an_allowed_host_is_followed_without_the_token(
    host: tuple[FakeHost, str], store: tuple[FakeHost, str]
) -> None:
    host[0].store = f"{store[1]}/free"
    images = ImageFetcher(host[1], "old", other_hosts=["localhost"])
    assert images.read("/moved") == b"free"
    assert store[0].requests == [("/free", "")]
    images.close()


@pytest.mark.parametrize("target", ["{store}/free", "http://169.254.169.254/latest/meta-data", "//localhost:1/free"])
def test_a_redirect_to_another_host_is_refused_and_names_the_option(
    host: tuple[FakeHost, str], store: tuple[FakeHost, str], target: str
) -> None:
    host[0].store = target.format(store=store[1])
    images = ImageFetcher(host[1], "old")
    with pytest.raises(BadImage, match=r"/moved: .*http://\S+.* --image-host"):
        images.read("/moved")
    assert store[0].requests == []
    images.close()


@pytest.mark.parametrize("path", ["/status/403", "/status/404", "/free", "/cut"])
def test_errors_of_a_store_do_not_contain_its_signed_url(
    host: tuple[FakeHost, str], store: tuple[FakeHost, str], path: str
) -> None:
    origin = "http://localhost:1" if path == "/cut" else store[1]
    host[0].store = f"{origin}{path}?X-Signature=hidden"
    images = ImageFetcher(host[1], "old", other_hosts=["localhost"], max_bytes=3)
    with pytest.raises(BadImage) as refused:
        images.read("/moved")
    assert str(refused.value).startswith(f"/moved (from {origin}): ")
    assert not any(part in str(refused.value) for part in (path, "hidden"))
    images.close()


@pytest.mark.parametrize("key", ["old", None])
def test_access_denied_by_a_store_does_not_blame_the_token(
    host: tuple[FakeHost, str], store: tuple[FakeHost, str], key: str | None
) -> None:
    host[0].store = f"{store[1]}/status/403"
    images = ImageFetcher(host[1], key, other_hosts=["localhost"])
    with pytest.raises(BadImage, match=r"403.*pre-signed URLs") as refused:
        images.read("/moved")
    assert "--api-key-file" not in str(refused.value)
    images.close()


def test_a_rejected_and_a_missing_token_have_different_messages(host: tuple[FakeHost, str]) -> None:
    messages = set()
    for key in ("wrong", None):
        images = ImageFetcher(host[1], key)
        with pytest.raises(BadImage, match=r"403.*--api-key-file") as refused:
            images.read("/status/403")
        messages.add(str(refused.value))
        images.close()
    assert len(messages) == 2


def test_a_redirect_to_another_scheme_is_refused(host: tuple[FakeHost, str]) -> None:
    host[0].store = "file:///etc/passwd"
    images = ImageFetcher(host[1], "old")
    with pytest.raises(BadImage):
        images.read("/moved")
    images.close()


def test_the_number_of_redirects_is_limited(host: tuple[FakeHost, str]) -> None:
    images = ImageFetcher(host[1], "old")
    assert images.read(f"/moved/{MAX_REDIRECTS}") == b"image"
    with pytest.raises(BadImage, match=f"{MAX_REDIRECTS} redirects"):
        images.read(f"/moved/{MAX_REDIRECTS + 1}")
    images.close()


def test_the_personal_token_does_not_follow_a_redirect(host: tuple[FakeHost, str], store: tuple[FakeHost, str]) -> None:
    host[0].refresh_moves_to = f"{store[1]}/thief"
    images = ImageFetcher(host[1], PERSONAL_TOKEN, other_hosts=["localhost"])
    with pytest.raises(BadImage, match="307"):
        images.read("/data/upload/1.png")
    assert store[0].requests == []
    images.close()


def test_other_hosts_are_contacted_only_if_allowed_and_without_the_token(host: tuple[FakeHost, str]) -> None:
    fake, address = host
    strict, permissive = (
        ImageFetcher("http://localhost:1", "old"),
        ImageFetcher(None, "old", other_hosts=["127.0.0.1"]),
    )
    with pytest.raises(BadImage, match=r"--image-host 127\.0\.0\.1"):
        strict.read(f"{address}/free")
    assert permissive.read(f"{address}/free") == b"free"
    assert fake.requests == [("/free", "")]
    strict.close()
    permissive.close()


@pytest.mark.parametrize("address", ["s3://bucket/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA"])
def test_other_url_schemes_are_refused(address: str) -> None:
    images = ImageFetcher("http://localhost:1")
    with pytest.raises(BadImage, match=urlsplit(address).scheme):
        images.read(address)
    images.close()


@pytest.mark.parametrize("address", ["http://localhost:99999/a.png", "http://[/a.png", "http://a\x00b/"])
def test_an_invalid_url_is_an_error_of_its_image(address: str) -> None:
    images = ImageFetcher("http://localhost:1")
    with pytest.raises(BadImage, match=re.escape(address)):
        images.read(address)
    images.close()


def test_local_files_are_read_only_from_their_folder(tmp_path: Path) -> None:
    (tmp_path / "shared" / "deep").mkdir(parents=True)
    (tmp_path / "shared" / "deep" / "a b.png").write_bytes(b"local")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "shared" / "link.png").symlink_to(tmp_path / "secret.png")
    images = ImageFetcher(None, folder=tmp_path / "shared")
    assert images.read("/data/local-files/?d=deep/a%20b.png") == b"local"
    for name in ("../secret.png", "%2e%2e/secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(BadImage):
            images.read(f"/data/local-files/?d={name}")
    images.close()


def test_an_image_above_the_size_limit_is_not_read_completely(host: tuple[FakeHost, str]) -> None:
    images = ImageFetcher(host[1], "old", max_bytes=3)
    with pytest.raises(BadImage, match="3 bytes"):
        images.read("/data/upload/1.png")
    images.close()


def test_uploads_without_a_label_studio_url_are_refused_and_name_the_option() -> None:
    images = ImageFetcher(None)
    with pytest.raises(BadImage, match="--label-studio"):
        images.read("/data/upload/1.png")
    images.close()
    with pytest.raises(ConfigError, match="--label-studio localhost:8080"):
        ImageFetcher("localhost:8080")


def test_a_label_studio_on_this_machine_is_reached_directly_and_others_through_the_proxy(
    host: tuple[FakeHost, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording_proxy() as proxy:
        for variable in ("http_proxy", "HTTPS_PROXY", "all_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        proxy.hosts["images.example"] = urlsplit(host[1]).netloc
        fetcher = ImageFetcher(host[1], "old", other_hosts=["images.example"])
        assert fetcher.read("/data/upload/1.png") == b"image"
        assert proxy.requests == []
        assert fetcher.read("http://images.example/free") == b"free"
        assert proxy.requests == ["GET images.example"]
        assert b"old" not in proxy.read
        proxy.status = 403
        with pytest.raises(BadImage, match="403"):
            fetcher.read("http://images.example/free")
        fetcher.close()


def test_a_token_is_not_sent_through_a_proxy_in_plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="HTTP_PROXY"):
        ImageFetcher("http://studio.example", "old")
    ImageFetcher("http://studio.example").close()
    ImageFetcher("https://studio.example", "old").close()
    monkeypatch.setenv("no_proxy", "studio.example")
    ImageFetcher("http://studio.example", "old").close()


def test_a_proxy_of_another_type_is_an_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    fetcher = ImageFetcher(None, other_hosts=["images.example"])
    with pytest.raises(BadImage, match="all_proxy"):
        fetcher.read("http://images.example/free")
    fetcher.close()
