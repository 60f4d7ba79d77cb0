"""Whether a model on its devices answers as it should, before anybody gets it; warms it up on the way.

A drawn picture with four boxes, one of each size class and one over the edge, goes through every worker: as small crops
through each network, and as crops of the size that is served in batches of the warm-up's sizes. Probabilities must be
numbers in [0, 1], and masks must lie in their boxes. Those of the small crops must be those of the same weights in
float32 on the CPU; on a GPU, whose kernels are others for other sizes, those of a large crop too. That finds damaged
weights, a number format that overflows, a device that computes wrongly and settings that do not fit.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mal_server.errors import SelfTestFailed
from mal_server.inference.worker import Predictor, Worker
from mal_server.models.loader import LoadedModel
from mal_server.scheduling.background import run_in_daemon_thread
from mal_train.core.errors import DeviceLost
from mal_train.core.masks.geometry import Box, resize_crop
from mal_train.core.settings import Compat, LabelerConfig
from mal_train.kernel.labeler.labeler import Crop, Prediction, PredictOptions

MAX_MEAN_DIFFERENCE: Final = 0.05
"""Between the served number format and float32, mean over a crop's probabilities; random DeiTs: 0.002 in bfloat16."""

BOXES: Final[tuple[Box, ...]] = (
    (100.0, 20.0, 150.0, 160.0),
    (20.0, 30.0, 24.0, 20.0),
    (60.0, 40.0, 70.0, 60.0),
    (-20.0, 120.0, 90.0, 90.0),
)
"""The first one is large: its size branch takes the network most time and memory."""


def picture() -> NDArray[np.uint8]:
    """(192, 256, 3) uint8: ellipses of several colors on a gradient."""
    y, x = np.mgrid[:192, :256]
    image = np.stack([x // 2, y // 2, (x + y) // 4], axis=2).astype(np.uint8)
    for index, (left, top, width, height) in enumerate(BOXES):
        inside = ((x - left - width / 2) / (width / 2)) ** 2 + ((y - top - height / 2) / (height / 2)) ** 2 < 0.8
        image[inside] = [(250, 220, 70), (230, 60, 40), (40, 200, 90), (60, 90, 240)][index]
    return image


async def warm_up_and_verify(loaded: LoadedModel) -> None:
    """Warms every worker up and tests it.

    Raises:
        SelfTestFailed: says which worker gave what.
        DeviceLost: a device broke down for good under the test.
    """
    config = loaded.info.labeler
    every, plain = (
        PredictOptions(loaded.info.branch, agreement=loaded.info.has_teacher),
        PredictOptions(loaded.info.branch),
    )
    crops = _crops(loaded.workers[0].predictor)
    small = crops if loaded.small_side is None else [_shrunk(crop, loaded.small_side) for crop in crops]
    due_small = await _expected(loaded.reference, small, every)
    is_elsewhere = any(device != "cpu" for device in loaded.info.devices)
    due_large = await _expected(loaded.reference if is_elsewhere and loaded.batch_sizes else None, crops[:1], plain)
    for worker in loaded.workers:
        await _prove_worker(worker, config, every, small, due_small)
        for size in loaded.batch_sizes:
            many = [crops[index % len(crops)] for index in range(size)]
            due = [due_large[0] if index % len(crops) == 0 else None for index in range(size)]
            await _prove_worker(worker, config, plain, many, due)


async def _expected(
    reference: Predictor | None, crops: Sequence[Crop], options: PredictOptions
) -> Sequence[Prediction | None]:
    if reference is None:
        return [None] * len(crops)
    # Passes in float32 on the CPU take long: a server that is to end does not wait for them.
    return await run_in_daemon_thread(partial(reference.predict, crops, options))


async def _prove_worker(
    worker: Worker,
    config: LabelerConfig,
    options: PredictOptions,
    crops: Sequence[Crop],
    expected: Sequence[Prediction | None],
) -> None:
    try:
        outcomes = await worker.run(options, crops)
    except DeviceLost:
        raise
    # Whatever else the network raises on a good crop, a wrong shape or a kernel that does not exist, is its failure.
    except Exception as error:
        raise SelfTestFailed(f"{worker.name}: the self-test ended with {type(error).__name__}: {error}") from error
    for place, (crop, outcome, wanted) in enumerate(zip(crops, outcomes, expected, strict=True)):
        name = f"{worker.name}: self-test, crop {place} of {len(crops)}"
        if isinstance(outcome, Exception):
            raise SelfTestFailed(f"{name}: {outcome}")
        maps = [outcome.prob, *(m for m in (outcome.student, outcome.teacher) if m is not None)]
        for which, values in zip(("answer", "student", "teacher"), maps, strict=False):
            _check_map(f"{name}, {which}", values, crop)
        if wanted is not None:
            pairs = ((outcome.prob, wanted.prob), (outcome.student, wanted.student), (outcome.teacher, wanted.teacher))
            for which, (got, due) in zip(("answer", "student", "teacher"), pairs, strict=True):
                if got is not None and due is not None:
                    _check_agreement(f"{name}, {which}", got, due)
        _check_label(name, worker.predictor, crop, outcome, config)


def _crops(predictor: Predictor) -> list[Crop]:
    crops = []
    for entry in predictor.prepare(picture(), BOXES):
        if not isinstance(entry, Crop):
            raise SelfTestFailed(f"self-test: a good box was refused: {entry}")
        crops.append(entry)
    return crops


def _shrunk(crop: Crop, side: int) -> Crop:
    return dataclasses.replace(crop, pixels=resize_crop(crop.pixels, side))


def _check_map(name: str, values: NDArray[np.float32], crop: Crop) -> None:
    if values.shape != crop.pixels.shape[:2]:
        raise SelfTestFailed(f"{name}: a map of {values.shape} for a crop of {crop.pixels.shape[:2]}")
    if not np.isfinite(values).all():
        raise SelfTestFailed(f"{name}: the network gives probabilities that are not finite")
    if values.min() < 0.0 or values.max() > 1.0:
        raise SelfTestFailed(f"{name}: probabilities between {values.min():.3g} and {values.max():.3g}")


def _check_agreement(name: str, got: NDArray[np.float32], due: NDArray[np.float32]) -> None:
    difference = float(np.abs(got - due).mean())
    if difference > MAX_MEAN_DIFFERENCE:
        raise SelfTestFailed(
            f"{name}: probabilities differ from float32 on the CPU by {difference:.3f} on average; at most "
            f"{MAX_MEAN_DIFFERENCE} is a matter of the number format. Try precision: float32, or another device"
        )


def _slack_px(config: LabelerConfig, crop: Crop) -> float:
    """How far a mask may reach over its box: by rounding, and under compat: tao by the blur of two crop pixels."""
    if config.compat is not Compat.TAO:
        return 1.0
    window = crop.window
    return 1.0 + 2.0 * max(window.x1 - window.x0, window.y1 - window.y0) / len(crop.pixels)


def _check_label(name: str, predictor: Predictor, crop: Crop, outcome: Prediction, config: LabelerConfig) -> None:
    # So low a threshold that the mask reaches as far as it can.
    label = predictor.finish(crop, outcome, threshold=1e-6)
    height, width = crop.image_hw
    if (label.rle.height, label.rle.width) != (height, width):
        raise SelfTestFailed(
            f"{name}: a mask of {label.rle.width}x{label.rle.height} px in an image of {width}x{height}"
        )
    if not 0.0 <= label.score <= 1.0:
        raise SelfTestFailed(f"{name}: a score of {label.score}")
    if label.mask_box is None:
        return
    x, y, w, h = crop.box_inside
    mask_x, mask_y, mask_w, mask_h = label.mask_box
    slack = _slack_px(config, crop)
    if mask_x < x - slack or mask_y < y - slack or mask_x + mask_w > x + w + slack or mask_y + mask_h > y + h + slack:
        raise SelfTestFailed(f"{name}: the mask {label.mask_box} leaves its box {crop.box_inside}")
