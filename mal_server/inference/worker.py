"""Runs batches of crops on one device, on a thread of its own. Knows nothing of requests or of gRPC."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from mal_server.scheduling.background import DEVICE_THREAD_PREFIX
from mal_train.core.errors import BadBox
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.images import RgbImage
from mal_train.kernel.labeler.labeler import Crop, Label, Prediction, PredictOptions
from mal_train.kernel.labeler.oom import predict_split


class Predictor(Protocol):
    """What the server needs of a `Labeler`; tests put cheap ones in its place."""

    def prepare(self, image: RgbImage, boxes: Sequence[Box], *, first: int = 0) -> list[Crop | BadBox]:
        """A crop, or the reason why there is none, for each box, in order; errors count boxes from `first`."""
        ...

    def predict(self, crops: Sequence[Crop], options: PredictOptions) -> list[Prediction]:
        """Foreground probabilities, in order; raises OutOfDeviceMemory when a smaller batch may fit."""
        ...

    def finish(
        self,
        crop: Crop,
        probability: Prediction,
        *,
        threshold: float | None = None,
        min_component_area_px: int = 0,
    ) -> Label:
        """Mask, score and flags in image pixels."""
        ...

    def finish_together(
        self,
        answers: Sequence[tuple[Crop, Prediction]],
        *,
        threshold: float | None = None,
        min_component_area_px: int = 0,
    ) -> list[Label]:
        """The same for boxes of one image, each contested pixel given to one of them."""
        ...


class Worker:
    """One device. `run` is a batcher's runner.

    Args:
        predictor: does the work; only this worker calls its `predict`.
        name: the device, for logs and thread names.
        on_start: called once on the worker's own thread.
    """

    def __init__(self, predictor: Predictor, name: str, on_start: Callable[[], None] | None = None) -> None:
        self.predictor = predictor
        self.name = name
        self._thread = ThreadPoolExecutor(1, f"{DEVICE_THREAD_PREFIX}{name}", initializer=on_start)

    async def run(self, options: PredictOptions, crops: Sequence[Crop]) -> list[Prediction | Exception]:
        """Probabilities in order; OutOfDeviceMemory in the place of a crop that does not fit the device even alone.

        Raises:
            DeviceLost: the device works no more.
            DeviceError: the device failed otherwise.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._predict, options, crops)

    def close(self) -> None:
        """Lets the thread end once its batch is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _predict(self, options: PredictOptions, crops: Sequence[Crop]) -> list[Prediction | Exception]:
        return [*predict_split(self.predictor.predict, crops, options)]
