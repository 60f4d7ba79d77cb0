"""Implements Label Studio's protocol for ML backends: /health, /setup, /predict, /versions and its event calls.

It does not use the SDK label-studio-ml, whose last release on the package index (2023) pins Flask 1.1.2 and Werkzeug
2.0.2; the protocol is a handful of JSON calls.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final, TypeVar

from aiohttp import web

from mal_client.errors import ClientError
from mal_client.integrations.label_studio.label_config import read_label_config
from mal_client.integrations.label_studio.predictor import Predictor, read_predict_request
from mal_client.web_guard import Forbidden, WebGuard
from mal_client.web_server import receiving
from mal_train.core.errors import InputError, MalError

HEALTH_TIMEOUT_S: Final = 0.8
"""Label Studio waits one second for /health."""

MAX_REQUEST_BYTES: Final = 64 * 1024 * 1024
"""Size limit of a request: tasks include all their annotations, with brush masks as lists of numbers."""

MAX_RECEIVED_BYTES: Final = 4 * MAX_REQUEST_BYTES
"""Size limit of all request bodies in memory together. Further requests get status 503 and Retry-After."""

MAX_RUNNING: Final = 16
"""Requests processed concurrently; Label Studio sends one for each rectangle that a user draws."""

MAX_REQUESTS: Final = 2 * MAX_RUNNING
"""Requests in memory: running, waiting or being received. Further requests get status 503 and Retry-After."""

RETRY_AFTER_S: Final = 5

HEALTH = "/health"

DEFAULT_GUARD: Final = WebGuard()

_log = logging.getLogger("mal_client.label_studio")

Result = TypeVar("Result")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(
    predictor: Predictor,
    credentials: str | None = None,
    guard: WebGuard = DEFAULT_GUARD,
    *,
    max_request_bytes: int = MAX_REQUEST_BYTES,
    max_received_bytes: int = MAX_RECEIVED_BYTES,
) -> web.Application:
    """Builds the web application.

    Args:
        predictor: computes the predictions.
        credentials: `user:password` that Label Studio must send (HTTP Basic); None accepts every request.
        guard: refuses the requests of web pages.
        max_request_bytes: size limit of a request; a larger one gets status 413 before it is read completely.
        max_received_bytes: size limit of all bodies in memory together.
    """
    backend = _Backend(predictor, max_received_bytes)
    app = web.Application(middlewares=[_middleware(credentials, guard)], client_max_size=max_request_bytes)
    app.router.add_get("/", backend.health)
    app.router.add_get(HEALTH, backend.health)
    app.router.add_post("/setup", backend.setup)
    app.router.add_post("/predict", backend.predict)
    app.router.add_get("/versions", backend.versions)
    app.router.add_post("/versions", backend.versions)
    for path in ("/webhook", "/train", "/delete"):
        app.router.add_post(path, backend.ignore)
    app.on_cleanup.append(backend.close)
    return app


class _TooManyRequests(Exception):
    """MAX_REQUESTS requests, or their largest permitted number of bytes, are in memory."""


class _Backend:
    """HTTP handlers. They call the predictor on threads, because it blocks."""

    def __init__(self, predictor: Predictor, max_received_bytes: int) -> None:
        self._predictor = predictor
        self._max_received_bytes = max_received_bytes
        self._requests = 0
        self._received_bytes = 0
        # JSON of 64 MiB can take a gigabyte once parsed. One at a time: the interpreter parses no two at once anyway.
        self._parsing = threading.Lock()
        self._workers = ThreadPoolExecutor(MAX_RUNNING, "label-studio")
        # A pool of its own, so that /health does not wait for long predictions.
        self._health_workers = ThreadPoolExecutor(2, "label-studio-health")

    async def close(self, _: web.Application) -> None:
        """Drops waiting requests; running ones end when the predictor's client is closed."""
        for pool in (self._workers, self._health_workers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def health(self, _: web.Request) -> web.StreamResponse:
        """Returns 200 if the labeling server responds, else 503."""
        version = await self._version_in_time()
        if version is None:
            return web.json_response({"error": "the labeling server does not respond"}, status=503)
        return web.json_response({"status": "UP", "model_class": "MaskAutoLabeler", "model_version": version})

    async def setup(self, request: web.Request) -> web.StreamResponse:
        """Validates the labeling configuration, so that errors appear when the backend is connected.

        Ignores the access token of the request: this backend sends only the token of its command line.
        """
        async with self._body(request) as body:

            def check() -> str:
                with self._parsing:
                    schema = str(_parse_object(body).get("schema", ""))
                read_label_config(schema)
                return self._predictor.model_version()

            return web.json_response({"model_version": await self._in_thread(check)})

    async def predict(self, request: web.Request) -> web.StreamResponse:
        """Returns masks for the rectangles of the tasks in the request."""
        async with self._body(request) as body:

            def predict() -> str:
                # JSON in the thread too: parsing and writing masks as lists of numbers takes seconds.
                with self._parsing:
                    parsed = read_predict_request(_parse_object(body))
                return json.dumps(self._predictor.predict(parsed))

            return web.Response(text=await self._in_thread(predict), content_type="application/json")

    async def versions(self, _: web.Request) -> web.StreamResponse:
        """Returns the only version, that of the served model."""
        with self._slot():
            return web.json_response({"versions": [await self._in_thread(self._predictor.model_version)]})

    async def ignore(self, _: web.Request) -> web.StreamResponse:
        """Accepts project events and disconnections, which have no effect: the backend does not train."""
        return web.json_response({})

    @asynccontextmanager
    async def _body(self, request: web.Request) -> AsyncIterator[bytes]:
        """Reads the body of a request, which counts until the end of the block.

        Raises:
            _TooManyRequests: MAX_REQUESTS, or the size limit of all bodies.
            HTTPException: as `receiving`.
            HTTPRequestEntityTooLarge: the body exceeds the size limit of a request.
        """
        with self._slot():
            received = bytearray()
            try:
                async with receiving():
                    async for chunk in request.content.iter_any():
                        # Counted as it arrives: a caller may state any length, or none.
                        received += chunk
                        self._received_bytes += len(chunk)
                        if len(received) > request.client_max_size:
                            raise web.HTTPRequestEntityTooLarge(request.client_max_size, len(received))
                        if self._received_bytes > self._max_received_bytes:
                            raise _TooManyRequests
                yield bytes(received)
            finally:
                self._received_bytes -= len(received)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        """Counts one request, from before its body is read. Raises _TooManyRequests at MAX_REQUESTS."""
        if self._requests >= MAX_REQUESTS:
            raise _TooManyRequests
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def _in_thread(self, job: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._workers, job)

    async def _version_in_time(self) -> str | None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                return await loop.run_in_executor(self._health_workers, self._predictor.model_version)
        except TimeoutError:
            pass
        except MalError as error:
            _log.warning("%s", error)
        return None


def _middleware(credentials: str | None, guard: WebGuard) -> Any:
    """Returns a middleware that authorizes requests and turns errors into JSON responses and log lines."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _authorize(request, credentials, guard)
            return await handler(request)
        except Forbidden as error:
            return _error(request, str(error), HTTPStatus.FORBIDDEN)
        except _TooManyRequests:
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            return _error(request, f"{MAX_REQUESTS} requests in progress; retry later", 503, headers)
        except web.HTTPRequestEntityTooLarge:
            limit = request.client_max_size
            return _error(request, f"request exceeds {limit} bytes; select fewer tasks at once", 413)
        except web.HTTPException as error:
            # Also raised by aiohttp: unknown path or wrong method.
            return _error(request, HTTPStatus(error.status).phrase, error.status, _challenge(error))
        except MalError as error:
            return _error(request, str(error), 503 if isinstance(error, ClientError) else 400)

    return middleware


def _error(
    request: web.Request, message: str, status: int, headers: Mapping[str, str] = MappingProxyType({})
) -> web.Response:
    # Label Studio shows its users only the status; the log has the message.
    _log.error("%s: %s", request.path, message)
    return web.json_response({"error": message}, status=status, headers=headers)


def _authorize(request: web.Request, credentials: str | None, guard: WebGuard) -> None:
    """Checks a request before its body is read.

    Raises:
        Forbidden: a web page may have caused the request.
        HTTPUnauthorized: credentials are missing or wrong; the health checks need none.
        HTTPUnsupportedMediaType: the body is not stated as JSON. A form of any web page is not, and needs no consent.
    """
    guard.check(request.headers)
    if credentials is not None and request.path not in ("/", HEALTH) and not _has(request, credentials):
        raise web.HTTPUnauthorized
    if request.can_read_body and request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType


def _challenge(error: web.HTTPException) -> Mapping[str, str]:
    return {"WWW-Authenticate": 'Basic realm="mal-client"'} if error.status == HTTPStatus.UNAUTHORIZED else {}


def _has(request: web.Request, credentials: str) -> bool:
    scheme, _, encoded = request.headers.get("Authorization", "").partition(" ")
    try:
        sent = base64.b64decode(encoded, validate=True)
    except ValueError:
        return False
    return scheme.lower() == "basic" and hmac.compare_digest(sent, credentials.encode())


def _parse_object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"request body: not valid JSON ({error})") from None
    if not isinstance(body, dict):
        raise InputError("request body: not a JSON object")
    return body
