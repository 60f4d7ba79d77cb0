"""The protocol of Label Studio for ML backends: /health, /setup, /predict, /versions and what it calls in passing.

The SDK for such backends, label-studio-ml, was last released to the package index in 2023 and pins Flask 1.1.2 and
Werkzeug 2.0.2; the protocol itself is a handful of JSON calls.
"""

from __future__ import annotations

import base64
import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
from mal_client.errors import ClientError
from mal_client.integrations.label_studio.label_config import read_label_config
from mal_client.integrations.label_studio.predictor import Predictor
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mal_train.errors import InputError, MalError

HEALTH_S: Final = 0.8
"""Label Studio waits a second for /health."""

_log = logging.getLogger("mal_client.label_studio")

Handler = Callable[[Request], Awaitable[Response]]


def build_app(predictor: Predictor, credentials: str | None = None) -> Starlette:
    """The web application.

    Args:
        predictor: answers the requests.
        credentials: `user:password` that Label Studio has to show (Basic); None: nobody is asked.
    """

    async def health(_: Request) -> Response:
        version = await _version_in_time(predictor)
        if version is None:
            return JSONResponse({"error": "the labelling server does not answer"}, 503)
        return JSONResponse({"status": "UP", "model_class": "MaskAutoLabeler", "model_version": version})

    async def setup(request: Request) -> Response:
        body = await _json_of(request)
        # Wrong configurations are told here, when the backend is connected, and not at the first rectangle. The
        # access token that comes along is not looked at: a key goes only where the command line says.
        read_label_config(str(body.get("schema", "")))
        return JSONResponse({"model_version": await run_in_threadpool(predictor.model_version)})

    async def predict(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(predictor.predict, await _json_of(request)))

    async def versions(_: Request) -> Response:
        return JSONResponse({"versions": [await run_in_threadpool(predictor.model_version)]})

    async def nothing_to_do(_: Request) -> Response:
        # Events of a project and the end of a connection; masks are not learned from what annotators draw here.
        return JSONResponse({})

    routes: list[tuple[str, list[str], Handler]] = [
        ("/", ["GET"], health),
        ("/health", ["GET"], health),
        ("/setup", ["POST"], setup),
        ("/predict", ["POST"], predict),
        ("/versions", ["GET", "POST"], versions),
        ("/webhook", ["POST"], nothing_to_do),
        ("/train", ["POST"], nothing_to_do),
        ("/delete", ["POST"], nothing_to_do),
    ]
    return Starlette(
        routes=[
            Route(path, _guarded(handler, None if handler is health else credentials), methods=methods)
            for path, methods, handler in routes
        ]
    )


async def _version_in_time(predictor: Predictor) -> str | None:
    with anyio.move_on_after(HEALTH_S):
        try:
            return await anyio.to_thread.run_sync(predictor.model_version, abandon_on_cancel=True)
        except MalError as error:
            _log.warning("%s", error)
    return None


def _guarded(handler: Handler, credentials: str | None) -> Handler:
    """The handler behind its password, with the project's errors as answers and as lines of the log."""

    async def guarded(request: Request) -> Response:
        if credentials is not None and not _shows(request, credentials):
            return JSONResponse({"error": "credentials needed"}, 401, {"WWW-Authenticate": 'Basic realm="mal-client"'})
        try:
            return await handler(request)
        except ClientError as error:
            return _refusal(request, error, 503)
        except MalError as error:
            return _refusal(request, error, 400)

    return guarded


def _refusal(request: Request, error: MalError, status: int) -> Response:
    # Label Studio shows its users the status alone, so the reason stands in our log.
    _log.error("%s: %s", request.url.path, error)
    return JSONResponse({"error": str(error)}, status)


def _shows(request: Request, credentials: str) -> bool:
    scheme, _, packed = request.headers.get("authorization", "").partition(" ")
    try:
        shown = base64.b64decode(packed, validate=True)
    except ValueError:
        return False
    return scheme.lower() == "basic" and hmac.compare_digest(shown, credentials.encode())


async def _json_of(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise InputError(f"the request is no JSON ({error})") from None
    if not isinstance(body, dict):
        raise InputError("the request is no JSON object")
    return body
