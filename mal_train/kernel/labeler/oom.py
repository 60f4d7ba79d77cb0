"""Halves a batch that does not fit into device memory, until it fits. Shared by offline labeling and the server."""

import logging
from collections.abc import Callable, Sequence

from mal_train.core.errors import OutOfDeviceMemory
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions

log = logging.getLogger(__name__)

Predict = Callable[[Sequence[Crop], PredictOptions], Sequence[Prediction]]


def predict_split(
    predict: Predict, crops: Sequence[Crop], options: PredictOptions
) -> list[Prediction | OutOfDeviceMemory]:
    """Returns a prediction for each crop in order, or the error of a crop that does not fit even alone.

    Raises:
        DeviceError: the device failed for another reason.
    """
    try:
        return list(predict(crops, options))
    except OutOfDeviceMemory as error:
        message = str(error)
    # Outside the except block: inside, the traceback would keep the failed batch's tensors on the device.
    if len(crops) == 1:
        log.error("out of memory on a single crop: %s", message)
        return [OutOfDeviceMemory(message)]
    half = (len(crops) + 1) // 2
    log.warning("out of memory on %d crops; retrying with %d at a time", len(crops), half)
    return predict_split(predict, crops[:half], options) + predict_split(predict, crops[half:], options)
