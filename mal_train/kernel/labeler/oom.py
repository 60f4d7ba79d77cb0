"""Runs a batch that may not fit the device, in halves where it does not. Shared by bulk labeling and the server."""

import logging
from collections.abc import Callable, Sequence

from mal_train.core.errors import OutOfDeviceMemory
from mal_train.kernel.labeler.labeler import Crop, Prediction, PredictOptions

log = logging.getLogger(__name__)

Predict = Callable[[Sequence[Crop], PredictOptions], Sequence[Prediction]]


def predict_split(
    predict: Predict, crops: Sequence[Crop], options: PredictOptions
) -> list[Prediction | OutOfDeviceMemory]:
    """Probabilities in order; the error in the place of a crop that does not fit the device even alone.

    Raises:
        DeviceError: the device failed otherwise.
    """
    try:
        return list(predict(crops, options))
    except OutOfDeviceMemory as error:
        message = str(error)
    # Outside of the except block: there the traceback would keep the failed batch's tensors on the device.
    if len(crops) == 1:
        log.error("out of memory on a single crop: %s", message)
        return [OutOfDeviceMemory(message)]
    half = (len(crops) + 1) // 2
    log.warning("out of memory on %d crops; trying %d at a time", len(crops), half)
    return predict_split(predict, crops[:half], options) + predict_split(predict, crops[half:], options)
