"""A small HTTP proxy on loopback that records what it was asked for, and what it could read."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CHUNK_BYTES = 1 << 16
POLL_S = 0.2


@dataclass
class RecordingProxy:
    """State of a proxy.

    Attributes:
        port: port on 127.0.0.1.
        status: with which it refuses requests; None connects them.
        hosts: names that it resolves to an address on loopback, HOST:PORT; others are unknown to it (502).
        requests: method and target of each request.
        read: bytes that passed through it, in either direction.
    """

    port: int
    status: int | None = None
    hosts: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    read: bytearray = field(default_factory=bytearray)

    @property
    def url(self) -> str:
        """The value for a variable."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def recording_proxy(status: int | None = None) -> Iterator[RecordingProxy]:
    """Runs a proxy in the block."""
    proxy = RecordingProxy(0, status)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(proxy))
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def _handler_of(proxy: RecordingProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_CONNECT(self) -> None:
            server = self._open(self.path)
            if server is not None:
                self.send_response(200)
                self.end_headers()
                self._relay(server)

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            server = self._open(parts.netloc.rpartition("@")[2])
            if server is None:
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
            kept = [f"{name}: {value}" for name, value in self.headers.items() if name.lower() != "connection"]
            head = "\r\n".join([f"{self.command} {path} HTTP/1.1", *kept, "Connection: close", "", ""]).encode()
            proxy.read += head
            server.sendall(head + body)
            self._relay(server)

        do_POST = do_GET

        def _open(self, target: str) -> socket.socket | None:
            proxy.requests.append(f"{self.command} {target}")
            proxy.read += str(self.headers).encode()
            self.close_connection = True
            host, _, port = proxy.hosts.get(target.partition(":")[0], "").partition(":")
            if proxy.status is not None or not port:
                self.send_error(proxy.status or 502)
                return None
            return socket.create_connection((host, int(port)))

        def _relay(self, server: socket.socket) -> None:
            ends = {self.connection: server, server: self.connection}
            with server:
                while True:
                    ready, _, _ = select.select(list(ends), [], [], POLL_S)
                    for end in ready:
                        data = end.recv(CHUNK_BYTES)
                        if not data:
                            return
                        proxy.read += data
                        ends[end].sendall(data)

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    return Handler
