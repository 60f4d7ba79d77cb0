"""A worker whose device is too small for its batches: each crop gets its own result, once."""

import asyncio
import threading

import numpy as np
import pytest

from mal_server.inference.worker import Worker
from mal_train.core.errors import DeviceError, OutOfDeviceMemory
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions
from tests.mal_server.fakes import BrightPredictor


def crops_of(predictor: BrightPredictor, count: int) -> list[Crop]:
    """Returns crops of different brightness, so that swapped results are detected."""
    images = [np.full((20, 20, 3), 10 * i, np.uint8) for i in range(count)]
    return [crop for image in images for crop in predictor.prepare(image, [(0, 0, 20, 20)]) if isinstance(crop, Crop)]


def run(predictor: BrightPredictor, count: int) -> list[Prediction | Exception]:
    worker = Worker(predictor, "cpu")
    results = asyncio.run(worker.run(PredictOptions(), crops_of(predictor, count)))
    worker.close()
    return results


@pytest.mark.parametrize("fits", range(1, 17))
def test_a_batch_that_does_not_fit_is_split_until_it_does(fits: int) -> None:
    predictor = BrightPredictor(fits=fits)
    results = run(predictor, 16)
    assert [x.prob[0, 0] for x in results if isinstance(x, Prediction)] == pytest.approx(np.arange(16) * 10 / 255)
    assert sum(size for _, size in predictor.batches if size <= fits) == 16


def test_a_single_crop_that_does_not_fit_fails_alone() -> None:
    assert [type(x) for x in run(BrightPredictor(fits=0), 3)] == [OutOfDeviceMemory] * 3


def test_other_device_errors_fail_the_batch() -> None:
    with pytest.raises(DeviceError, match="kernel"):
        run(BrightPredictor(error=DeviceError("kernel failed")), 3)


def test_a_running_batch_does_not_block_the_event_loop() -> None:
    gate = threading.Event()
    predictor = BrightPredictor(gate=gate)

    async def work() -> int:
        worker = Worker(predictor, "cpu")
        task = asyncio.create_task(worker.run(PredictOptions(), crops_of(predictor, 1)))
        while not predictor.batches:
            await asyncio.sleep(0.001)  # runs only if the loop is not blocked
        gate.set()
        return len(await task)

    assert asyncio.run(work()) == 1
