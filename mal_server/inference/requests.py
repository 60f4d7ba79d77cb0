"""Requests and results of the pipeline. Knows nothing of gRPC or protos."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mal_server.errors import ResponseTooLarge
from mal_server.inference.image_store import ImageSource
from mal_server.scheduling.priority import Priority
from mal_train.core.errors import BadBox, DeviceError
from mal_train.core.images.container import ImageRegion
from mal_train.core.masks.encodings import EncodedMask, PngCrop, Polygons, Runs
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.points import Point
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import MaskFormat
from mal_train.kernel.labeler.types import Label, PredictOptions


@dataclass(frozen=True)
class OutputOptions:
    """Postprocessing of probabilities into masks; requests share a batch whatever these are.

    Attributes:
        threshold: mask threshold in (0, 1); None: the checkpoint's threshold for the size class.
        min_component_area_px: smaller connected components are removed, except the largest; 0: none.
        formats: encodings of each mask.
        polygon_tolerance_px: maximum distance between a polygon and the edge of its mask.
        resolve_overlaps: assigns each pixel that several boxes of the request claim to one of them.
    """

    threshold: float | None = None
    min_component_area_px: int = 0
    formats: tuple[MaskFormat, ...] = (MaskFormat.RLE,)
    polygon_tolerance_px: float = 0.0
    resolve_overlaps: bool = False


DEFAULT_OUTPUT_OPTIONS = OutputOptions()


@dataclass(frozen=True)
class LabelRequest:
    """A validated request.

    Attributes:
        image: source of the encoded image.
        expected_wh: (width, height) px that the boxes refer to, if stated.
        region: place of the image in a larger one, which boxes and masks refer to; None for a complete image.
        instance_ids: the client's ids, unique.
        boxes: x, y, width, height px, in the order of the ids; any floats, NaN included.
        predict_options: options of the network; only requests with equal ones share a batch.
        output_options: postprocessing.
        priority: priority in every queue.
        caller: callers of one priority take turns.
        deadline: event-loop time after which the result is not needed.
        points: of each box, in px of the image that the boxes refer to; any floats; None: no box has any.
    """

    image: ImageSource
    expected_wh: tuple[int, int] | None
    instance_ids: tuple[int, ...]
    boxes: tuple[Box, ...]
    predict_options: PredictOptions
    output_options: OutputOptions = DEFAULT_OUTPUT_OPTIONS
    priority: Priority = Priority.INTERACTIVE
    caller: str = ""
    deadline: float = math.inf
    region: ImageRegion | None = None
    points: tuple[tuple[Point, ...], ...] | None = None


@dataclass(frozen=True)
class InstanceResult:
    """The label of one instance, or an error that concerns it alone, and its mask in each requested format."""

    instance_id: int
    outcome: Label | BadBox | DeviceError
    masks: tuple[EncodedMask, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Memory of the masks, about; the run-length code of the label is one of them or as large."""
        own = len(self.outcome.rle.counts) if isinstance(self.outcome, Label) else 0
        return own + sum(_mask_bytes(mask) for mask in self.masks if not isinstance(mask, Rle))


class ResultBudget:
    """Bounds the masks of one request while they are collected.

    Args:
        max_bytes: limit of `InstanceResult.size_bytes` of all results.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0

    def spent_on(self, results: Sequence[InstanceResult]) -> Sequence[InstanceResult]:
        """Returns the results. Raises ResponseTooLarge if they exceed the limit together with all before."""
        self._size_bytes += sum(result.size_bytes for result in results)
        if self._size_bytes > self._max_bytes:
            raise ResponseTooLarge(
                [
                    (
                        "instances",
                        f"the masks take more than max_response_bytes ({self._max_bytes}); send fewer boxes at a time",
                    )
                ]
            )
        return results


def _mask_bytes(mask: EncodedMask) -> int:
    match mask:
        case Rle():
            return len(mask.counts)
        case Runs():
            return mask.counts.itemsize * len(mask.counts)
        case Polygons():
            return mask.rings.nbytes
        case PngCrop():
            return len(mask.content)


@dataclass(frozen=True)
class Timing:
    """Seconds of each stage, and the size of the device batch (0: no crop reached a device)."""

    queue_s: float = 0.0
    decode_s: float = 0.0
    infer_s: float = 0.0
    finish_s: float = 0.0
    batch_size: int = 0


@dataclass(frozen=True)
class PartialResult:
    """Results of some instances of a request."""

    results: tuple[InstanceResult, ...]
    timing: Timing

    @property
    def size_bytes(self) -> int:
        """Memory of all masks."""
        return sum(result.size_bytes for result in self.results)


def merge(partials: Sequence[PartialResult]) -> PartialResult:
    """Returns the partial results of one request as one."""
    results = tuple(result for partial in partials for result in partial.results)
    return PartialResult(results, merge_timings([partial.timing for partial in partials]))


def merge_timings(timings: Sequence[Timing]) -> Timing:
    """Returns the sums of device and finish times, the longest queueing and decoding time and the largest batch."""
    return Timing(
        queue_s=max(timing.queue_s for timing in timings),
        decode_s=max(timing.decode_s for timing in timings),
        infer_s=sum(timing.infer_s for timing in timings),
        finish_s=sum(timing.finish_s for timing in timings),
        batch_size=max(timing.batch_size for timing in timings),
    )
