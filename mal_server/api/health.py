"""grpc.health.v1 with bounds, because strangers may call it: short names, and a limited number of watches."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mal_server.errors import InvalidRequest

MAX_NAME_BYTES = 256
MAX_WATCHES = 256
"""Watches kept at once; one more ends the oldest with UNIMPLEMENTED.

gRPC's clients then take the server for healthy. After any other status they would watch again at once and end the next
one, without end."""

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # untyped
    """Health states by the name of their service; an unknown name is not kept."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {}
        self._watches: dict[_Watch, None] = {}
        self._is_draining = False

    def set(self, service: str, state: int) -> None:
        """Sets the state of a service, and tells it to those that watch. Ignored while draining."""
        if not self._is_draining:
            self._states[service] = state
            self._notify(service)

    def forget(self, service: str) -> None:
        """Removes a service, for example an unloaded model. Ignored while draining."""
        if not self._is_draining and self._states.pop(service, None) is not None:
            self._notify(service)

    def drain(self) -> None:
        """Sets every service to NOT_SERVING for good."""
        for service in self._states:
            self.set(service, NOT_SERVING)
        self._is_draining = True

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """Returns the state of a service. Errors: NOT_FOUND for an unknown one, INVALID_ARGUMENT for a long name."""
        state = self._states.get(_checked_name(request))
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """Sends the state of a service now and after each change; SERVICE_UNKNOWN while there is no such service.

        Limits: MAX_WATCHES watches; one more ends the oldest with UNIMPLEMENTED.
        """
        watch = _Watch(_checked_name(request))
        if len(self._watches) >= MAX_WATCHES:
            oldest = next(iter(self._watches))
            self._end(oldest)
        self._watches[watch] = None
        sent: int | None = None
        try:
            while watch in self._watches:
                state = self._states.get(watch.service, SERVICE_UNKNOWN)
                if state != sent:
                    sent = state
                    yield health_pb2.HealthCheckResponse(status=state)
                    continue
                watch.changed.clear()
                await watch.changed.wait()
        finally:
            self._watches.pop(watch, None)
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"more than {MAX_WATCHES} watches; use Check")

    def _notify(self, service: str) -> None:
        for watch in self._watches:
            if watch.service == service:
                watch.changed.set()

    def _end(self, watch: "_Watch") -> None:
        del self._watches[watch]
        watch.changed.set()


class _Watch:
    """One running Watch.

    Attributes:
        service: name of the watched service.
        changed: set when the state of the service may have changed, or the watch ends.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.changed = asyncio.Event()


def _checked_name(request: health_pb2.HealthCheckRequest) -> str:
    name = str(request.service)
    size = len(name.encode())
    if size > MAX_NAME_BYTES:
        raise InvalidRequest([("service", f"{size} bytes; a name has at most {MAX_NAME_BYTES}")])
    return name
