"""Labels the boxes of many images with one Labeler: threads decode, crop and finish while the device predicts.

Validation, `mal-train evaluate` and `mal-train inference` all run through `label_boxes`. Each picture is decoded once,
crops of different pictures share batches, and what fails is answered with its reason while the rest goes on.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mal_train.core.coco.annotations import Annotation, ImageInfo, Reason
from mal_train.core.errors import BadBox, BadImage, DeviceError, OutOfDeviceMemory
from mal_train.core.masks.images import RgbImage, read_image
from mal_train.kernel.labeler.labeler import Crop, Labeler, Prediction, PredictOptions
from mal_train.kernel.labeler.oom import predict_split

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 8
"""Boxes of one image that are cropped by one task."""
IMAGES_AHEAD = 4


@dataclass(frozen=True)
class LabelFailure:
    """Why a box has no answer: a reason to sort by and a sentence to read."""

    reason: str
    message: str


Row = tuple[ImageInfo, Sequence[Annotation]]
Finish = Callable[[Annotation, Crop, Prediction], Result]


def label_boxes(
    labeler: Labeler,
    rows: Iterable[Row],
    image_dir: Path,
    finish: Finish[Result],
    *,
    options: PredictOptions | None = None,
    batch_size: int = 8,
    threads: int = 2,
) -> Generator[tuple[Annotation, Result | LabelFailure], None, None]:
    """Every box that is no crowd, in the order of `rows`, with what `finish` made of it or why there is nothing.

    Args:
        labeler: predicts on the calling thread.
        rows: images with their annotations, as `coco.by_image` gives them.
        image_dir: folder that the file names start at.
        finish: called on a worker thread with the annotation, its crop and its probability map.
        options: branch, flip, agreement; None: the student's answer.
        batch_size: crops in a batch, ≥ 1.
        threads: worker threads, ≥ 1.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="label") as pool:
        decoded = prefetch_map(pool, lambda row: _decode(row, image_dir), rows, threads + IMAGES_AHEAD)
        prepared = prefetch_map(pool, lambda part: _prepare(labeler, *part), _chunks(decoded), 2 * threads + 2)
        predicted = _predict(labeler, itertools.chain.from_iterable(prepared), options or PredictOptions(), batch_size)
        yield from prefetch_map(pool, lambda part: _finish(finish, *part), predicted, 2 * batch_size + threads)


def prefetch_map(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """`map` in order, with at most `ahead` items begun but not yet taken. What is begun is cancelled on the way out."""
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) >= ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()


_Decoded = tuple[RgbImage | LabelFailure | None, Sequence[Annotation]]
_Prepared = tuple[Annotation, Crop | LabelFailure]
_Predicted = tuple[Annotation, tuple[Crop, Prediction] | LabelFailure]


def _decode(row: Row, image_dir: Path) -> _Decoded:
    image, annotations = row
    wanted = [annotation for annotation in annotations if not annotation.iscrowd]
    if all(annotation.problem is not None for annotation in wanted):
        return None, wanted
    if image.problem is not None:
        return LabelFailure(str(Reason.IMAGE_UNUSABLE), image.problem), wanted
    try:
        return read_image(image_dir / image.file_name, expected_wh=image.size_wh), wanted
    except BadImage as error:
        return LabelFailure(error.reason, str(error)), wanted


def _chunks(decoded: Iterable[_Decoded]) -> Iterator[_Decoded]:
    for image, annotations in decoded:
        for start in range(0, len(annotations), CHUNK):
            yield image, annotations[start : start + CHUNK]


def _prepare(
    labeler: Labeler, image: RgbImage | LabelFailure | None, annotations: Sequence[Annotation]
) -> list[_Prepared]:
    found: list[_Prepared] = []
    for annotation in annotations:
        if annotation.problem is not None or image is None:
            found.append((annotation, LabelFailure(str(annotation.reason), annotation.problem or "")))
        elif isinstance(image, LabelFailure):
            found.append((annotation, image))
        else:
            crop = labeler.prepare(image, [annotation.box_xywh])[0]
            if isinstance(crop, BadBox):
                message = f"annotation {annotation.id!r}: {crop.problem}"
                found.append((annotation, LabelFailure(str(Reason.BAD_BOX), message)))
            else:
                found.append((annotation, crop))
    return found


def _predict(
    labeler: Labeler, prepared: Iterable[_Prepared], options: PredictOptions, batch_size: int
) -> Iterator[_Predicted]:
    waiting: list[_Prepared] = []
    crops = 0
    for annotation, crop in prepared:
        waiting.append((annotation, crop))
        crops += isinstance(crop, Crop)
        if crops == batch_size:
            yield from _predict_all(labeler, waiting, options)
            waiting, crops = [], 0
    yield from _predict_all(labeler, waiting, options)


def _predict_all(labeler: Labeler, waiting: Sequence[_Prepared], options: PredictOptions) -> Iterator[_Predicted]:
    """Answers in order; failures keep their places between the crops of the batch."""
    answers = iter(_predict_crops(labeler, [crop for _, crop in waiting if isinstance(crop, Crop)], options))
    for annotation, crop in waiting:
        if isinstance(crop, LabelFailure):
            yield annotation, crop
            continue
        answer = next(answers)
        yield annotation, answer if isinstance(answer, LabelFailure) else (crop, answer)


def _predict_crops(labeler: Labeler, crops: Sequence[Crop], options: PredictOptions) -> list[Prediction | LabelFailure]:
    """Probabilities in order, or why there are none; other errors of the device concern all crops of the batch."""
    try:
        found = predict_split(labeler.predict, crops, options)
    except DeviceError as error:
        return [LabelFailure("DEVICE_FAILED", str(error)) for _ in crops]
    return [LabelFailure("OUT_OF_MEMORY", str(x)) if isinstance(x, OutOfDeviceMemory) else x for x in found]


def _finish(
    finish: Finish[Result], annotation: Annotation, predicted: tuple[Crop, Prediction] | LabelFailure
) -> tuple[Annotation, Result | LabelFailure]:
    if isinstance(predicted, LabelFailure):
        return annotation, predicted
    return annotation, finish(annotation, *predicted)
