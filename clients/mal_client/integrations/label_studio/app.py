"""The protocol of Label Studio for ML backends: /health, /setup, /predict, /versions and what it calls in passing.

The SDK for such backends, label-studio-ml, was last released to the package index in 2023 and pins Flask 1.1.2 and
Werkzeug 2.0.2; the protocol itself is a handful of JSON calls.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final, TypeVar

from aiohttp import web

from mal_client.errors import ClientError
from mal_client.integrations.label_studio.label_config import read_label_config
from mal_client.integrations.label_studio.predictor import Predictor
from mal_train.core.errors import InputError, MalError

HEALTH_S: Final = 0.8
"""Label Studio waits a second for /health."""

MAX_REQUEST_BYTES: Final = 64 * 1024 * 1024
"""Of one request: tasks come with all their annotations, brush masks among them as lists of numbers."""

REQUESTS_AT_ONCE: Final = 16
"""Requests that are worked on side by side; Label Studio sends one for each rectangle that somebody draws."""

REQUESTS_HELD: Final = 2 * REQUESTS_AT_ONCE
"""Requests in memory, worked on or waiting or still being received; what comes beyond is told when to come back."""

COME_BACK_S: Final = 5

RECEIVE_S: Final = 60.0
"""For the body of a request: a sender that has gone without a word would keep its place for good."""

HEALTH = "/health"

_log = logging.getLogger("mal_client.label_studio")

Answer = TypeVar("Answer")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(
    predictor: Predictor, credentials: str | None = None, max_request_bytes: int = MAX_REQUEST_BYTES
) -> web.Application:
    """The web application.

    Args:
        predictor: answers the requests.
        credentials: `user:password` that Label Studio has to show (Basic); None: nobody is asked.
        max_request_bytes: larger requests are refused (413) before they are read to their end.
    """
    backend = _Backend(predictor)
    app = web.Application(middlewares=[_answering(credentials)], client_max_size=max_request_bytes)
    app.router.add_get("/", backend.health)
    app.router.add_get(HEALTH, backend.health)
    app.router.add_post("/setup", backend.setup)
    app.router.add_post("/predict", backend.predict)
    app.router.add_get("/versions", backend.versions)
    app.router.add_post("/versions", backend.versions)
    for path in ("/webhook", "/train", "/delete"):
        app.router.add_post(path, backend.nothing_to_do)
    app.on_cleanup.append(backend.close)
    return app


class _Full(Exception):
    """There is no room for another request."""


class _Backend:
    """The handlers. The predictor blocks, so it is called on threads of these two pools."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._held = 0
        self._working = ThreadPoolExecutor(REQUESTS_AT_ONCE, "label-studio")
        # Apart, so that the answer to /health does not wait behind long predictions.
        self._asking = ThreadPoolExecutor(2, "label-studio-health")

    async def close(self, _: web.Application) -> None:
        """Gives up what waits; what runs ends with the predictor's client."""
        for pool in (self._working, self._asking):
            pool.shutdown(wait=False, cancel_futures=True)

    async def health(self, _: web.Request) -> web.StreamResponse:
        """Whether the labeling server answers."""
        version = await self._version_in_time()
        if version is None:
            return web.json_response({"error": "the labeling server does not answer"}, status=503)
        return web.json_response({"status": "UP", "model_class": "MaskAutoLabeler", "model_version": version})

    async def setup(self, request: web.Request) -> web.StreamResponse:
        """Wrong configurations are told here, when the backend is connected, and not at the first rectangle.

        The access token that comes along is not looked at: a key goes only where the command line says.
        """
        with self._room():
            content = await _received(request)

            def check() -> str:
                read_label_config(str(_object(content).get("schema", "")))
                return self._predictor.model_version()

            return web.json_response({"model_version": await self._in_thread(check)})

    async def predict(self, request: web.Request) -> web.StreamResponse:
        """Masks for the rectangles of some tasks."""
        with self._room():
            content = await _received(request)
            # The JSON too: masks as lists of numbers take seconds to read and to write.
            text = await self._in_thread(lambda: json.dumps(self._predictor.predict(_object(content))))
            return web.Response(text=text, content_type="application/json")

    async def versions(self, _: web.Request) -> web.StreamResponse:
        """The one that answers now."""
        with self._room():
            return web.json_response({"versions": [await self._in_thread(self._predictor.model_version)]})

    async def nothing_to_do(self, _: web.Request) -> web.StreamResponse:
        """Events of a project and the end of a connection: nothing is learned from what annotators draw here."""
        return web.json_response({})

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Of one request, from before its body is read. Raises _Full where too many are here."""
        if self._held >= REQUESTS_HELD:
            raise _Full
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    async def _in_thread(self, job: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._working, job)

    async def _version_in_time(self) -> str | None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(HEALTH_S):
                return await loop.run_in_executor(self._asking, self._predictor.model_version)
        except TimeoutError:
            pass
        except MalError as error:
            _log.warning("%s", error)
        return None


async def _received(request: web.Request) -> bytes:
    """The body. Raises HTTPRequestTimeout where it does not come."""
    try:
        async with asyncio.timeout(RECEIVE_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None


def _answering(credentials: str | None) -> Any:
    """What every request passes: the password on the way in, errors as JSON and as lines of the log on the way out."""

    @web.middleware
    async def answering(request: web.Request, handler: Handler) -> web.StreamResponse:
        if credentials is not None and request.path not in ("/", HEALTH) and not _shows(request, credentials):
            asked = {"WWW-Authenticate": 'Basic realm="mal-client"'}
            return web.json_response({"error": "credentials needed"}, status=401, headers=asked)
        try:
            return await handler(request)
        except _Full:
            again = {"Retry-After": str(COME_BACK_S)}
            return _refusal(request, f"{REQUESTS_HELD} requests are here already; come back later", 503, again)
        except web.HTTPRequestEntityTooLarge:
            limit = request.client_max_size
            return _refusal(request, f"a request of more than {limit} bytes; choose fewer tasks at once", 413)
        except web.HTTPException as error:
            # aiohttp's own: no such path, another method.
            return _refusal(request, HTTPStatus(error.status).phrase, error.status)
        except MalError as error:
            return _refusal(request, str(error), 503 if isinstance(error, ClientError) else 400)

    return answering


def _refusal(
    request: web.Request, message: str, status: int, headers: Mapping[str, str] = MappingProxyType({})
) -> web.Response:
    # Label Studio shows its users the status alone, so the reason stands in our log.
    _log.error("%s: %s", request.path, message)
    return web.json_response({"error": message}, status=status, headers=headers)


def _shows(request: web.Request, credentials: str) -> bool:
    scheme, _, packed = request.headers.get("Authorization", "").partition(" ")
    try:
        shown = base64.b64decode(packed, validate=True)
    except ValueError:
        return False
    return scheme.lower() == "basic" and hmac.compare_digest(shown, credentials.encode())


def _object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request is no JSON ({error})") from None
    if not isinstance(body, dict):
        raise InputError("the request is no JSON object")
    return body
