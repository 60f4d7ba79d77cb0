"""Builds the asyncio server of gRPC, which serves calls of all unknown methods under one fixed name.

grpcio decodes the path of a call in its accept loop. A path that is not UTF-8, which every stranger may send, raises
UnicodeDecodeError there and shuts the server down (grpcio 1.66 to 1.85). Methods that are registered at the core have
no path to decode, so `register` registers every method, and `_AcceptLoop` serves all others without reading their path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc._cython import cygrpc  # type: ignore[attr-defined] # the accept loop has no public name

from mal_server.config.server import ServerConfig

UNKNOWN_METHOD = "/unknown"
"""Name of every method that the server does not have, for interceptors, metrics and logs."""

MAX_CALLS_PER_CONNECTION = 1000
"""Concurrent calls on one connection; further ones wait in the client.

More than the usual 100: a client that cancels calls waiting there gets no further response on that connection (seen
with grpcio 1.85), and an asyncio client may well run 200 calls at once. `connections.max_calls` bounds all connections
together, and a call that waits for its turn holds no more than READ_AHEAD_BYTES.
"""

READ_AHEAD_BYTES = 256 * 1024
"""Bytes of a message that gRPC takes before it is read; its own estimate of the line allows 4 MiB and more."""

KEEPALIVE_TIMEOUT_MS = 20_000

MIN_PING_INTERVAL_MS = 30_000
"""Least time between two pings of a client without other traffic. With gRPC's default, 5 min, the server would end the
connections of clients that look whether it is still there."""


class _CallDetails(NamedTuple):
    """The argument of a generic handler."""

    method: str
    invocation_metadata: tuple[()] = ()


def core_options(config: ServerConfig) -> tuple[tuple[str, int], ...]:
    """Returns the settings of gRPC's core."""
    limits, connections = config.limits, config.connections
    return (
        ("grpc.max_receive_message_length", limits.max_request_bytes),
        ("grpc.max_send_message_length", limits.max_response_bytes),
        ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", connections.max_connections),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", READ_AHEAD_BYTES),
        ("grpc.server_handshake_timeout_ms", _milliseconds(connections.handshake_s)),
        ("grpc.http2.settings_timeout", _milliseconds(connections.handshake_s)),
        ("grpc.max_connection_idle_ms", _milliseconds(connections.idle_s)),
        ("grpc.max_connection_age_ms", _milliseconds(connections.max_age_s)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(connections.age_grace_s)),
        ("grpc.keepalive_time_ms", _milliseconds(connections.keepalive_s)),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        # Otherwise a second server binds the same port silently and receives half of the calls.
        ("grpc.so_reuseport", 0),
    )


def _milliseconds(seconds: float) -> int:
    """Returns milliseconds that fit gRPC's 32 bits, in which the largest number means no limit."""
    return min(round(seconds * 1000), 2**31 - 1)


def build_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]], options: Sequence[tuple[str, Any]]
) -> grpc.aio.Server:
    """Returns a server without services and ports, for the running event loop."""
    if not hasattr(cygrpc.AioServer, "_make_request_call_future"):
        # grpcio before 1.66 decodes a path inside its call, which fails alone.
        return grpc.aio.server(interceptors=interceptors, options=options)
    with _accept_loop_replaced():
        server: Any = grpc.aio.server(interceptors=interceptors, options=options)
    server._server.interceptors = tuple(interceptors)
    built: grpc.aio.Server = server
    return built


def register(
    add_to_server: Callable[[Any, Any], None], servicer: object, service: ServiceDescriptor, server: grpc.aio.Server
) -> None:
    """Adds a service to a server and registers each of its methods at the core.

    Args:
        add_to_server: generated function that adds the service.
        servicer: implements the service.
        service: its descriptor.
        server: not started yet.
    """
    handlers = _HandlerMap(service)
    add_to_server(servicer, handlers)
    if hasattr(server, "add_registered_method_handlers"):
        server.add_registered_method_handlers(service.full_name, handlers.methods)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service.full_name, handlers.methods)])


class _HandlerMap:
    """Takes the place of a server in the generated functions; stubs of older generators register no methods.

    Attributes:
        methods: handlers by the name of their method.
    """

    def __init__(self, service: ServiceDescriptor) -> None:
        self._service = service
        self.methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """Takes the handlers that an older generator adds."""
        for handler in handlers:
            for method in self._service.methods:
                details: Any = _CallDetails(f"/{self._service.full_name}/{method.name}")
                found = handler.service(details)
                if found is not None:
                    self.methods[method.name] = found

    def add_registered_method_handlers(self, name: str, handlers: Mapping[str, Any]) -> None:
        """Takes the handlers that a newer generator adds a second time."""


@contextmanager
def _accept_loop_replaced() -> Iterator[None]:
    original = cygrpc.AioServer
    cygrpc.AioServer = _AcceptLoop
    try:
        yield
    finally:
        cygrpc.AioServer = original


class _AcceptLoop(cygrpc.AioServer):  # type: ignore[misc] # untyped
    """The accept loop of grpcio for registered methods, and another one for all others."""

    interceptors: tuple[Any, ...] = ()

    def _make_request_call_future(self, method: bytes | None) -> Any:
        """Returns a task that ends with the next call of a registered method; None: one that serves all others."""
        if method is not None:
            return super()._make_request_call_future(method)
        return asyncio.get_running_loop().create_task(self._serve_unknown())

    async def _serve_unknown(self) -> None:
        """Serves calls of unregistered methods until the server shuts down, which grpcio raises here."""
        loop = asyncio.get_running_loop()
        no_methods = cygrpc._MethodResolver([], {})
        running = set[asyncio.Task[None]]()
        while True:
            state = await self._request_call()
            call = cygrpc._handle_rpc(UNKNOWN_METHOD, no_methods, self.interceptors, state, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(call, state, loop, UNKNOWN_METHOD))
            running.add(task)
            task.add_done_callback(running.discard)
