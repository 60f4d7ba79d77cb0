"""Runs the playground with a served disc model, and sends the requests of its page."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp.test_utils import TestClient, TestServer
from mal_client.client import AsyncClient
from mal_client.playground.app import build_app
from mal_client.playground.security import Guard

from mal_train.kernel.labeler.types import Label, Prediction, PredictOptions
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import DISC_PNG, BrightPredictor, bright_disc

KEY = "the key"
DISC = bright_disc()
BOX_IN_CORNER = (0.0, 0.0, 20.0, 15.0)
Page = TestClient[Any, Any]


@asynccontextmanager
async def playground(address: str, *, key: str | None = KEY, timeout_s: float = 20.0) -> AsyncIterator[Page]:
    """Runs the application on a free port and opens its page with the key; `key` None does not open it."""
    async with AsyncClient(address, timeout_s=timeout_s) as client:
        app = build_app(client, Guard(key=KEY))
        async with TestClient(TestServer(app, handler_cancellation=True)) as page:
            if key is not None:
                async with page.get("/", params={"key": key}) as response:
                    await response.read()
            yield page


def with_playground(
    work: Callable[[Page], Awaitable[Any]], predictor: BrightPredictor | None = None, **settings: Any
) -> Any:
    """Runs `work` with the playground of a served disc model, and returns its result."""

    async def run(address: str) -> Any:
        async with playground(address) as page:
            return await work(page)

    with served(predictor, **settings) as address:
        return asyncio.run(run(address))


async def send_image(page: Page, content: bytes = DISC_PNG) -> str:
    async with page.post("/api/images", data=content) as response:
        assert response.status == 200, await response.text()
        return str((await response.json())["sha256"])


def label_body(
    *boxes: Any, thresholds: dict[int, float] | None = None, points: dict[int, Any] | None = None, **options: Any
) -> dict[str, Any]:
    rows = [
        {
            "id": f"b{index}",
            "box": list(box),
            "threshold": (thresholds or {}).get(index),
            "points": (points or {}).get(index, []),
        }
        for index, box in enumerate(boxes)
    ]
    return {"boxes": rows, "options": options}


async def lines_of(page: Page, sha256: str, body: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Requests labels; returns the lines by box ID. Asserts that each occurs once and that the last line ends them."""
    async with page.post(f"/api/images/{sha256}/labels", json=body) as response:
        assert response.status == 200, await response.text()
        *lines, last = [json.loads(text) for text in (await response.text()).splitlines()]
    assert last == {"done": True}
    by_id = {line["id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


async def error_of(request: Any) -> tuple[int, dict[str, Any]]:
    async with request as response:
        return response.status, (await response.json())["error"]


def expected_label(box: tuple[float, ...], *, threshold: float | None = None, **options: Any) -> Label:
    label = BrightPredictor().label(DISC, [box], PredictOptions(**options), threshold=threshold)[0]
    assert isinstance(label, Label)
    return label


class HeldAfterFirst(BrightPredictor):
    """A predictor that returns the first batch and holds the others until `released`."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def predict(self, crops: Any, options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        if len(self.batches) > self.warmup_batches:
            self.released.wait(120)
        return super().predict(crops, options)

    warmup_batches = 10_000
    """Batches before the first one of a page."""
