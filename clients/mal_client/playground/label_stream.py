"""Passes one request of the page to the labeling server and streams a line per box, each as soon as it is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from mal_client.client import AsyncClient
from mal_client.errors import ItemError
from mal_client.playground.schema import Json, LabelRequest, PageBox, error_json, item_error, label_line
from mal_client.types import LabelOptions
from mal_train.core.errors import MalError

CALLS_AT_ONCE = 4
"""Concurrent calls to the server for one request of the page, whose boxes may have different thresholds."""

Write = Callable[[Json], Awaitable[None]]


async def label_boxes(client: AsyncClient, image: bytes, request: LabelRequest, write: Write) -> None:
    """Writes exactly one line per box; a failed call is the error of its boxes that have no line yet.

    Args:
        client: client of the labeling server.
        image: the encoded image.
        request: the request of the page.
        write: awaited for each line, one at a time; a slow page therefore slows down the stream of the server.
    """
    semaphore, write_lock = asyncio.Semaphore(CALLS_AT_ONCE), asyncio.Lock()

    async def write_one(line: Json) -> None:
        async with write_lock:
            await write(line)

    async def call(options: LabelOptions, boxes: Sequence[PageBox]) -> None:
        async with semaphore:
            await _label_group(client, image, options, boxes, write_one)

    async with asyncio.TaskGroup() as group:
        for options, boxes in request.groups:
            group.create_task(call(options, boxes))


async def _label_group(
    client: AsyncClient, image: bytes, options: LabelOptions, boxes: Sequence[PageBox], write: Write
) -> None:
    pending = dict(enumerate(boxes))
    try:
        rects, points = [box.box for box in boxes], [box.points for box in boxes]
        async with aclosing(client.stream_image(image, rects, options, points=points)) as labels:
            async for label in labels:
                await write(label_line(pending.pop(label.index).id, label))
        error = ItemError("INTERNAL", "NOT_ANSWERED", "no label was made")
    except MalError as failure:
        error = item_error(failure)
    for box in pending.values():
        await write({"id": box.id, "error": error_json(error)})
