"""A person's call among bulk work on a whole server, batch by batch: nothing of the bulk is handed over beforehand."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.priority import Priority
from mal_train.kernel.labeler.labeler import Crop, Prediction, PredictOptions
from tests.mal_server.calls import bulk
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, bright_disc, encoded, label, label_request, serving

PERSON_HW = (44, 66)
SIZE, LIMIT_S = 8, 60.0


class Stepwise(BrightPredictor):
    """Each batch waits for a permit; remembers the heights and widths of the images that its crops are of."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[list[tuple[int, int]]] = []
        self.permits = threading.Semaphore(0)
        self.is_stepwise = False

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        if self.is_stepwise:
            self.begun.append([crop.image_hw for crop in crops])
            assert self.permits.acquire(timeout=LIMIT_S)
        return super().predict(crops, options)


@pytest.mark.parametrize("patience_s", [1000.0, 1e-6])
@pytest.mark.parametrize("agreement", [False, True])
def test_a_persons_call_is_in_the_batch_after_the_running_one(
    patience_s: float, agreement: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it shares the bulk's batches or not (it asks for agreement), however long the bulk has waited."""
    predictor, people, inner = Stepwise(), list[str](), Batcher.enqueue

    def noticed(batcher: Any, ticket: Any, key: Any, items: Any) -> None:
        inner(batcher, ticket, key, items)
        people.extend(["queued"] * (ticket.priority is Priority.INTERACTIVE))

    monkeypatch.setattr(Batcher, "enqueue", noticed)

    async def begun(count: int) -> None:
        while len(predictor.begun) < count:
            await asyncio.sleep(0.001)

    async def work() -> list[int]:
        places = []
        async with serving(predictor, max_batch_size=SIZE, batch_patience_s=patience_s, threads=2) as running:
            predictor.is_stepwise = True
            items = [label_request(*[DISC_BOX] * SIZE) for _ in range(40)]
            streams = [asyncio.create_task(bulk(running, *items)) for _ in range(2)]
            await begun(1)
            while running.server.waiting < 8 * SIZE:  # what two streams may have under way
                await asyncio.sleep(0.001)
            for turn in range(3):
                await begun(1 + 2 * turn)  # the batch after the one that answered runs
                queued, running_now = len(people), len(predictor.begun)
                content = encoded(bright_disc(*PERSON_HW))
                call = asyncio.create_task(
                    label(running, label_request((21, 10, 24, 24), content=content, compute_agreement=agreement))
                )
                while len(people) == queued:
                    await asyncio.sleep(0.001)
                predictor.permits.release()
                await begun(running_now + 1)
                places.append(predictor.begun[running_now].count(PERSON_HW))
                predictor.permits.release()
                assert len(await call) == 1
            predictor.is_stepwise = False
            predictor.permits.release(1000)
            await asyncio.gather(*streams)
        return places

    assert asyncio.run(asyncio.wait_for(work(), LIMIT_S)) == [1, 1, 1]
