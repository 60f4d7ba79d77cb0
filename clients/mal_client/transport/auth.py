"""Shows a token with every call of a channel.

gRPC's own call credentials would do, but they refuse plaintext, and so also the near end of a tunnel on this machine.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

Call = Callable[[Any, Any], Any]


class Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Interceptor of a blocking channel; the token is one word of printable ASCII."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation: Call, client_call_details: Any, request: Any) -> Any:
        """Sends the call with the token."""
        return continuation(_shown(client_call_details, self._token), request)

    def intercept_unary_stream(self, continuation: Call, client_call_details: Any, request: Any) -> Any:
        """Sends the call with the token."""
        return continuation(_shown(client_call_details, self._token), request)

    def intercept_stream_stream(self, continuation: Call, client_call_details: Any, request_iterator: Any) -> Any:
        """Sends the call with the token."""
        return continuation(_shown(client_call_details, self._token), request_iterator)


def aio_bearers(token: str) -> Sequence[Any]:
    """Interceptors of an asyncio channel: one for each kind of call, since gRPC uses an object for one kind only."""
    return _AioUnaryBearer(token), _AioStreamBearer(token)


class _AioUnaryBearer(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation: Call, client_call_details: Any, request: Any) -> Any:
        return await continuation(_shown(client_call_details, self._token), request)


class _AioStreamBearer(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_stream(self, continuation: Call, client_call_details: Any, request: Any) -> Any:
        return await continuation(_shown(client_call_details, self._token), request)


def _shown(details: Any, token: str) -> Any:
    metadata = grpc.aio.Metadata(*(details.metadata or ()), ("authorization", f"Bearer {token}"))
    return details._replace(metadata=metadata)
