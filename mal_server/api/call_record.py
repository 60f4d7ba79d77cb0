"""Metrics, log line and status of one call."""

import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any, NoReturn

import grpc

from mal_server.api.serialization.status import reason_of, retry_after, status_of
from mal_server.ops.logging import fields
from mal_server.ops.metrics import Metrics

log = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
ID_KEY = "x-request-id"
MAX_ID_CHARS = 64
ID = re.compile(r"[0-9A-Za-z-]+")

GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}


class CallRecord:
    """Records one call. The trailers have its request id, so users can find its line in the log.

    Args:
        method: "/package.Service/Method", one that the server has, or UNKNOWN_METHOD.
        metadata: of the call.
        caller: name of its token; empty if it needs none.
        metrics: counts calls; None: the call is neither counted nor logged.
    """

    def __init__(
        self, method: str, metadata: Sequence[tuple[str, str | bytes]], caller: str, metrics: Metrics | None
    ) -> None:
        self._method = method.removeprefix("/")
        self._id = _request_id(metadata)
        self._caller = caller
        self._metrics = metrics
        self._started = time.perf_counter()

    def begin(self, context: Any) -> None:
        """Sets the trailers of a call that succeeds."""
        context.set_trailing_metadata(((ID_KEY, self._id),))

    def end(self, code: str, reason: str = "") -> None:
        """Counts and logs the end of the call."""
        if self._metrics is None:
            return
        duration_s = time.perf_counter() - self._started
        self._metrics.call_ended(self._method, code, duration_s)
        caller = {"caller": self._caller} if self._caller else {}
        cause = {"reason": reason} if reason else {}
        took_ms = round(duration_s * 1000, 1)
        log.info(
            "call",
            extra=fields(method=self._method, code=code, took_ms=took_ms, request_id=self._id, **caller, **cause),
        )

    async def abort(self, context: Any, error: Exception) -> NoReturn:
        """Ends the call with the status of an error."""
        status = status_of(error)
        code, reason = GRPC_CODES[status.code], reason_of(error)
        if self._metrics is not None:
            self._metrics.rejected(reason)
        self.end(code.name, reason)
        trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString()), (ID_KEY, self._id)]
        retry_s = retry_after(status)
        if retry_s is not None:
            trailers.append((PUSHBACK_KEY, str(round(retry_s * 1000))))
        await context.abort(code, status.message, trailing_metadata=tuple(trailers))
        raise AssertionError("abort returned")


def _request_id(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """Returns the request id of the client if it is safe to send back and to log, otherwise a new one."""
    given = next((value for key, value in metadata if key == ID_KEY), "")
    # gRPC cannot send a trailer that is not ASCII.
    if isinstance(given, str) and len(given) <= MAX_ID_CHARS and ID.fullmatch(given):
        return given
    return uuid.uuid4().hex[:16]
