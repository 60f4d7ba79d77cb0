"""Serves metrics by HTTP, with a bounded number of connections, each for a bounded time."""

import socket
import socketserver
import threading
import time
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler

from mal_train.core.addresses import format_address
from mal_train.core.errors import ConfigError

MAX_CONNECTIONS = 16
"""Connections served at once; one more ends the oldest."""

CONNECTION_S = 10.0
"""Time for a request and its response in seconds."""


class MetricsPort:
    """Serves metrics on http://host:port/metrics, each connection in a thread of its own.

    Attributes:
        port: the real port if 0 was given.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        try:
            self._server = _server_class(host, port)((host, port), MetricsHandler.factory(registry))
        except OSError as error:
            raise ConfigError(
                f"metrics: cannot listen on {format_address(host, port)}: {error.strerror}; choose another metrics.port"
            ) from None
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="mal-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving and ends all threads."""
        self._server.shutdown()
        self._server.end_all()
        self._server.server_close()
        self._thread.join()


def _server_class(host: str, port: int) -> "type[_Server]":
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return type("_ServerOfFamily", (_Server,), {"address_family": family})


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS
    daemon_threads = False  # `server_close` waits for them

    def __init__(self, *args: Any) -> None:
        self._lock = threading.Lock()
        self._begun: dict[socket.socket, float] = {}
        """Open connections and their start, the oldest first."""
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for a connection; ends the oldest if there are too many."""
        with self._lock:
            if len(self._begun) >= MAX_CONNECTIONS:
                self._end(next(iter(self._begun)))
            self._begun[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Ends connections that are too old; called twice a second."""
        now = time.monotonic()
        with self._lock:
            for connection in [one for one, begun in self._begun.items() if now - begun > CONNECTION_S]:
                self._end(connection)

    def end_all(self) -> None:
        """Ends all connections."""
        with self._lock:
            for connection in list(self._begun):
                self._end(connection)

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection that is done."""
        with self._lock:
            self._begun.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores the error of a connection, which its client has broken or which has ended here."""

    def _end(self, connection: socket.socket) -> None:
        """Ends the reads and writes of a connection; its thread closes it."""
        del self._begun[connection]
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the client was faster
