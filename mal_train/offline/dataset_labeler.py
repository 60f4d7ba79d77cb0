"""Labels the boxes of many images with one Labeler. Threads decode, crop and finish while the device predicts.

Validation, `mal-train evaluate` and `mal-train inference` use `label_boxes`. Each image is decoded once, and crops of
different images share batches. An item that fails yields a `LabelFailure`; the others continue.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TypeVar

from mal_train.core.coco.annotations import Annotation, ImageInfo, Reason
from mal_train.core.errors import BadBox, BadImage, BadPoint, DeviceError, DeviceLost, OutOfDeviceMemory
from mal_train.core.images.decoder import RgbImage, check_expected_size, decode_container
from mal_train.core.images.files import Images, ImageSource, images_of
from mal_train.core.images.header import MAX_PIXELS, read_container
from mal_train.core.images.large_tiff import open_large
from mal_train.core.images.tiff_reader import TiffReader
from mal_train.core.masks.image_patch import ImagePatch, cut_patch
from mal_train.core.storage.addresses import redact
from mal_train.core.storage.read_ahead import ReadAhead
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.oom import predict_split
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions

Item = TypeVar("Item")
Result = TypeVar("Result")

BOXES_PER_TASK = 8
"""Boxes of one image that one task crops."""
IMAGES_AHEAD = 4
FAILURES_PER_BATCH = 256
"""Failures that wait with the crops of a batch; with more, the batch runs before it is full."""
DEVICE_FAILED = "DEVICE_FAILED"
"""Reason of the boxes of a batch on which the device failed."""
TRANSIENT_REASONS = frozenset({DEVICE_FAILED})
"""Reasons of boxes that a later run may label."""


@dataclass(frozen=True)
class LabelFailure:
    """The failure to label one box.

    Attributes:
        reason: machine-readable reason, such as BAD_BOX.
        message: sentence for users.
    """

    reason: str
    message: str


Row = tuple[ImageInfo, Sequence[Annotation]]
Finish = Callable[[Annotation, Crop, Prediction], Result]


def label_boxes(
    labeler: Labeler,
    rows: Iterable[Row],
    image_dir: ImageSource,
    finish: Finish[Result],
    *,
    options: PredictOptions | None = None,
    batch_size: int = 8,
    threads: int = 2,
    resolves_overlaps: bool = False,
) -> Generator[tuple[Annotation, Result | LabelFailure], None, None]:
    """Yields every annotation that is not a crowd, in the order of `rows`, with the result of `finish` or a failure.

    Args:
        labeler: predicts on the calling thread.
        rows: images with their annotations, from `annotations.by_image`.
        image_dir: folder that file names are relative to; remote images are read ahead, by threads of their own.
        finish: called on a worker thread with an annotation, its crop and its prediction.
        options: options of the forward pass; None: the student, once.
        batch_size: crops in a batch, ≥ 1.
        threads: worker threads, ≥ 1.
        resolves_overlaps: the caller resolves overlaps, which needs complete images: larger ones fail with
            IMAGE_TOO_LARGE.

    Raises:
        DeviceLost: no further batch can run in this process.
    """
    images = images_of(image_dir)
    with ExitStack() as stack, ThreadPoolExecutor(threads, thread_name_prefix="label") as pool:
        read = _read_rows(rows, images, stack)
        decoded = prefetch_map(
            pool, lambda item: _decode(images, *item, resolves_overlaps=resolves_overlaps), read, threads + IMAGES_AHEAD
        )
        prepared = prefetch_map(pool, lambda task: _prepare(labeler, images, *task), _tasks(decoded), 2 * threads + 2)
        predicted = _predict(labeler, itertools.chain.from_iterable(prepared), options or PredictOptions(), batch_size)
        yield from prefetch_map(pool, lambda item: _finish(finish, *item), predicted, 2 * batch_size + threads)


def prefetch_map(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Yields `function(item)` in order, with at most `ahead` items in progress. Cancels them if the caller stops."""
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


_Image = RgbImage | TiffReader
"""Pixels of an image; those of a large TIFF are read by windows."""
_Decoded = tuple[_Image | LabelFailure | None, Sequence[Annotation]]
"""An image with its annotations; None for an image that no annotation needs."""
_Prepared = tuple[Annotation, Crop | LabelFailure]
_Predicted = tuple[Annotation, tuple[Crop, Prediction] | LabelFailure]


def _read_rows(rows: Iterable[Row], images: Images, stack: ExitStack) -> Iterator[tuple[Row, Callable[[], bytes]]]:
    """Returns each row with the function that reads its image; remote images are read ahead until `stack` closes."""

    def read(row: Row) -> bytes:
        return images.read(row[0].file_name, images.limits.max_bytes) if _needs_image(row) else b""

    if not images.is_remote:
        return ((row, partial(read, row)) for row in rows)
    ahead = stack.enter_context(ReadAhead(enumerate(rows), lambda item: read(item[1]), len, itemgetter(0)))
    return ((item[1], partial(ahead.take, item)) for item in ahead)


def _needs_image(row: Row) -> bool:
    image, annotations = row
    return image.problem is None and any(row.problem is None and not row.iscrowd for row in annotations)


def _decode(images: Images, row: Row, read: Callable[[], bytes], *, resolves_overlaps: bool) -> _Decoded:
    image, annotations = row
    instances = [annotation for annotation in annotations if not annotation.iscrowd]
    if all(annotation.problem is not None for annotation in instances):
        return None, instances
    if image.problem is not None:
        return LabelFailure(str(Reason.IMAGE_UNUSABLE), image.problem), instances
    try:
        location = images.locate(image.file_name)
        large = open_large(location, images.limits, str(location))
        if large is not None:
            header, reader = large
            check_expected_size(header, image.size_wh, str(location))
            if resolves_overlaps:
                _check_overlaps(header.size_wh, str(location))
            images.formats.add(image.file_name, header.pixel_format)
            return reader, instances
        name = redact(location)
        container = read_container(read(), limits=images.limits, name=name)
        pixels = decode_container(container, expected_wh=image.size_wh, name=name)
        images.formats.add(image.file_name, container.header.pixel_format)
        return pixels, instances
    except BadImage as error:
        return LabelFailure(error.reason, str(error)), instances


def _check_overlaps(size_wh: tuple[int, int], name: str) -> None:
    """Raises BadImage for an image of too many px to resolve overlaps (reason IMAGE_TOO_LARGE)."""
    width, height = size_wh
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"{name}: {width}x{height} px; overlaps are resolved on images of at most {MAX_PIXELS} px; label it "
            "without resolve_overlaps, or cut it",
            "IMAGE_TOO_LARGE",
        )


def _tasks(decoded: Iterable[_Decoded]) -> Iterator[_Decoded]:
    """Splits the annotations of each image into tasks of BOXES_PER_TASK."""
    for image, annotations in decoded:
        for start in range(0, len(annotations), BOXES_PER_TASK):
            yield image, annotations[start : start + BOXES_PER_TASK]


def _prepare(
    labeler: Labeler, images: Images, image: _Image | LabelFailure | None, annotations: Sequence[Annotation]
) -> list[_Prepared]:
    return [(annotation, _crop(labeler, images, image, annotation)) for annotation in annotations]


def _crop(
    labeler: Labeler, images: Images, image: _Image | LabelFailure | None, annotation: Annotation
) -> Crop | LabelFailure:
    if annotation.problem is not None or image is None:
        return LabelFailure(str(annotation.reason), annotation.problem or "")
    if isinstance(image, LabelFailure):
        return image
    try:
        part: RgbImage | ImagePatch
        if isinstance(image, TiffReader):
            part = cut_patch(image, annotation.box_xywh, labeler.config.margin_rate, images.limits)
        else:
            part = image
        (crop,) = labeler.prepare(part, [annotation.box_xywh], points=[annotation.points])
    except BadImage as error:
        return LabelFailure(error.reason, str(error))
    except BadBox as error:
        crop = error
    if isinstance(crop, BadBox):
        # Rows of a plan have no id; the row is named when it is written.
        name = "" if annotation.id is None else f"annotation {annotation.id!r}: "
        reason = Reason.BAD_POINT if isinstance(crop, BadPoint) else Reason.BAD_BOX
        return LabelFailure(str(reason), f"{name}{crop.problem}")
    return crop


def _predict(
    labeler: Labeler, prepared: Iterable[_Prepared], options: PredictOptions, batch_size: int
) -> Iterator[_Predicted]:
    batch: list[_Prepared] = []
    crop_count = 0
    for annotation, crop in prepared:
        batch.append((annotation, crop))
        crop_count += isinstance(crop, Crop)
        if crop_count == batch_size or len(batch) - crop_count == FAILURES_PER_BATCH:
            yield from _predict_batch(labeler, batch, options)
            batch, crop_count = [], 0
    yield from _predict_batch(labeler, batch, options)


def _predict_batch(labeler: Labeler, batch: Sequence[_Prepared], options: PredictOptions) -> Iterator[_Predicted]:
    """Yields the predictions of a batch in order. Failures keep their position between the crops."""
    predictions = iter(_predict_crops(labeler, [crop for _, crop in batch if isinstance(crop, Crop)], options))
    for annotation, crop in batch:
        if isinstance(crop, LabelFailure):
            yield annotation, crop
            continue
        prediction = next(predictions)
        yield annotation, prediction if isinstance(prediction, LabelFailure) else (crop, prediction)


def _predict_crops(labeler: Labeler, crops: Sequence[Crop], options: PredictOptions) -> list[Prediction | LabelFailure]:
    """Returns predictions in order. A device error other than lack of memory fails every crop of the batch.

    Raises:
        DeviceLost: all later batches would fail too.
    """
    try:
        predictions = predict_split(labeler.predict, crops, options)
    except DeviceLost:
        raise
    except DeviceError as error:
        return [LabelFailure(DEVICE_FAILED, str(error)) for _ in crops]
    return [LabelFailure("OUT_OF_MEMORY", str(p)) if isinstance(p, OutOfDeviceMemory) else p for p in predictions]


def _finish(
    finish: Finish[Result], annotation: Annotation, predicted: tuple[Crop, Prediction] | LabelFailure
) -> tuple[Annotation, Result | LabelFailure]:
    if isinstance(predicted, LabelFailure):
        return annotation, predicted
    return annotation, finish(annotation, *predicted)
