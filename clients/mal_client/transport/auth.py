"""Sends a token with every call of a channel.

gRPC's call credentials do the same, but they refuse plaintext channels, including the local end of an SSH tunnel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

Call = Callable[[Any, Any], Any]


class BearerTokenInterceptor(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Interceptor of a blocking channel that adds a bearer token; the token is one word of printable ASCII."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation: Call, client_call_details: Any, request: Any) -> Any:
        """Adds the token to the metadata of the call."""
        return continuation(_with_token(client_call_details, self._token), request)

    def intercept_unary_stream(self, continuation: Call, client_call_details: Any, request: Any) -> Any:
        """Adds the token to the metadata of the call."""
        return continuation(_with_token(client_call_details, self._token), request)

    def intercept_stream_stream(self, continuation: Call, client_call_details: Any, request_iterator: Any) -> Any:
        """Adds the token to the metadata of the call."""
        return continuation(_with_token(client_call_details, self._token), request_iterator)


def aio_interceptors(token: str) -> Sequence[Any]:
    """Returns the interceptors of an asyncio channel: gRPC needs one object for each type of call."""
    return _AioUnaryInterceptor(token), _AioStreamInterceptor(token)


class _AioUnaryInterceptor(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation: Call, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_token(client_call_details, self._token), request)


class _AioStreamInterceptor(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_stream(self, continuation: Call, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_token(client_call_details, self._token), request)


def _with_token(details: Any, token: str) -> Any:
    metadata = grpc.aio.Metadata(*(details.metadata or ()), ("authorization", f"Bearer {token}"))
    return details._replace(metadata=metadata)
