"""The self-test of a model: the batches that it runs and the faults that it detects."""

import asyncio
import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from mal_server.errors import SelfTestFailed
from mal_server.models import warmup
from mal_server.models.loader import LoadedModel, small_side
from mal_server.models.warmup import warm_up_and_verify
from mal_server.scheduling import background
from mal_train.core.settings import NetworkEngine
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions
from tests.mal_server.fakes import BrightPredictor, config_of, loaded

SIDE, SMALL = 16, 8
Run = tuple[int, int, bool]
"""Crops of a batch, their side in px, True if both networks run."""


class RecordingPredictor(BrightPredictor):
    """Records its batches; inverts the field `wrong_field` of predictions for crops of the side `wrong_side`."""

    def __init__(self, wrong_side: int = 0, wrong_field: str = "prob") -> None:
        super().__init__()
        self.runs: list[Run] = []
        self._wrong_side, self._wrong_field = wrong_side, wrong_field

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        side = len(crops[0].pixels)
        self.runs.append((len(crops), side, options.agreement))
        predictions = super().predict(crops, options)
        return predictions if side != self._wrong_side else list(map(self._inverted, predictions))

    def _inverted(self, prediction: Prediction) -> Prediction:
        values = getattr(prediction, self._wrong_field)
        if values is None:
            return prediction
        return dataclasses.replace(prediction, **{self._wrong_field: np.float32(1) - values})


def model(worker: BrightPredictor, reference: BrightPredictor | None, device: str = "cpu", *sizes: int) -> LoadedModel:
    plain = loaded(config_of().plans[0], worker)
    info = dataclasses.replace(plain.info, devices=(device,))
    return dataclasses.replace(plain, info=info, reference=reference, small_side=SMALL, batch_sizes=sizes)


def test_on_a_cpu_the_reference_runs_only_small_crops_and_the_worker_one_full_size_crop() -> None:
    worker, reference = RecordingPredictor(), RecordingPredictor()
    asyncio.run(warm_up_and_verify(model(worker, reference, "cpu", 1)))
    assert reference.runs == [(4, SMALL, True)]
    assert worker.runs == [(4, SMALL, True), (1, SIDE, False)]


def test_on_a_gpu_the_reference_also_runs_one_full_size_crop() -> None:
    worker, reference = RecordingPredictor(), RecordingPredictor()
    asyncio.run(warm_up_and_verify(model(worker, reference, "cuda:0", 1, 2, 8)))
    assert reference.runs == [(4, SMALL, True), (1, SIDE, False)]
    assert worker.runs == [(4, SMALL, True), (1, SIDE, False), (2, SIDE, False), (8, SIDE, False)]


def test_a_cancelled_self_test_does_not_wait_for_the_reference() -> None:
    gate, reference = threading.Event(), RecordingPredictor()
    reference.gate = gate

    async def work() -> None:
        verifying = asyncio.create_task(warm_up_and_verify(model(RecordingPredictor(), reference)))
        while not reference.runs:
            await asyncio.sleep(0.001)
        verifying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await verifying

    asyncio.run(work())
    try:
        assert any(thread.name == background.DAEMON_THREAD for thread in threading.enumerate())
    finally:
        gate.set()


@pytest.mark.parametrize(
    ("worker", "fault"),
    [
        (RecordingPredictor(SMALL), "crop 0 of 4, result: .* float32"),
        (RecordingPredictor(SMALL, "student"), "crop 0 of 4, student: .* float32"),
        (RecordingPredictor(SMALL, "teacher"), "crop 0 of 4, teacher: .* float32"),
        (RecordingPredictor(SIDE), "crop 0 of 1, result: .* float32"),
    ],
)
def test_a_wrong_map_of_any_network_and_size_is_detected(worker: RecordingPredictor, fault: str) -> None:
    with pytest.raises(SelfTestFailed, match=fault):
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
def test_small_crops_are_whole_patches_and_about_a_quarter_of_the_served_side(
    arch: str, crop_size: int, side: int
) -> None:
    assert small_side(arch, crop_size) == side


class HalfPredictor(BrightPredictor):
    """Predicts the left half of each mask; its mean difference is small where masks are."""

    def predict(self, crops: Sequence[Crop], options: PredictOptions = PredictOptions()) -> list[Prediction]:  # noqa: B008
        return [_left_half(prediction) for prediction in super().predict(crops, options)]


def _left_half(prediction: Prediction) -> Prediction:
    prob = prediction.prob.copy()
    prob[:, prob.shape[1] // 2 :] = 0
    return dataclasses.replace(prediction, prob=prob)


def with_engine(worker: BrightPredictor, engine: NetworkEngine) -> LoadedModel:
    plain = model(worker, BrightPredictor(), "cpu", 1)
    return dataclasses.replace(plain, info=dataclasses.replace(plain.info, network_engine=engine), small_side=None)


def test_an_engine_whose_masks_are_not_those_of_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "MAX_MEAN_DIFFERENCE", 1.0)
    asyncio.run(warm_up_and_verify(with_engine(HalfPredictor(), NetworkEngine.TORCH)))
    with pytest.raises(SelfTestFailed, match="mean IoU"):
        asyncio.run(warm_up_and_verify(with_engine(HalfPredictor(), NetworkEngine.OPENVINO)))


@pytest.mark.parametrize(("precision", "remedy"), [("float32", "network_engine: torch"), ("int8", "calibrate again")])
def test_the_remedy_fits_the_number_format(precision: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "MAX_MEAN_DIFFERENCE", 1.0)
    engine = with_engine(HalfPredictor(), NetworkEngine.OPENVINO)
    faulty = dataclasses.replace(engine, info=dataclasses.replace(engine.info, precision=precision))
    with pytest.raises(SelfTestFailed, match=remedy):
        asyncio.run(warm_up_and_verify(faulty))


def test_an_engine_also_runs_a_lone_crop_before_it_serves() -> None:
    worker = RecordingPredictor()
    asyncio.run(warm_up_and_verify(with_engine(worker, NetworkEngine.OPENVINO)))
    assert worker.runs == [(4, SIDE, True), *[(1, SIDE, False)] * 2]
