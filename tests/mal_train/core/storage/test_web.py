"""Files on web servers on loopback: sizes, redirects, ranges, certificates, and hosts that are not allowed."""

import errno
import os
import resource
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme

from mal_train.core.errors import OutputError, StorageError, StoreUnreachable
from mal_train.core.storage.hosts import AllowedHosts
from mal_train.core.storage.reading import local_copy, open_random, read_bytes, store_of
from mal_train.core.storage.retry import ATTEMPTS
from mal_train.core.storage.writing import check_writable, write_output
from mal_train.distributed.launch import free_port
from tests.proxy import recording_proxy

pytest.importorskip("fsspec")
LIMIT = 1000
SIGNATURE = "X-Amz-Signature=0f3c9a"

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Serves `files`, with ranges and ETags, or calls the function that stands for a path."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.headers.append(dict(self.headers.items()))
        entry = self.server.files.get(self.path.partition("?")[0])
        if entry is None:
            self.send(404, b"no")
        elif callable(entry):
            entry(self)
        else:
            self.send_file(entry)

    def send_file(self, content: bytes) -> None:
        range_header = self.headers.get("Range")
        etag = {"ETag": f'"{hash(content)}"'}
        if range_header is None or not content:
            self.send(200, content, etag)
            return
        start, end = (int(part) for part in range_header.removeprefix("bytes=").split("-"))
        total = {"Content-Range": f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"}
        self.send(206, content[start : end + 1], etag | total)

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


class Server(ThreadingHTTPServer):
    """A web server; `files` maps paths to contents or functions."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes | Answer] = {}
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.scheme = "http"
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.scheme = "https"

    def handle_error(self, *_: object) -> None:
        """Prints nothing: clients of these tests leave early."""

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.server_address[1]}{path}"


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(context)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def web() -> Iterator[Server]:
    with serving() as server:
        yield server


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Lets this process write no longer files: the same errors as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def reason_of(address: str, hosts: AllowedHosts | None = None, max_bytes: int = LIMIT) -> str:
    with pytest.raises(StorageError) as caught:
        read_bytes(address, max_bytes, hosts=hosts)
    assert SIGNATURE not in str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value.reason


def redirect(target: str, status: int = 302) -> Answer:
    return lambda handler: handler.send(status, b"", {"Location": target})


def without_length(body: bytes) -> Answer:
    def send(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(body), 100):
            part = body[start : start + 100]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    return send


def test_file_is_read_by_one_request_without_credentials(web: Server) -> None:
    web.files["/a%20b.jpg"] = b"pixels"
    assert read_bytes(web.url(f"/a%20b.jpg?{SIGNATURE}"), LIMIT) == b"pixels"
    assert web.requests == [f"/a%20b.jpg?{SIGNATURE}"]
    assert {"Authorization", "Cookie"}.isdisjoint(web.headers[0])


def test_encoded_address_is_sent_as_it_stands(web: Server) -> None:
    web.files["/a%2Fb%41"] = b"x"
    assert read_bytes(web.url("/a%2Fb%41?k=%2B%20+"), LIMIT) == b"x"
    assert web.requests == ["/a%2Fb%41?k=%2B%20+"]


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "NOT_FOUND"), (410, "NOT_FOUND"), (401, "ACCESS_DENIED"), (403, "ACCESS_DENIED")]
)
def test_refused_file(web: Server, status: int, reason: str) -> None:
    web.files["/a"] = lambda handler: handler.send(status)
    assert reason_of(web.url(f"/a?{SIGNATURE}")) == reason
    assert len(web.requests) == 1


def test_busy_server_is_asked_again(web: Server) -> None:
    web.files["/a"] = lambda handler: handler.send(503)
    with pytest.raises(StoreUnreachable) as caught:
        read_bytes(web.url(f"/a?{SIGNATURE}"), LIMIT)
    assert SIGNATURE not in str(caught.value)
    assert len(web.requests) == ATTEMPTS


def test_server_that_is_not_there() -> None:
    with pytest.raises(StoreUnreachable) as caught:
        read_bytes(f"http://127.0.0.1:{free_port()}/a?{SIGNATURE}", LIMIT)
    assert SIGNATURE not in str(caught.value)


def test_host_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(StoreUnreachable):
        read_bytes("https://images.example/a", LIMIT)


def test_stated_size_is_checked_before_the_body(web: Server) -> None:
    web.files["/a"] = lambda handler: handler.send(200, b"x", {"Content-Length": str(LIMIT + 1)})
    assert reason_of(web.url("/a")) == "TOO_LARGE"


def test_size_that_is_not_stated_is_limited_while_reading(web: Server) -> None:
    web.files["/fits"] = without_length(bytes(LIMIT))
    web.files["/large"] = without_length(bytes(LIMIT + 1))
    assert read_bytes(web.url("/fits"), LIMIT) == bytes(LIMIT)
    assert reason_of(web.url("/large")) == "TOO_LARGE"
    with local_copy(web.url("/fits")) as path:
        assert path.read_bytes() == bytes(LIMIT)


def test_incomplete_body_is_read_again(web: Server) -> None:
    def cut(handler: Handler) -> None:
        if len(web.requests) < 3:
            handler.send(200, b"01", {"Content-Length": "4", "Connection": "close"})
            handler.close_connection = True
        else:
            handler.send(200, b"0123")

    web.files["/a"] = cut
    assert read_bytes(web.url("/a"), LIMIT) == b"0123"
    web.requests.clear()
    with local_copy(web.url("/a")) as path:
        assert path.read_bytes() == b"0123"


def test_redirects_are_followed_within_bounds(web: Server) -> None:
    web.files |= {"/a": redirect("/b"), "/b": redirect(web.url("/c"), 307), "/c": b"x", "/loop": redirect("/loop")}
    assert read_bytes(web.url("/a"), LIMIT) == b"x"
    assert reason_of(web.url("/loop")) == "FAILED"
    assert web.requests.count("/loop") == 6


def test_redirect_of_an_address_of_the_user_leads_to_public_hosts_only(web: Server) -> None:
    with serving() as other:
        other.files["/secret"] = b"credentials of this machine"
        web.files["/a"] = redirect(other.url("/secret", "localhost"))
        assert reason_of(web.url("/a")) == "HOST_NOT_ALLOWED"
        for target in ("http://169.254.169.254/latest", "https://10.0.0.1/", "file:///etc/passwd", "https://[::1]/"):
            web.files["/a"] = redirect(target)
            assert reason_of(web.url("/a")) == "HOST_NOT_ALLOWED"
        assert other.requests == []


def test_redirect_gets_no_user_and_password(web: Server) -> None:
    web.files |= {"/a": redirect(web.url("/b", "me:pw@127.0.0.1")), "/b": b"x"}
    assert read_bytes(web.url("/a", "user:word@127.0.0.1"), LIMIT) == b"x"
    assert "Authorization" in web.headers[0]
    assert "Authorization" not in web.headers[1]


def test_only_allowed_hosts_are_contacted(web: Server) -> None:
    web.files["/a"] = b"x"
    named = AllowedHosts.parse(["127.0.0.1"], "x")
    assert read_bytes(web.url("/a"), LIMIT, hosts=named) == b"x"
    assert reason_of(web.url("/a", "localhost"), named) == "HOST_NOT_ALLOWED"
    public = AllowedHosts.parse(["*"], "x")
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]"):
        assert reason_of(web.url("/a", host).replace("http:", "https:"), public) in ("HOST_NOT_ALLOWED", "FAILED")
    assert len(web.requests) == 1


@pytest.mark.parametrize("name", ["münchen.example", "xn--mnchen-3ya.example"])
def test_named_host_with_other_letters_is_contacted(web: Server, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
    web.files["/a"] = b"x"
    assert read_bytes(web.url("/a", name), LIMIT) == b"x"
    assert read_bytes(web.url("/a", name), LIMIT, hosts=AllowedHosts.parse([name], "x")) == b"x"


def test_name_that_resolves_to_an_inner_address_is_refused(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
    hosts = AllowedHosts(any_public=True)
    assert reason_of(web.url("/a", "public.example").replace("http:", "https:"), hosts) == "HOST_NOT_ALLOWED"
    assert web.requests == []


def test_files_on_this_machine_are_read_directly_and_named_hosts_through_the_proxy(
    web: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files["/a"] = b"x"
    named = AllowedHosts.parse(["images.example"], "--hosts")
    with recording_proxy() as proxy:
        for variable in ("http_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(variable, proxy.url)
        assert read_bytes(web.url("/a"), LIMIT) == b"x"
        assert proxy.requests == []
        proxy.hosts["images.example"] = f"127.0.0.1:{web.server_address[1]}"
        assert read_bytes("http://images.example/a", LIMIT, hosts=named) == b"x"
        assert read_bytes("http://images.example/a", LIMIT) == b"x"
        assert proxy.requests == ["GET images.example"] * 2
        # A password would be read there.
        assert reason_of("http://me:word@images.example/a", named) == "FAILED"
        assert len(proxy.requests) == 2
        proxy.status = 403
        with pytest.raises(StorageError, match=f"HTTPS_PROXY={proxy.url}"):
            read_bytes("https://images.example/a", LIMIT, hosts=named)
        # The address of another host must be public, which only a direct connection can check.
        count = len(proxy.requests)
        with pytest.raises(StoreUnreachable, match="without the proxy HTTPS_PROXY"):
            read_bytes("https://unnamed.invalid/a", LIMIT, hosts=AllowedHosts(any_public=True))
        assert len(proxy.requests) == count
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(StorageError, match="http_proxy=socks5"):
        read_bytes("http://images.example/a", LIMIT, hosts=named)


def test_certificate_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with serving(context) as server:
        server.files["/a"] = b"x"
        assert reason_of(server.url("/a")) == "FAILED"
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        # Another rule has a session of its own, which reads the variable.
        hosts = AllowedHosts(frozenset({"127.0.0.1"}))
        assert read_bytes(server.url("/a"), LIMIT, hosts=hosts) == b"x"
        server.files["/b"] = redirect(server.url("/a").replace("https:", "http:"))
        assert reason_of(server.url("/b"), hosts) == "HOST_NOT_ALLOWED"


def test_random_access(web: Server) -> None:
    content = os.urandom(500)
    web.files["/a.parquet"] = content
    with open_random(web.url("/a.parquet")) as file:
        file.seek(-20, os.SEEK_END)
        assert file.read() == content[-20:]
        file.seek(100)
        assert file.read(10) == content[100:110]
        web.files["/a.parquet"] = os.urandom(500)
        with pytest.raises(StorageError) as caught:
            file.read(10)
    assert caught.value.reason == "CHANGED"


@pytest.mark.parametrize("answer", [lambda handler: handler.send(200, bytes(50)), without_length(bytes(50))])
def test_random_access_needs_ranges(web: Server, answer: Answer) -> None:
    web.files["/a"] = answer
    with pytest.raises(StorageError) as caught, open_random(web.url("/a")) as file:
        file.read(10)
    assert caught.value.reason == "FAILED"


def test_a_part_that_was_not_asked_for_is_not_the_file(web: Server) -> None:
    web.files["/a"] = lambda handler: handler.send(206, b"01", {"Content-Range": "bytes 0-1/4"})
    assert reason_of(web.url("/a")) == "FAILED"


def test_another_range_than_the_one_asked_for_is_refused(web: Server) -> None:
    headers = {"Content-Range": "bytes 0-1/10", "ETag": '"1"'}
    web.files["/a"] = lambda handler: handler.send(206, b"01", headers)
    with open_random(web.url("/a")) as file:
        assert file.read(2) == b"01"
        with pytest.raises(StorageError) as caught:
            file.read(2)
    assert caught.value.reason == "FAILED"


def test_random_access_needs_a_version(web: Server) -> None:
    web.files["/a"] = lambda handler: handler.send(206, b"0", {"Content-Range": "bytes 0-0/10"})
    with pytest.raises(StorageError) as caught:
        open_random(web.url("/a"))
    assert caught.value.reason == "FAILED"


def test_web_servers_are_read_only(web: Server) -> None:
    with pytest.raises(OutputError):
        check_writable(web.url("/out"))
    with pytest.raises(OutputError), write_output(web.url("/out")) as file:
        file.write(b"x")
    with pytest.raises(StorageError):
        list(store_of(web.url("/")).names(web.url("/")))


def test_a_disk_without_space_is_not_a_limit(web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    web.files["/a.json"] = bytes(100)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=99))
    with pytest.raises(OutputError), local_copy(web.url("/a.json")):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_an_error_of_the_disk_is_no_refusal_of_the_server(
    web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    web.files["/a.json"] = bytes(size)
    with files_of_at_most(500), pytest.raises(OutputError) as caught, local_copy(web.url("/a.json")):
        pass
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
