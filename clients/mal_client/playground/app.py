"""The web application of the playground: its static files, and five calls that expose mal_client over HTTP.

    GET  /api/server               information about the labeling server
    POST /api/images               encoded image → its SHA-256 and size
    GET  /api/images/SHA256/pixels the image as the network sees it, PNG
    POST /api/images/SHA256/labels boxes → one JSON line each, as soon as its mask is ready
    POST /api/coco                 the boxes and masks of the page → a COCO file

Errors are `{"error": {code, reason, message}}`. Needs the extra `playground` (aiohttp).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Final

from aiohttp import web

from mal_client.client import AsyncClient
from mal_client.errors import ClientError, ItemError
from mal_client.images.image_input import check_image_size
from mal_client.playground.export import coco_file
from mal_client.playground.image_store import ImageStore, StoredImage
from mal_client.playground.label_stream import label_boxes
from mal_client.playground.schema import (
    BadRequest,
    Json,
    error_json,
    item_error,
    member,
    read_label_request,
    server_json,
)
from mal_client.playground.security import HEADERS, KEY_FIELD, Guard, cookie_name
from mal_client.types import ServerInfo
from mal_client.web_guard import Forbidden
from mal_client.web_server import receiving
from mal_train.core.errors import BadImage, MalError
from mal_train.core.images.decoder import decode_image, encode_png
from mal_train.core.images.header import check_size, read_header

MAX_JSON_BYTES = 32 * 1024 * 1024
"""Size limit of a JSON request: some 10 000 boxes with their masks, for a COCO file."""

STORE_BYTES = 256 * 1024 * 1024
"""Size limit of the encoded images in memory."""

DECODERS = 2
"""Images decoded concurrently; each takes three bytes per pixel."""

PAGES: Final = {
    "index.html": "text/html",
    "playground.css": "text/css",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        ("main.js", "api.js", "session.js", "stage.js", "gestures.js", "panel.js", "rle.js", "geometry.js"),
        "text/javascript",
    ),
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(client: AsyncClient, guard: Guard, on_open: Callable[[], None] = lambda: None) -> web.Application:
    """Builds the application.

    Args:
        client: client of the labeling server; the caller closes it.
        guard: access rules of the page.
        on_open: called each time that the page is opened with the key.
    """
    playground = Playground(client, guard, on_open)
    # Limits `request.read()`, which reads JSON; images are read in chunks and have their own limit.
    app = web.Application(middlewares=[_middleware(guard)], client_max_size=MAX_JSON_BYTES)
    app.router.add_get("/", playground.page)
    app.router.add_get("/{name}", playground.page)
    app.router.add_get("/api/server", playground.server)
    app.router.add_post("/api/images", playground.open_image)
    app.router.add_get("/api/images/{sha256}/pixels", playground.pixels)
    app.router.add_post("/api/images/{sha256}/labels", playground.labels)
    app.router.add_post("/api/coco", playground.coco)
    return app


class Playground:
    """HTTP handlers, with the client, the images and the latest server information that they share."""

    def __init__(self, client: AsyncClient, guard: Guard, on_open: Callable[[], None]) -> None:
        self._client = client
        self._guard = guard
        self._on_open = on_open
        self._images = ImageStore(STORE_BYTES)
        self._decoders = asyncio.Semaphore(DECODERS)
        self._server_info: ServerInfo | None = None
        folder = files("mal_client.playground") / "static"
        self._pages = {name: (folder / name).read_bytes() for name in PAGES}

    async def page(self, request: web.Request) -> web.StreamResponse:
        """Returns a static file; with the key in the URL, also sets the cookie that grants access to all other URLs."""
        name = request.match_info.get("name", "index.html")
        if name not in self._pages:
            raise web.HTTPNotFound
        response = web.Response(body=self._pages[name], content_type=PAGES[name], charset="utf-8")
        if self._guard.accepts(request.query.get(KEY_FIELD)):
            response.set_cookie(cookie_name(request.host), self._guard.key, httponly=True, samesite="Strict", path="/")
            self._on_open()
        return response

    async def server(self, request: web.Request) -> web.StreamResponse:
        """Fetches the server information, for the model in the query or else the default model."""
        self._server_info = await self._client.server_info()
        info = self._server_info.of_model(request.query.get("model"))
        return web.json_response(server_json(self._client.address, info))

    async def open_image(self, request: web.Request) -> web.StreamResponse:
        """Stores an encoded image after checking its header; refuses images that the labeling server would refuse."""
        info = await self._info()
        image_bytes = await _read_image(request, info)
        # In a thread: counting the pages of a TIFF can take long.
        header = await asyncio.to_thread(read_header, image_bytes)
        width, height = header.size_wh
        check_size(header.size_wh, info.limits.images())
        image = self._images.add(image_bytes, header)
        return web.json_response(
            {
                "sha256": image.sha256,
                "width": width,
                "height": height,
                "orientation": header.orientation,
                "frames": header.frames,
                # A browser displays other formats differently from what the network sees (alpha, 16 bits, EXIF).
                "browser_can_decode": image_bytes.startswith(b"\xff\xd8") and header.orientation == 1,
            }
        )

    async def pixels(self, request: web.Request) -> web.StreamResponse:
        """Returns the image in its stored orientation, decoded as the labeling server decodes it."""
        image = self._image(request)
        limits = (await self._info()).limits.images()
        async with self._decoders:
            png = await asyncio.to_thread(lambda: encode_png(decode_image(image.encoded, limits=limits)))
        return web.Response(body=png, content_type="image/png")

    async def labels(self, request: web.Request) -> web.StreamResponse:
        """Streams masks as they are ready; when the page disconnects, the call to the labeling server is cancelled."""
        image = self._image(request)
        label_request = read_label_request(await _read_json(request))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", **HEADERS})
        await response.prepare(request)

        async def write(line: Json) -> None:
            await response.write(json.dumps(line).encode() + b"\n")

        try:
            await label_boxes(self._client, image.encoded, label_request, write)
            await write({"done": True})
            await response.write_eof()
        except* ConnectionResetError:
            # The page has disconnected, so an error has no reader.
            pass
        return response

    async def coco(self, request: web.Request) -> web.StreamResponse:
        """Returns the COCO file to the script of the page, which chooses the file name of the download."""
        body = await _read_json(request)
        label_request = read_label_request({"boxes": [], "options": member(body, "options", dict)})
        info = (await self._info()).of_model(label_request.options.model)
        text = await asyncio.to_thread(coco_file, body, info, label_request.options)
        return web.Response(body=text, content_type="application/json")

    def _image(self, request: web.Request) -> StoredImage:
        image = self._images.get(request.match_info["sha256"])
        if image is None:
            raise _UnknownImage
        return image

    async def _info(self) -> ServerInfo:
        if self._server_info is None:
            self._server_info = await self._client.server_info()
        return self._server_info


class _UnknownImage(Exception):
    """The image was never sent, or has been evicted."""


def _middleware(guard: Guard) -> Any:
    """Returns a middleware that authorizes requests, turns errors into JSON and adds the security headers."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _authorize(guard, request)
            response = await handler(request)
        except web.HTTPException as error:
            # Raised by aiohttp: unknown path, wrong method, body too large.
            response = _error(
                HTTPStatus(error.status), ItemError(error.reason.upper().replace(" ", "_"), "", error.reason)
            )
        except Forbidden as error:
            response = _error(HTTPStatus.FORBIDDEN, ItemError("PERMISSION_DENIED", "NOT_OUR_PAGE", str(error)))
        except _UnknownImage:
            response = _error(
                HTTPStatus.NOT_FOUND, ItemError("NOT_FOUND", "IMAGE_UNKNOWN", "image: not in memory; send it again")
            )
        except MalError as error:
            response = _error(_status(error), item_error(error))
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    return middleware


def _authorize(guard: Guard, request: web.Request) -> None:
    is_page = request.method == "GET" and request.path == "/"
    guard.check(request.headers, is_page=is_page)
    if is_page and guard.accepts(request.query.get(KEY_FIELD)):
        return
    if not guard.accepts(request.cookies.get(cookie_name(request.host))):
        raise Forbidden("key: missing or wrong; open the URL that mal-client printed")


def _status(error: MalError) -> HTTPStatus:
    if isinstance(error, ClientError):
        return HTTPStatus.BAD_GATEWAY
    too_large = isinstance(error, BadImage) and error.reason == "IMAGE_TOO_LARGE"
    return HTTPStatus.REQUEST_ENTITY_TOO_LARGE if too_large else HTTPStatus.BAD_REQUEST


def _error(status: HTTPStatus, error: ItemError) -> web.Response:
    return web.json_response({"error": error_json(error)}, status=status)


async def _read_image(request: web.Request, info: ServerInfo) -> bytes:
    """Reads an encoded image, up to the size limit of the labeling server."""
    check_image_size(request.content_length or 0, info.limits)
    content = bytearray()
    async with receiving():
        async for chunk in request.content.iter_any():
            content += chunk
            check_image_size(len(content), info.limits)
    return bytes(content)


async def _read_json(request: web.Request) -> Any:
    async with receiving():
        body = await request.read()
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("request body: not valid JSON; reload the page") from None
