"""A real S3 server on loopback (moto in a process of its own), behind a proxy that can fail on demand.

    def test_x(s3: S3) -> None:
        s3.put("boxes.json", b"...")
        s3.fail("boxes.json", status=503, times=2)
        read_bytes(s3.address("boxes.json"), 100)

The fixture `s3` is registered in `tests/conftest.py`. It sets the environment of this process, which children inherit.
"""

from __future__ import annotations

import http.client
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from mal_train.core.storage import object_store, retry, web_store
from mal_train.distributed.launch import free_port
from tests import tools

ACCESS_KEY = "AKIATESTONLY"
SECRET_KEY = "aws-secret-8Gh2Pw5Xk9"
BUCKET = "photos"
START_S = 120.0

Fault = Callable[["_Handler"], bool]
"""Acts on a request; returns True if it answered."""


class S3:
    """The server as tests see it: one bucket, and faults by key.

    Attributes:
        requests: "METHOD KEY" of every request through the proxy.
        most_at_once: largest number of requests that were open at once.
    """

    def __init__(self, moto: str) -> None:
        self.requests: list[str] = []
        self.most_at_once = 0
        self._open = 0
        self.bucket = BUCKET
        self._moto = moto
        config = tools.module("botocore.config").Config(proxies={})
        self._client = tools.module("boto3").client(
            "s3",
            endpoint_url=f"http://{moto}",
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=config,
        )
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.s3 = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def address(self, key: str) -> str:
        """Returns s3://BUCKET/KEY."""
        return f"s3://{self.bucket}/{key}"

    def put(self, key: str, content: bytes) -> None:
        """Writes an object, beside the proxy."""
        self._client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Writes all files of a folder; returns the address of the prefix."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return self.address(prefix)

    def get(self, key: str) -> bytes | None:
        """Returns an object, beside the proxy; None if there is none."""
        if key not in self.names():
            return None
        content: bytes = self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return content

    def names(self) -> list[str]:
        """Returns the keys of all objects."""
        return sorted(row["Key"] for row in self._client.list_objects_v2(Bucket=self.bucket).get("Contents", []))

    def unfinished_uploads(self) -> int:
        """Returns the number of uploads that were begun and neither completed nor aborted."""
        return len(self._client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", []))

    def fail(self, key: str, *, status: int, times: int = 1 << 30, code: str = "", method: str = "") -> None:
        """Answers requests for a key with an error."""
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode() if code else b""

        def answer(handler: _Handler) -> bool:
            handler.answer(status, {"Content-Type": "application/xml"}, body)
            return True

        self._add(key, answer, times, method)

    def delay(self, key: str, seconds: float, times: int = 1 << 30) -> None:
        """Answers requests for a key late."""

        def wait(_: _Handler) -> bool:
            time.sleep(seconds)
            return False

        self._add(key, wait, times)

    def cut(self, key: str, times: int = 1 << 30) -> None:
        """Closes the connection in the middle of the body."""

        def answer(handler: _Handler) -> bool:
            status, headers, body = handler.forward()
            handler.answer(status, headers, body[: len(body) // 2], length=len(body))
            handler.close_connection = True
            return True

        self._add(key, answer, times)

    def before(self, key: str, action: Callable[[], object], *, skip: int = 0, method: str = "GET") -> None:
        """Runs an action once, before the request for a key that follows `skip` others."""
        seen = 0

        def act(_: _Handler) -> bool:
            nonlocal seen
            seen += 1
            if seen == skip + 1:
                action()
            return False

        self._add(key, act, 1 << 30, method)

    def disturb(self, rng: random.Random, rate: float) -> None:
        """Refuses, cuts and delays requests for any key at random."""

        def act(handler: _Handler) -> bool:
            with self._lock:
                kind = rng.choice(("refuse", "cut", "delay")) if rng.random() < rate else ""
            if kind == "refuse":
                handler.answer(503, {"Content-Type": "application/xml"}, b"<Error><Code>SlowDown</Code></Error>")
            elif kind == "cut" and handler.command == "GET":
                status, headers, body = handler.forward()
                handler.answer(status, headers, body[: len(body) // 2], length=len(body))
                handler.close_connection = True
            elif kind == "delay":
                time.sleep(0.05)
            return kind == "refuse" or (kind == "cut" and handler.command == "GET")

        with self._lock:
            self._faults.append(act)

    def require_credentials(self, *, is_required: bool = True) -> None:
        """Lets the server check access keys from now on."""
        count = b"0" if is_required else b"inf"
        assert forward(self._moto, "POST", "/moto-api/reset-auth", {}, count)[0] == 200

    def reset(self) -> None:
        """Deletes all objects and faults, and makes an empty bucket."""
        assert forward(self._moto, "POST", "/moto-api/reset", {}, b"")[0] == 200
        self.require_credentials(is_required=False)
        self._client.create_bucket(Bucket=self.bucket)
        with self._lock:
            self._faults.clear()
            self.requests.clear()
            self.most_at_once = 0

    def close(self) -> None:
        """Ends the proxy."""
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a request as open during the block."""
        with self._lock:
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    def faults(self) -> list[Fault]:
        """Returns the faults, oldest first."""
        with self._lock:
            return list(self._faults)

    def environment(self) -> dict[str, str]:
        """Returns the variables by which libraries find the server and the credentials."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def _add(self, key: str, fault: Fault, times: int, method: str = "") -> None:
        left = times

        def limited(handler: _Handler) -> bool:
            nonlocal left
            if handler.key != key or (method and handler.command != method):
                return False
            with self._lock:
                if left <= 0:
                    return False
                left -= 1
            return fault(handler)

        with self._lock:
            self._faults.append(limited)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    s3: S3

    def handle_error(self, *_: object) -> None:
        """Prints nothing: clients are killed on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.body: bytes | None = None

    @property
    def key(self) -> str:
        """Key of the object that is asked for."""
        return unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}").lstrip("/")

    def handle_any(self) -> None:
        s3: S3 = self.server.s3
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else None
        s3.requests.append(f"{self.command} {self.key}")
        with s3.counted(), suppress(ConnectionError):
            if not any(fault(self) for fault in s3.faults()):
                self.answer(*self.forward())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def forward(self) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        return forward(self.server.s3._moto, self.command, self.path, headers, self.body)

    def answer(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", str(length) if length is not None else size)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


def forward(
    server: str, method: str, path: str, headers: dict[str, str], body: bytes | None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(server, timeout=60)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


@contextmanager
def moto_server(log: Path) -> Iterator[str]:
    """Runs moto's server during the block; yields HOST:PORT."""
    tools.module("moto")
    address = f"127.0.0.1:{free_port()}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", address.partition(":")[2]],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_ready(address, process, log)
        yield address
    finally:
        process.kill()
        process.wait()


def wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        with suppress(OSError):
            if forward(address, "GET", "/moto-api/data.json", {}, None)[0] == 200:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """Server and proxy of the session; use `s3`, which is empty for each test."""
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as address:
        server = S3(address)
        yield server
        server.close()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """S3 server with an empty bucket, and an environment that leads to it."""
    s3_server.reset()
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "http_proxy", "HTTP_PROXY", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    object_store.forget_connections()
    yield s3_server
    object_store.forget_connections()


@contextmanager
def private_temporary_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A context in which temporary files lie in `folder`, and retries pause for a millisecond at first.

    At its end nothing of this project may be left in the folder.
    """
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    web_store.close_sessions()
    # Torch and its loaders leave files of their own.
    assert [path for path in folder.iterdir() if "mal" in path.name] == []
