"""Computes the response to a prediction request of Label Studio: regions with masks for the rectangles of its tasks.

A key point of a control for corrections belongs to the smallest rectangle around it. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from mal_client.client import Client
from mal_client.dataset.provenance import answering_model
from mal_client.integrations.label_studio.label_config import POINTS, LabelConfig, read_label_config
from mal_client.integrations.label_studio.regions import (
    Json,
    Rectangle,
    check_image,
    is_rectangle,
    mask_id,
    mask_regions,
    name_of,
    newest,
    read_key_point,
    read_rectangle,
    rectangle_id,
    smallest_around,
    tight_box_region,
)
from mal_client.integrations.missing_mask import missing_mask_reason
from mal_client.types import LabelOptions, ModelRef, Point
from mal_train.core.coco.json_values import as_json
from mal_train.core.errors import ConfigError, InputError, MalError
from mal_train.core.images.header import read_header

TASKS_AT_ONCE: Final = 4
"""Tasks of one request labeled concurrently, so that their boxes can share batches on the server."""

IMAGES_AT_ONCE: Final = 16
"""Images of all requests in memory."""

MAX_TASKS: Final = 10_000
"""Tasks of one request."""

MAX_RECTANGLES: Final = 10_000
"""Rectangles of one request, and key points of one request."""

MAX_MESSAGE_CHARS: Final = 1000
"""Length of one message. It may name all labels of the configuration, and every task may have one."""

MAX_PREDICT_S: Final = 600.0
"""Seconds after which a request starts no further image; Label Studio stops waiting after 100 s by default."""

_log = logging.getLogger("mal_client.label_studio")


class ImageSource(Protocol):
    """Source of the images of tasks."""

    def read(self, url: str) -> bytes:
        """Returns the encoded image. Raises BadImage."""


@dataclass(frozen=True)
class TaskRequest:
    """One task.

    Attributes:
        id: its ID, for messages.
        data: its data, with the URLs of its images.
        regions: regions to label: the rectangles of the project's controls.
        key_points: regions that correct masks: the key points of the project's controls.
    """

    id: str
    data: Mapping[str, Any]
    regions: tuple[Json, ...]
    key_points: tuple[Json, ...] = ()


@dataclass(frozen=True)
class PredictRequest:
    """The part of a prediction request that concerns boxes; it holds none of the other annotations.

    Attributes:
        config: the labeling configuration.
        tasks: in the order of the request.
    """

    config: LabelConfig
    tasks: tuple[TaskRequest, ...]


@dataclass
class TaskResult:
    """Result of one task.

    Attributes:
        regions: regions of the masks.
        scores: scores of the masks.
        errors: a message for each rectangle without a mask.
        model: the model that made the masks.
    """

    regions: list[Json] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    model: ModelRef | None = None

    def note(self, error: MalError) -> None:
        """Adds the message of an error, cut to MAX_MESSAGE_CHARS."""
        self.errors.append(str(error)[:MAX_MESSAGE_CHARS])


class Predictor:
    """Handles prediction requests with one labeling server.

    Args:
        client: client of the labeling server.
        images: source of the tasks' images.
        options: labeling options.
        tolerance_px: see `regions.mask_regions`.
        tight_boxes: also return the tight box of each mask.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: Client,
        images: ImageSource,
        options: LabelOptions,
        *,
        tolerance_px: float,
        tight_boxes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._images_at_once = threading.BoundedSemaphore(IMAGES_AT_ONCE)
        self._clock = clock
        self._client = client
        self._images = images
        self._options = options
        self._tolerance_px = tolerance_px
        self._tight_boxes = tight_boxes

    def model_version(self) -> str:
        """Returns the version of the served model, which Label Studio displays and compares."""
        info = self._client.server_info().for_options(self._options)
        return version_of(answering_model(info, self._options))

    def predict(self, request: PredictRequest) -> Json:
        """Returns one result per task: a prediction, [] for a task without rectangles, or `error` without any mask.

        Raises:
            ClientError: the labeling server is unavailable.
        """
        deadline = self._clock() + MAX_PREDICT_S
        with ThreadPoolExecutor(TASKS_AT_ONCE) as pool:
            results = list(pool.map(lambda task: self._label_task(task, request.config, deadline), request.tasks))
        return {"results": [_to_json(result) for result in results]}

    def _label_task(self, task: TaskRequest, config: LabelConfig, deadline: float) -> TaskResult:
        result = TaskResult()
        by_image: dict[str, list[Rectangle]] = {}
        for region in task.regions:
            try:
                rectangle = read_rectangle(region)
            except InputError as error:
                result.note(error)
                continue
            by_image.setdefault(rectangle.to_name, []).append(rectangle)
        points = _points_of(task, by_image, result)
        for to_name, rectangles in by_image.items():
            try:
                # Every image in memory counts, of all requests.
                with self._images_at_once:
                    if self._clock() > deadline:
                        raise InputError(f"not labeled within {MAX_PREDICT_S:g} s; select fewer tasks at once")
                    self._label_image(task, config, rectangles, points[to_name], result)
            except (InputError, ConfigError) as error:
                result.note(error)
        for message in result.errors:
            _log.warning("task %s: no mask: %s", task.id, message)
        return result

    def _label_image(
        self,
        task: TaskRequest,
        config: LabelConfig,
        rectangles: Sequence[Rectangle],
        points: Sequence[Sequence[Point]],
        result: TaskResult,
    ) -> None:
        to_name = rectangles[0].to_name
        # Before the image is fetched: without a control for masks, all of them fail.
        controls = [config.mask_control(to_name, rectangle.labels) for rectangle in rectangles]
        url = _image_url(task, to_name, config.image_fields)
        image_bytes = self._images.read(url)
        header = read_header(image_bytes, url)
        for rectangle in rectangles:
            check_image(rectangle, header)
        boxes = [rectangle.box for rectangle in rectangles]
        labels = self._client.label_image(image_bytes, boxes, self._options, points=points)
        for rectangle, (control, names), label in zip(rectangles, controls, labels, strict=True):
            reason = missing_mask_reason(label)
            if reason is not None:
                result.errors.append(f"region {rectangle.id!r}: {reason}")
                continue
            result.regions += mask_regions(label, control, names, mask_id(rectangle.id), self._tolerance_px)
            if self._tight_boxes:
                result.regions.append(tight_box_region(label, rectangle, config.boxes[rectangle.from_name]))
            result.scores.append(label.score)
            result.model = label.model


def _image_url(task: TaskRequest, to_name: str, image_fields: Mapping[str, str]) -> str:
    """Returns the URL of the image of some rectangles. Raises InputError if the task has none."""
    field_name = image_fields.get(to_name)
    if field_name is None:
        raise InputError(
            f"labeling configuration: no image {to_name[:100]!r}, which regions of the task are on; it has "
            f"{', '.join(map(repr, image_fields))}"
        )
    url = task.data.get(field_name)
    if not isinstance(url, str) or not url:
        stated = "missing" if url is None else as_json(url)
        fields = ", ".join(map(repr, task.data)) or "none"
        raise InputError(
            f"task data: field {field_name!r} is {stated}; the labeling configuration says that it is the URL of image "
            f"{to_name!r}; the fields of the task are: {fields}"
        )
    return url


def _points_of(
    task: TaskRequest, by_image: Mapping[str, Sequence[Rectangle]], result: TaskResult
) -> dict[str, list[list[Point]]]:
    """Returns the points of each rectangle, by image; notes the key points that belong to none."""
    points: dict[str, list[list[Point]]] = {name: [[] for _ in found] for name, found in by_image.items()}
    boxes = {name: np.array([rectangle.box for rectangle in found]) for name, found in by_image.items()}
    for region in task.key_points:
        try:
            found = read_key_point(region)
            index = smallest_around(found.point, boxes[found.to_name]) if found.to_name in boxes else None
            if index is None:
                raise InputError(f"{found.name}: in no rectangle; place it in the rectangle whose mask it corrects")
            points[found.to_name][index].append(found.point)
        except InputError as error:
            result.note(error)
    return points


def read_predict_request(body: Mapping[str, Any]) -> PredictRequest:
    """Reads a prediction request.

    Raises:
        ConfigError: the labeling configuration has no control for boxes.
        InputError: the request does not follow Label Studio's protocol, or exceeds MAX_TASKS or MAX_RECTANGLES.
    """
    config = read_label_config(str(body.get("label_config", "")))
    tasks = body.get("tasks")
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise InputError("tasks: expected a list of objects")
    if len(tasks) > MAX_TASKS:
        raise InputError(f"tasks: {len(tasks)}; at most {MAX_TASKS} per request; select fewer tasks at once")
    params = body.get("params")
    context = params.get("context") if isinstance(params, dict) else None
    drawn = context.get("result") if isinstance(context, dict) else None
    read = tuple(_task_request(task, config, drawn) for task in tasks)
    for name, count in (
        ("rectangles", sum(len(task.regions) for task in read)),
        ("key points", sum(len(task.key_points) for task in read)),
    ):
        if count > MAX_RECTANGLES:
            raise InputError(f"tasks: {count} {name}; at most {MAX_RECTANGLES} per request; select fewer tasks")
    return PredictRequest(config, read)


def _task_request(task: Json, config: LabelConfig, drawn: Any) -> TaskRequest:
    regions = drawn if isinstance(drawn, list) else drawn_regions(task)
    data = task.get("data")
    return TaskRequest(
        id=name_of(task.get("id")),
        data=data if isinstance(data, dict) else {},
        regions=tuple(_drawn_boxes(regions, config)),
        key_points=tuple(region for region in regions if _is_key_point(region, config)),
    )


def _drawn_boxes(regions: Sequence[Any], config: LabelConfig) -> Iterator[Json]:
    """Yields the rectangles, but for the tight boxes that this backend has added to them or to their masks."""
    names = {name_of(region.get("id")) for region in regions if isinstance(region, dict)}
    for region in regions:
        if _is_box(region, config):
            rectangle = rectangle_id(region)
            if rectangle is None or names.isdisjoint((rectangle, mask_id(rectangle))):
                yield region


def _is_box(region: Any, config: LabelConfig) -> bool:
    if not isinstance(region, dict) or not is_rectangle(region):
        return False
    control = region.get("from_name")
    return isinstance(control, str) and control in config.boxes


def _is_key_point(region: Any, config: LabelConfig) -> bool:
    if not isinstance(region, dict) or region.get("type") not in POINTS.values():
        return False
    control = region.get("from_name")
    return isinstance(control, str) and control in config.points


def version_of(model: ModelRef) -> str:
    """Returns name, checkpoint and branch, joined by hyphens."""
    return f"{model.name}-{model.checkpoint_sha256[:12]}-{model.branch}"


def drawn_regions(task: Json) -> list[Any]:
    """Returns the regions of the newest annotation of a task that was not skipped, or else of its newest prediction."""
    for field_name in ("annotations", "predictions"):
        value = task.get(field_name)
        rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
        rows = [row for row in rows if isinstance(row.get("result"), list) and not row.get("was_cancelled")]
        if rows:
            result: list[Any] = newest(rows)["result"]
            return result
    return []


def _to_json(result: TaskResult) -> Json | list[Json]:
    if result.regions and result.model is not None:
        # The lowest score: Label Studio can then sort tasks by their least certain mask.
        return {
            "result": result.regions,
            "score": min(result.scores),
            "model_version": version_of(result.model),
        }
    # Without `result`, Label Studio stores no prediction and requests one again.
    return {"error": "; ".join(result.errors)} if result.errors else []
