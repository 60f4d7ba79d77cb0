"""What the self-test of a model runs, and what it finds."""

import asyncio
import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from mal_server.errors import SelfTestFailed
from mal_server.models.loader import LoadedModel, small_side
from mal_server.models.warmup import warm_up_and_verify
from mal_server.scheduling import background
from mal_train.kernel.labeler.labeler import Crop, Prediction, PredictOptions
from tests.mal_server.fakes import BrightPredictor, config_of, loaded

SIDE, SMALL = 16, 8
Run = tuple[int, int, bool]
"""Crops of a batch, their side in px, whether both networks run."""


class Seen(BrightPredictor):
    """Remembers its batches; in crops of the side `wrong_at`, the map or that of one network is turned round."""

    def __init__(self, wrong_at: int = 0, which: str = "prob") -> None:
        super().__init__()
        self.runs: list[Run] = []
        self._wrong_at, self._which = wrong_at, which

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        side = len(crops[0].pixels)
        self.runs.append((len(crops), side, options.agreement))
        found = super().predict(crops, options)
        if side != self._wrong_at:
            return found
        changed = [(one, getattr(one, self._which)) for one in found]
        return [
            one if old is None else dataclasses.replace(one, **{self._which: np.float32(1) - old})
            for one, old in changed
        ]


def model(worker: BrightPredictor, reference: BrightPredictor | None, device: str = "cpu", *sizes: int) -> LoadedModel:
    plain = loaded(config_of().plans[0], worker)
    info = dataclasses.replace(plain.info, devices=(device,))
    return dataclasses.replace(plain, info=info, reference=reference, small_side=SMALL, batch_sizes=sizes)


def test_on_a_cpu_the_reference_runs_small_crops_alone_and_the_worker_one_of_the_served_size() -> None:
    worker, reference = Seen(), Seen()
    asyncio.run(warm_up_and_verify(model(worker, reference, "cpu", 1)))
    assert reference.runs == [(4, SMALL, True)]
    assert worker.runs == [(4, SMALL, True), (1, SIDE, False)]


def test_on_a_gpu_the_reference_runs_one_crop_of_the_served_size_too() -> None:
    worker, reference = Seen(), Seen()
    asyncio.run(warm_up_and_verify(model(worker, reference, "cuda:0", 1, 2, 8)))
    assert reference.runs == [(4, SMALL, True), (1, SIDE, False)]
    assert worker.runs == [(4, SMALL, True), (1, SIDE, False), (2, SIDE, False), (8, SIDE, False)]


def test_the_end_of_the_server_does_not_wait_for_the_reference() -> None:
    gate, reference = threading.Event(), Seen()
    reference.gate = gate

    async def work() -> None:
        proving = asyncio.create_task(warm_up_and_verify(model(Seen(), reference)))
        while not reference.runs:
            await asyncio.sleep(0.001)
        proving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await proving

    asyncio.run(work())
    try:
        assert any(thread.name == background.DAEMON_THREAD for thread in threading.enumerate())
    finally:
        gate.set()


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        (Seen(SMALL), "crop 0 of 4, answer: probabilities differ from float32"),
        (Seen(SMALL, "student"), "student: probabilities differ"),
        (Seen(SMALL, "teacher"), "teacher: probabilities differ"),
        (Seen(SIDE), "crop 0 of 1, answer: probabilities differ"),
    ],
)
def test_a_wrong_map_of_any_network_and_size_is_found(worker: Seen, said: str) -> None:
    with pytest.raises(SelfTestFailed, match=said):
        asyncio.run(warm_up_and_verify(model(worker, BrightPredictor(), "cuda:0", 1)))


@pytest.mark.parametrize(
    ("arch", "crop_size", "side"),
    [
        ("vit-deit-base/16", 512, 128),
        ("vit-deit-tiny/16", 224, 64),
        ("vit-mae-huge/14", 504, 126),
        ("vit-micro/16", 64, 64),
        ("vit-micro/16", 48, 48),
        ("vit-demo/8", 96, 32),
    ],
)
def test_small_crops_fit_the_patches_and_are_a_quarter_of_the_served_ones(arch: str, crop_size: int, side: int) -> None:
    assert small_side(arch, crop_size) == side
