"""One call of the page, passed on to the labeling server: every box answered with one line, as soon as it can be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from mal_client.client import AsyncClient
from mal_client.errors import ItemError
from mal_client.playground.schema import AskedBox, Json, LabelRequest, error_json, failure, label_line
from mal_client.types import LabelOptions
from mal_train.core.errors import MalError

CALLS_AT_ONCE = 4
"""Calls to the server for one call of the page, whose boxes may have a threshold each."""

Write = Callable[[Json], Awaitable[None]]


async def answer_boxes(client: AsyncClient, image: bytes, request: LabelRequest, write: Write) -> None:
    """Writes exactly one line for each box; a call that fails is the error of those that had no answer by then.

    Args:
        client: of the labeling server.
        image: the encoded picture.
        request: what the page asked.
        write: is awaited for each line, one at a time; while it waits for a slow page, the server's stream waits too.
    """
    allowed, writing = asyncio.Semaphore(CALLS_AT_ONCE), asyncio.Lock()

    async def write_one(line: Json) -> None:
        async with writing:
            await write(line)

    async def call(options: LabelOptions, boxes: Sequence[AskedBox]) -> None:
        async with allowed:
            await _answer_group(client, image, options, boxes, write_one)

    async with asyncio.TaskGroup() as group:
        for options, boxes in request.groups:
            group.create_task(call(options, boxes))


async def _answer_group(
    client: AsyncClient, image: bytes, options: LabelOptions, boxes: Sequence[AskedBox], write: Write
) -> None:
    open_boxes = dict(enumerate(boxes))
    try:
        async with aclosing(client.stream_image(image, [asked.box for asked in boxes], options)) as labels:
            async for label in labels:
                await write(label_line(open_boxes.pop(label.index).key, label))
        fault = ItemError("INTERNAL", "NOT_ANSWERED", "no label was made")
    except MalError as error:
        fault = failure(error)
    for asked in open_boxes.values():
        await write({"id": asked.key, "error": error_json(fault)})
