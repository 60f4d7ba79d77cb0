"""The playground of a served disc model, and what a page asks of it."""

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

from mal_train.kernel.labeler.labeler import Label, Prediction, PredictOptions
from tests.mal_client.test_against_server import served
from tests.mal_server.fakes import DISC_PNG, BrightPredictor, bright_disc

KEY = "the key"
DISC = bright_disc()
BOX_IN_CORNER = (0.0, 0.0, 20.0, 15.0)
Page = TestClient[Any, Any]


@asynccontextmanager
async def playground(address: str, *, key: str | None = KEY, timeout_s: float = 20.0) -> AsyncIterator[Page]:
    """The application on a free port, opened as the printed address does (`key` None: without)."""
    async with AsyncClient(address, timeout_s=timeout_s) as client:
        app = build_app(client, Guard(KEY))
        async with TestClient(TestServer(app, handler_cancellation=True)) as page:
            if key is not None:
                async with page.get("/", params={"key": key}) as answer:
                    await answer.read()
            yield page


def visit(work: Callable[[Page], Awaitable[Any]], predictor: BrightPredictor | None = None, **settings: Any) -> Any:
    """Runs `work` with the playground of a served disc model."""

    async def live(address: str) -> Any:
        async with playground(address) as page:
            return await work(page)

    with served(predictor, **settings) as address:
        return asyncio.run(live(address))


async def sent(page: Page, content: bytes = DISC_PNG) -> str:
    async with page.post("/api/images", data=content) as answer:
        assert answer.status == 200, await answer.text()
        return str((await answer.json())["sha256"])


def asking(*boxes: Any, thresholds: dict[int, float] | None = None, **options: Any) -> dict[str, Any]:
    rows = [{"id": f"b{at}", "box": list(box), "threshold": (thresholds or {}).get(at)} for at, box in enumerate(boxes)]
    return {"boxes": rows, "options": options}


async def lines_of(page: Page, sha256: str, body: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The answers by the page's id; each exactly once, and the end said."""
    async with page.post(f"/api/images/{sha256}/labels", json=body) as answer:
        assert answer.status == 200, await answer.text()
        *lines, last = [json.loads(text) for text in (await answer.text()).splitlines()]
    assert last == {"done": True}
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


async def refusal(answer_of: Any) -> tuple[int, dict[str, Any]]:
    async with answer_of as answer:
        return answer.status, (await answer.json())["error"]


def kernel(box: tuple[float, ...], *, threshold: float | None = None, **options: Any) -> Label:
    found = BrightPredictor().label(DISC, [box], PredictOptions(**options), threshold=threshold)[0]
    assert isinstance(found, Label)
    return found


class HeldAfterFirst(BrightPredictor):
    """The first batch is answered; the others wait for `released`."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def predict(self, crops: Any, options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        if len(self.batches) > self.warm:
            self.released.wait(120)
        return super().predict(crops, options)

    warm = 10_000
    """Batches before the first one of a page."""
