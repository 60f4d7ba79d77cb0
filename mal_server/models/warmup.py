"""Warms a model up and verifies its results before it is served.

Every worker labels a synthetic image with four boxes, one of each size class and one over the edge: as small crops
through each network, and on a GPU as full-size crops in batches of the warm-up's sizes. Probabilities must be in
[0, 1], and masks must lie in their boxes. Probabilities of the small crops must match those of the same weights in
float32 on the CPU; on a GPU, which uses other kernels for other sizes, also those of a full-size crop. An engine other
than torch must also have the masks of torch. This detects damaged weights, overflow of a number format, a faulty
device, an unsuitable int8 calibration and inconsistent settings.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mal_server.errors import SelfTestFailed
from mal_server.inference.worker import Predictor, Worker
from mal_server.models.loader import LoadedModel, ModelInfo
from mal_server.scheduling.background import run_in_daemon_thread
from mal_train.core.errors import DeviceLost
from mal_train.core.masks.geometry import Box, resize_crop
from mal_train.core.settings import Compat, LabelerConfig, NetworkEngine, Precision
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions

MAX_MEAN_DIFFERENCE: Final = 0.05
"""Largest mean difference of a crop's probabilities from float32; randomly initialized DeiTs: 0.002 in bfloat16."""

MIN_MEAN_IOU: Final = 0.9
"""Smallest mean IoU of an engine's masks with those of torch in float32. The boxes of the self-test are few and plain:
a suitable int8 calibration has 0.99 and more on photographs."""
MASK_PROBABILITY: Final = 0.5

BOXES: Final[tuple[Box, ...]] = (
    (100.0, 20.0, 150.0, 160.0),
    (20.0, 30.0, 24.0, 20.0),
    (60.0, 40.0, 70.0, 60.0),
    (-20.0, 120.0, 90.0, 90.0),
)
"""x, y, w, h in px. The first is large, the size class that takes most time and memory."""


def synthetic_image() -> NDArray[np.uint8]:
    """Returns (192, 256, 3) uint8: ellipses of several colors on a gradient."""
    y, x = np.mgrid[:192, :256]
    image = np.stack([x // 2, y // 2, (x + y) // 4], axis=2).astype(np.uint8)
    for index, (left, top, width, height) in enumerate(BOXES):
        inside = ((x - left - width / 2) / (width / 2)) ** 2 + ((y - top - height / 2) / (height / 2)) ** 2 < 0.8
        image[inside] = [(250, 220, 70), (230, 60, 40), (40, 200, 90), (60, 90, 240)][index]
    return image


async def warm_up_and_verify(loaded: LoadedModel) -> None:
    """Warms up and verifies every worker.

    Raises:
        SelfTestFailed: names the worker, the crop and the fault.
        DeviceLost: a device failed for good.
    """
    config = loaded.info.labeler
    all_networks = PredictOptions(loaded.info.branch, agreement=loaded.info.has_teacher, whole_map=True)
    as_served = PredictOptions(loaded.info.branch)
    crops = _crops(loaded.workers[0].predictor)
    small = crops if loaded.small_side is None else [_resized(crop, loaded.small_side) for crop in crops]
    expected_small = await _expected(loaded.reference, small, all_networks)
    uses_gpu = any(device != "cpu" for device in loaded.info.devices)
    large_reference = loaded.reference if uses_gpu and loaded.batch_sizes else None
    (expected_large,) = await _expected(large_reference, crops[:1], as_served)
    for worker in loaded.workers:
        results = await _verify_worker(worker, config, all_networks, small, expected_small)
        if loaded.info.network_engine != NetworkEngine.TORCH:
            _check_masks(worker.name, loaded.info, results, expected_small)
            # Compiles the graphs of a pass on all cores; the batch compiled those of a pass on one.
            await _verify_worker(worker, config, as_served, crops[:1], [None])
        for size in loaded.batch_sizes:
            batch = [crops[index % len(crops)] for index in range(size)]
            expected = [expected_large if index % len(crops) == 0 else None for index in range(size)]
            await _verify_worker(worker, config, as_served, batch, expected)


async def _expected(
    reference: Predictor | None, crops: Sequence[Crop], options: PredictOptions
) -> Sequence[Prediction | None]:
    if reference is None:
        return [None] * len(crops)
    # In a daemon thread: a server that stops does not wait for float32 on the CPU, which is slow.
    return await run_in_daemon_thread(partial(reference.predict, crops, options))


async def _verify_worker(
    worker: Worker,
    config: LabelerConfig,
    options: PredictOptions,
    crops: Sequence[Crop],
    expected: Sequence[Prediction | None],
) -> list[Prediction]:
    try:
        results = await worker.run(options, crops)
    except DeviceLost:
        raise
    # Any other error of the network on a valid crop, such as a wrong shape or a missing kernel, fails the self-test.
    except Exception as error:
        raise SelfTestFailed(f"{worker.name}: the self-test raised {type(error).__name__}: {error}") from error
    for index, (crop, result, reference) in enumerate(zip(crops, results, expected, strict=True)):
        name = f"{worker.name}: self-test, crop {index} of {len(crops)}"
        if isinstance(result, Exception):
            raise SelfTestFailed(f"{name}: {result}")
        _check_maps(name, result, reference, crop)
        _check_label(name, worker.predictor, crop, result, config)
    return [result for result in results if isinstance(result, Prediction)]


def _check_masks(
    name: str, info: ModelInfo, results: Sequence[Prediction], expected: Sequence[Prediction | None]
) -> None:
    """Checks the mean IoU of the masks with those of the reference, on the grid of the crop; empty masks are equal."""
    ious = [_iou(result, reference) for result, reference in zip(results, expected, strict=True) if reference]
    mean = float(np.mean(ious))
    if mean < MIN_MEAN_IOU:
        is_float32 = info.precision == Precision.FLOAT32
        remedy = "calibrate again (`mal-train export --int8`), or use precision: float32"
        raise SelfTestFailed(
            f"{name}: the masks of the self-test have a mean IoU of {mean:.3f} with those of torch in float32, under "
            f"{MIN_MEAN_IOU}: {'use network_engine: torch' if is_float32 else remedy}"
        )


def _iou(result: Prediction, reference: Prediction) -> float:
    ours, theirs = result.prob > MASK_PROBABILITY, reference.prob > MASK_PROBABILITY
    union = np.count_nonzero(ours | theirs)
    return float(np.count_nonzero(ours & theirs) / union) if union else 1.0


def _check_maps(name: str, result: Prediction, reference: Prediction | None, crop: Crop) -> None:
    """Checks every probability map of a prediction, and compares it with the reference if both have it."""
    for field, label in (("prob", "result"), ("student", "student"), ("teacher", "teacher")):
        values = getattr(result, field)
        if values is None:
            continue
        _check_map(f"{name}, {label}", values, crop)
        expected = None if reference is None else getattr(reference, field)
        if expected is not None:
            _check_agreement(f"{name}, {label}", values, expected)


def _crops(predictor: Predictor) -> list[Crop]:
    crops = []
    for crop in predictor.prepare(synthetic_image(), BOXES):
        if not isinstance(crop, Crop):
            raise SelfTestFailed(f"self-test: a valid box was refused: {crop}")
        crops.append(crop)
    return crops


def _resized(crop: Crop, side: int) -> Crop:
    return dataclasses.replace(crop, pixels=resize_crop(crop.pixels, side))


def _check_map(name: str, values: NDArray[np.float32], crop: Crop) -> None:
    if values.shape != crop.pixels.shape[:2]:
        raise SelfTestFailed(f"{name}: a map of {values.shape} for a crop of {crop.pixels.shape[:2]}")
    if not np.isfinite(values).all():
        raise SelfTestFailed(f"{name}: probabilities that are not finite")
    if values.min() < 0.0 or values.max() > 1.0:
        raise SelfTestFailed(f"{name}: probabilities between {values.min():.3g} and {values.max():.3g}")


def _check_agreement(name: str, values: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    difference = float(np.abs(values - expected).mean())
    if difference > MAX_MEAN_DIFFERENCE:
        raise SelfTestFailed(
            f"{name}: probabilities differ from float32 on the CPU by {difference:.3f} on average; a number format "
            f"explains at most {MAX_MEAN_DIFFERENCE}; try precision: float32, or another device"
        )


def _slack_px(config: LabelerConfig, crop: Crop) -> float:
    """Returns how many px a mask may extend beyond its box: 1 for rounding, under compat: tao two crop pixels more."""
    if config.compat is not Compat.TAO:
        return 1.0
    window = crop.window
    return 1.0 + 2.0 * max(window.x1 - window.x0, window.y1 - window.y0) / len(crop.pixels)


def _check_label(name: str, predictor: Predictor, crop: Crop, result: Prediction, config: LabelerConfig) -> None:
    # The low threshold gives the largest possible mask.
    label = predictor.finish(crop, result, threshold=1e-6)
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
        raise SelfTestFailed(f"{name}: the mask {label.mask_box} extends beyond its box {crop.box_inside}")
