"""Stand-ins for Google Cloud Storage and Azure Blob Storage on loopback: the requests that gcsfs and adlfs send for us.

They answer from a dict, with versions, ranges and the errors of the real services. They check no credentials.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET: Final = "photos"
DATE: Final = "Mon, 01 Jan 2024 00:00:00 GMT"


class CloudServer(ThreadingHTTPServer):
    """Objects by key; each write makes a new version.

    Attributes:
        failures: number of requests by key that are answered with 503.
    """

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.denied: set[str] = set()
        self.failures: dict[str, int] = {}
        self._version = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, key: str, content: bytes) -> None:
        self._version += 1
        self.objects[key] = self._version, content

    def get(self, key: str) -> bytes | None:
        return self.objects[key][1] if key in self.objects else None


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[CloudServer]:
    server = CloudServer(handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CloudServer

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def failure(self, key: str) -> int | None:
        """Returns the status of a request that fails on purpose."""
        if self.server.failures.get(key, 0) > 0:
            self.server.failures[key] -= 1
            return 503
        return 403 if key in self.server.denied else None

    def ranged(self, content: bytes, header: str) -> tuple[int, bytes, dict[str, str]]:
        """Returns status, body and headers of a range of an object."""
        given = self.headers.get(header)
        if given is None:
            return 200, content, {}
        start, _, end = given.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end) + 1 if end else len(content)]
        total = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
        return 206, part, {"Content_Range": total}

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


class GoogleHandler(_Handler):
    """The JSON API of Google Cloud Storage."""

    def handle_any(self) -> None:
        body, parts = self.body(), urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path = parts.path.partition("/storage/v1")[2].strip("/")
        bucket, _, rest = path.removeprefix("b/").partition("/")
        key = unquote(rest.partition("/")[2])
        if unquote(bucket) != BUCKET:
            self.error(404, "bucket")
        elif parts.path.startswith("/upload/"):
            self.upload(body, query)
        elif not rest:
            self.answer({"name": BUCKET, "kind": "storage#bucket"})
        elif not key:
            prefix = query.get("prefix", "")
            self.answer({"items": [self.row(name) for name in sorted(self.server.objects) if name.startswith(prefix)]})
        else:
            self.object(key, query)

    do_GET = do_POST = do_DELETE = do_PUT = handle_any

    def object(self, key: str, query: dict[str, str]) -> None:
        status = self.failure(key)
        if status is not None:
            self.error(status, "no")
        elif key not in self.server.objects or query.get("generation") not in (None, str(self.server.objects[key][0])):
            self.error(404, "object")
        elif self.command == "DELETE":
            del self.server.objects[key]
            self.send(204)
        elif query.get("alt") == "media":
            status, part, headers = self.ranged(self.server.objects[key][1], "Range")
            self.send(status, part, **headers)
        else:
            self.answer(self.row(key))

    def upload(self, body: bytes, query: dict[str, str]) -> None:
        if query.get("uploadType") == "multipart":
            _, metadata, content = body.split(b"--==0==", 3)[:3]
            name = json.loads(metadata.split(b"\n\n", 1)[1])["name"]
            self.store(name, content.split(b"\n\n", 1)[1].removesuffix(b"\n"))
        elif query.get("uploadType") == "resumable" and "upload_id" not in query:
            name = json.loads(body)["name"]
            self.send(200, b"", Location=f"{self.server.url}{self.path}&upload_id={name}")
        elif self.command == "DELETE":
            self.send(499)
        else:
            self.store(query["upload_id"], body)

    def store(self, key: str, content: bytes) -> None:
        status = self.failure(key)
        if status is not None:
            self.error(status, "no")
            return
        self.server.put(key, content)
        self.answer(self.row(key))

    def row(self, key: str) -> dict[str, Any]:
        version, content = self.server.objects[key]
        return {"name": key, "bucket": BUCKET, "size": str(len(content)), "generation": str(version)}

    def answer(self, value: dict[str, Any]) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def error(self, status: int, message: str) -> None:
        self.send(status, json.dumps({"error": {"code": status, "message": message}}).encode())


class AzureHandler(_Handler):
    """The REST API of Azure Blob Storage, below the account `devstoreaccount1`."""

    def handle_any(self) -> None:
        body, parts = self.body(), urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        _, _, path = unquote(parts.path).strip("/").partition("/")
        container, _, key = path.partition("/")
        status = self.failure(key)
        if status is not None:
            self.error(status, "ServerBusy" if status == 503 else "AuthorizationFailure")
        elif container != BUCKET:
            self.error(404, "ContainerNotFound")
        elif query.get("comp") == "list":
            self.listing(query.get("prefix", ""))
        elif not key:
            self.send(200, b"", ETag='"0"', Last_Modified=DATE, **_COMMON)
        elif self.command == "PUT":
            self.write(key, body, query)
        elif key not in self.server.objects:
            self.error(404, "BlobNotFound")
        elif self.command == "DELETE":
            del self.server.objects[key]
            self.send(202, b"", **_COMMON)
        else:
            self.read(key)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = handle_any

    def read(self, key: str) -> None:
        version, content = self.server.objects[key]
        header = "x-ms-range" if "x-ms-range" in self.headers else "Range"
        status, part, headers = self.ranged(content, header)
        headers |= {"ETag": f'"{version}"', "Last_Modified": DATE, "x_ms_blob_type": "BlockBlob", **_COMMON}
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(content))
        self.send(status, part, **headers)

    def write(self, key: str, body: bytes, query: dict[str, str]) -> None:
        assert "comp" not in query, "small blobs are written by one request"
        self.server.put(key, body)
        self.send(201, b"", ETag='"1"', Last_Modified=DATE, x_ms_request_server_encrypted="true", **_COMMON)

    def listing(self, prefix: str) -> None:
        rows = "".join(
            f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{DATE}</Last-Modified><Etag>{version}</Etag>"
            f"<Content-Length>{len(content)}</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob>"
            for name, (version, content) in sorted(self.server.objects.items())
            if name.startswith(prefix)
        )
        place = f'ServiceEndpoint="{self.server.url}/devstoreaccount1" ContainerName="{BUCKET}"'
        results = f"<EnumerationResults {place}><Blobs>{rows}</Blobs><NextMarker/></EnumerationResults>"
        body = f'<?xml version="1.0"?>{results}'
        self.send(200, body.encode(), Content_Type="application/xml", **_COMMON)

    def error(self, status: int, code: str) -> None:
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>no</Message></Error>'
        self.send(status, body.encode(), x_ms_error_code=code, Content_Type="application/xml", **_COMMON)


_COMMON: Final = {"x_ms_request_id": "1", "x_ms_version": "2021-08-06", "Date": DATE}
