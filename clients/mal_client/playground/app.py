"""The playground's web application: its pages, and five calls that put mal_client behind HTTP.

    GET  /api/server               what the labeling server serves
    POST /api/images               the bytes of a picture → its name here, its size
    GET  /api/images/NAME/pixels   the picture as the network sees it, PNG
    POST /api/images/NAME/labels   boxes → one JSON line each, as masks are finished
    POST /api/coco                 what stands on the page → a COCO file

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
from mal_client.playground.export import coco_file
from mal_client.playground.image_store import ImageStore, StoredImage
from mal_client.playground.label_stream import answer_boxes
from mal_client.playground.schema import (
    BadRequest,
    Json,
    error_json,
    failure,
    member,
    read_label_request,
    server_json,
)
from mal_client.playground.security import HEADERS, KEY_FIELD, Guard, Refused, cookie_name
from mal_client.transport.image_call import check_image_size
from mal_client.types import ServerInfo
from mal_train.core.errors import BadImage, MalError
from mal_train.core.masks.images import ImageLimits, decode_image, encode_png, read_header

MAX_JSON_BYTES = 32 * 1024 * 1024
"""Largest call but a picture: some 10 000 boxes with their masks, on the way back into a COCO file."""

STORE_BYTES = 256 * 1024 * 1024
"""Pictures kept for the next edit of their boxes."""

DECODERS = 2
"""Pictures decoded at once; each takes three bytes a pixel."""

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


def build_app(client: AsyncClient, guard: Guard) -> web.Application:
    """The application around a client, which stays the caller's to close."""
    playground = Playground(client, guard)
    # Pictures are read in pieces and counted there; this bounds what `request.read()` takes, which is JSON.
    app = web.Application(middlewares=[_answering(guard)], client_max_size=MAX_JSON_BYTES)
    app.router.add_get("/", playground.page)
    app.router.add_get("/{name}", playground.page)
    app.router.add_get("/api/server", playground.server)
    app.router.add_post("/api/images", playground.open_image)
    app.router.add_get("/api/images/{sha256}/pixels", playground.pixels)
    app.router.add_post("/api/images/{sha256}/labels", playground.labels)
    app.router.add_post("/api/coco", playground.coco)
    return app


class Playground:
    """The handlers and what they share: the client, the pictures, the server's last word on itself."""

    def __init__(self, client: AsyncClient, guard: Guard) -> None:
        self._client = client
        self._guard = guard
        self._images = ImageStore(STORE_BYTES)
        self._decoders = asyncio.Semaphore(DECODERS)
        self._info: ServerInfo | None = None
        folder = files("mal_client.playground") / "static"
        self._pages = {name: (folder / name).read_bytes() for name in PAGES}

    async def page(self, request: web.Request) -> web.StreamResponse:
        """A file of the page; with the key in the address, the cookie that opens everything else."""
        name = request.match_info.get("name", "index.html")
        if name not in self._pages:
            raise web.HTTPNotFound
        answer = web.Response(body=self._pages[name], content_type=PAGES[name], charset="utf-8")
        if self._guard.knows(request.query.get(KEY_FIELD)):
            answer.set_cookie(cookie_name(request.host), self._guard.key, httponly=True, samesite="Strict", path="/")
        return answer

    async def server(self, request: web.Request) -> web.StreamResponse:
        """The labeling server, asked anew, as seen by who uses the model of the query; without one, the default."""
        self._info = await self._client.server_info()
        seen = self._info.of_model(request.query.get("model"))
        return web.json_response(server_json(self._client.address, seen))

    async def open_image(self, request: web.Request) -> web.StreamResponse:
        """Takes a picture's bytes; the header alone is read, and what the server would refuse is refused at once."""
        info = await self._known()
        content = await _body(request, info)
        # Not here: counting the pages of a TIFF may take long.
        header = await asyncio.to_thread(read_header, content)
        width, height = header.size_wh
        if max(width, height) > info.limits.max_side or width * height > info.limits.max_pixels:
            raise BadImage(
                f"image: {width}x{height} px; the server takes at most {info.limits.max_side} px a side and "
                f"{info.limits.max_pixels} px in all",
                "IMAGE_TOO_LARGE",
            )
        image = self._images.add(content, header)
        return web.json_response(
            {
                "sha256": image.sha256,
                "width": width,
                "height": height,
                "orientation": header.orientation,
                "frames": header.frames,
                # What a browser shows of other formats is not always what the network sees (alpha, 16 bits, EXIF).
                "browser_shows_it": content.startswith(b"\xff\xd8") and header.orientation == 1,
            }
        )

    async def pixels(self, request: web.Request) -> web.StreamResponse:
        """The picture, stored orientation and all, through the decoder that the labeling server uses."""
        image = self._image(request)
        limits = (await self._known()).limits
        allowed = ImageLimits(limits.max_image_bytes, limits.max_pixels, limits.max_side)
        async with self._decoders:
            png = await asyncio.to_thread(lambda: encode_png(decode_image(image.content, limits=allowed)))
        return web.Response(body=png, content_type="image/png")

    async def labels(self, request: web.Request) -> web.StreamResponse:
        """Masks as they come; a page that goes away ends the call to the server."""
        image = self._image(request)
        asked = read_label_request(await _json(request))
        answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", **HEADERS})
        await answer.prepare(request)

        async def write(line: Json) -> None:
            await answer.write(json.dumps(line).encode() + b"\n")

        try:
            await answer_boxes(self._client, image.content, asked, write)
            await write({"done": True})
            await answer.write_eof()
        except* ConnectionResetError:
            # The page has gone: there is nobody to tell.
            pass
        return answer

    async def coco(self, request: web.Request) -> web.StreamResponse:
        """The file; not by download link, since the page gives it the name of the picture."""
        body = await _json(request)
        asked = read_label_request({"boxes": [], "options": member(body, "options", dict)})
        info = (await self._known()).of_model(asked.options.model)
        text = await asyncio.to_thread(coco_file, body, info, asked.options)
        return web.Response(body=text, content_type="application/json")

    def _image(self, request: web.Request) -> StoredImage:
        image = self._images.get(request.match_info["sha256"])
        if image is None:
            raise _UnknownImage
        return image

    async def _known(self) -> ServerInfo:
        if self._info is None:
            self._info = await self._client.server_info()
        return self._info


class _UnknownImage(Exception):
    """The picture is not, or no longer, here."""


def _answering(guard: Guard) -> Any:
    """What every request passes: the guard on the way in, errors as JSON and the headers on the way out."""

    @web.middleware
    async def answering(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _admit(guard, request)
            answer = await handler(request)
        except web.HTTPException as error:
            # aiohttp's own: no such page, wrong method, body too large.
            answer = _error(
                HTTPStatus(error.status), ItemError(error.reason.upper().replace(" ", "_"), "", error.reason)
            )
        except Refused as error:
            answer = _error(HTTPStatus.FORBIDDEN, ItemError("PERMISSION_DENIED", "NOT_OUR_PAGE", str(error)))
        except _UnknownImage:
            answer = _error(
                HTTPStatus.NOT_FOUND, ItemError("NOT_FOUND", "IMAGE_UNKNOWN", "this picture is not here; send it again")
            )
        except MalError as error:
            answer = _error(_status(error), failure(error))
        if not answer.prepared:
            answer.headers.update(HEADERS)
        return answer

    return answering


def _admit(guard: Guard, request: web.Request) -> None:
    is_page = request.method == "GET" and request.path == "/"
    guard.check(request.headers, is_page=is_page)
    if is_page and guard.knows(request.query.get(KEY_FIELD)):
        return
    if not guard.knows(request.cookies.get(cookie_name(request.host))):
        raise Refused("the key is missing; open the address that the command printed, which carries it")


def _status(error: MalError) -> HTTPStatus:
    if isinstance(error, ClientError):
        return HTTPStatus.BAD_GATEWAY
    too_large = isinstance(error, BadImage) and error.reason == "IMAGE_TOO_LARGE"
    return HTTPStatus.REQUEST_ENTITY_TOO_LARGE if too_large else HTTPStatus.BAD_REQUEST


def _error(status: HTTPStatus, error: ItemError) -> web.Response:
    return web.json_response({"error": error_json(error)}, status=status)


async def _body(request: web.Request, info: ServerInfo) -> bytes:
    """The bytes of a picture, at most what the labeling server takes."""
    check_image_size(request.content_length or 0, info.limits)
    content = bytearray()
    async for piece in request.content.iter_any():
        content += piece
        check_image_size(len(content), info.limits)
    return bytes(content)


async def _json(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError):
        raise BadRequest("the request is not JSON; reload the page") from None
