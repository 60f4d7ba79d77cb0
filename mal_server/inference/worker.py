"""Runs batches of crops on one device, in a thread of its own. Knows nothing of requests or gRPC."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from mal_server.scheduling.background import DEVICE_THREAD_PREFIX
from mal_train.core.errors import BadBox
from mal_train.core.images.decoder import RgbImage
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.image_patch import ImagePatch
from mal_train.core.masks.points import Point
from mal_train.kernel.labeler.oom import predict_split
from mal_train.kernel.labeler.overlaps import MaskClaim, PixelOwners
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions


class Predictor(Protocol):
    """The part of `Labeler` that the server uses; tests substitute a fake."""

    def prepare(
        self,
        image: RgbImage | ImagePatch,
        boxes: Sequence[Box],
        *,
        first: int = 0,
        points: Sequence[Sequence[Point]] | None = None,
    ) -> list[Crop | BadBox]:
        """Returns a crop or an error for each box, in order; errors number the boxes from `first`.

        With `points`, one sequence for each box, a crop has those that its mask will obey.
        """
        ...

    def preparing_bytes(self, image_hw: tuple[int, int], boxes: Sequence[Box]) -> int:
        """Returns the memory that `prepare` takes at most, beside the image and the crops."""
        ...

    def predict(self, crops: Sequence[Crop], options: PredictOptions) -> list[Prediction]:
        """Returns foreground probabilities, in order. Raises OutOfDeviceMemory if a smaller batch may fit."""
        ...

    def claim(self, crop: Crop, prediction: Prediction, /, *, threshold: float | None = None) -> MaskClaim:
        """Returns the image pixels that the box claims."""
        ...

    def finish(
        self,
        crop: Crop,
        prediction: Prediction,
        /,
        *,
        threshold: float | None = None,
        min_component_area_px: int = 0,
        owners: PixelOwners | None = None,
        index: int = 0,
    ) -> Label:
        """Returns the mask in image pixels, its score and flags; of contested pixels those that `owners` gives it."""
        ...


class Worker:
    """One device; `run` is a runner of the batcher.

    Args:
        predictor: on a GPU, only this worker calls its `predict`; the workers of a CPU share one.
        name: name of the device, for logs and thread names.
        on_start: called once in the worker's thread.
    """

    def __init__(self, predictor: Predictor, name: str, on_start: Callable[[], None] | None = None) -> None:
        self.predictor = predictor
        self.name = name
        self._thread = ThreadPoolExecutor(1, f"{DEVICE_THREAD_PREFIX}{name}", initializer=on_start)

    async def run(self, options: PredictOptions, crops: Sequence[Crop]) -> list[Prediction | Exception]:
        """Returns probabilities in order; OutOfDeviceMemory for a crop that does not fit on the device even alone.

        Raises:
            DeviceLost: the device failed for good.
            DeviceError: the batch failed otherwise.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._predict, options, crops)

    def close(self) -> None:
        """Ends the thread after its running batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _predict(self, options: PredictOptions, crops: Sequence[Crop]) -> list[Prediction | Exception]:
        return [*predict_split(self.predictor.predict, crops, options)]
