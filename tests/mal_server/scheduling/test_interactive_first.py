"""An interactive call beside saturating bulk streams on a complete server, one device batch at a time."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.priority import Priority
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions
from tests.mal_server.calls import bulk
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, bright_disc, encoded, label, label_request, serving

INTERACTIVE_HW = (44, 66)
"""Size of the interactive call's image, by which its crops are recognized."""

BATCH_SIZE, LIMIT_S = 8, 60.0


class StepwisePredictor(BrightPredictor):
    """Waits for a permit before each batch; records the image sizes of the crops in it."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[list[tuple[int, int]]] = []
        self.permits = threading.Semaphore(0)
        self.is_stepwise = False

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        if self.is_stepwise:
            self.started.append([crop.image_hw for crop in crops])
            assert self.permits.acquire(timeout=LIMIT_S)
        return super().predict(crops, options)


@pytest.mark.promise("load", "Beside bulk streams that saturate the device, an interactive call is in its next batch")
@pytest.mark.parametrize("batch_aging_s", [1000.0, 1e-6], ids=["fresh", "aged"])
@pytest.mark.parametrize("agreement", [False, True], ids=["same options", "other options"])
def test_an_interactive_call_is_in_the_batch_after_the_running_one(
    batch_aging_s: float, agreement: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without aged bulk work; with options that share the bulk's batches, and with others (agreement)."""
    predictor, interactive, enqueue = StepwisePredictor(), list[str](), Batcher.enqueue

    def recorded(batcher: Any, admission: Any, key: Any, items: Any) -> None:
        enqueue(batcher, admission, key, items)
        interactive.extend(["queued"] * (admission.priority is Priority.INTERACTIVE))

    monkeypatch.setattr(Batcher, "enqueue", recorded)

    async def until_started(count: int) -> None:
        while len(predictor.started) < count:
            await asyncio.sleep(0.001)

    async def work() -> list[int]:
        crops_in_next_batch = []
        async with serving(predictor, max_batch_size=BATCH_SIZE, batch_aging_s=batch_aging_s, threads=2) as running:
            predictor.is_stepwise = True
            items = [label_request(*[DISC_BOX] * BATCH_SIZE) for _ in range(40)]
            streams = [asyncio.create_task(bulk(running, *items)) for _ in range(2)]
            await until_started(1)
            while running.server.waiting < 8 * BATCH_SIZE:  # two streams keep at least this many in flight
                await asyncio.sleep(0.001)
            for turn in range(3):
                await until_started(1 + 2 * turn)  # the batch after the last answered one is running
                queued, current = len(interactive), len(predictor.started)
                content = encoded(bright_disc(*INTERACTIVE_HW))
                call = asyncio.create_task(
                    label(running, label_request((21, 10, 24, 24), content=content, compute_agreement=agreement))
                )
                while len(interactive) == queued:
                    await asyncio.sleep(0.001)
                predictor.permits.release()
                await until_started(current + 1)
                crops_in_next_batch.append(predictor.started[current].count(INTERACTIVE_HW))
                predictor.permits.release()
                assert len(await call) == 1
            predictor.is_stepwise = False
            predictor.permits.release(1000)
            await asyncio.gather(*streams)
        return crops_in_next_batch

    assert asyncio.run(asyncio.wait_for(work(), LIMIT_S)) == [1, 1, 1]
