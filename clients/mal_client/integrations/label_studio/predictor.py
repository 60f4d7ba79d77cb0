"""One prediction request of Label Studio: rectangles of its tasks in, regions with masks out. Knows no HTTP."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from mal_client.client import Client
from mal_client.dataset.provenance import answering_model
from mal_client.integrations.label_studio.label_config import LabelConfig, read_label_config
from mal_client.integrations.label_studio.regions import (
    Json,
    Rectangle,
    check_picture,
    is_rectangle,
    mask_regions,
    read_rectangle,
)
from mal_client.types import BoxLabel, LabelOptions, ModelRef
from mal_train.core.errors import ConfigError, InputError
from mal_train.core.masks.images import read_header

TASKS_AT_ONCE: Final = 4
"""Tasks of one request that are labeled side by side, so that their boxes may share batches on the server."""

_log = logging.getLogger("mal_client.label_studio")


class ImageSource(Protocol):
    """Where the pictures of tasks come from."""

    def read(self, address: str) -> bytes:
        """The encoded picture. Raises BadImage."""


@dataclass
class TaskAnswer:
    """What came out of one task.

    Attributes:
        regions: one for each mask.
        scores: of those masks.
        faults: a sentence for each rectangle without a mask.
        model: which weights answered.
    """

    regions: list[Json] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    model: ModelRef | None = None


class Predictor:
    """Answers prediction requests with one labeling server.

    Args:
        client: of the labeling server.
        pictures: where the tasks' pictures come from.
        options: how boxes become masks.
        tolerance_px: see `regions.mask_regions`.
    """

    def __init__(self, client: Client, pictures: ImageSource, options: LabelOptions, *, tolerance_px: float) -> None:
        self._client = client
        self._pictures = pictures
        self._options = options
        self._tolerance_px = tolerance_px

    def model_version(self) -> str:
        """The weights that answer now, in a word that Label Studio shows and compares."""
        info = self._client.server_info().for_options(self._options)
        return version_of(answering_model(info, self._options))

    def predict(self, request: Mapping[str, Any]) -> Json:
        """The answer to a request, one entry a task: a prediction, [] without rectangles, or `error` without a mask.

        Raises:
            ConfigError: the project's configuration has no place for boxes or masks.
            InputError: the request is not one of Label Studio's.
            ClientError: the labeling server is not there.
        """
        config = read_label_config(str(request.get("label_config", "")))
        tasks = request.get("tasks")
        if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
            raise InputError("tasks: a list of tasks is needed")
        params = request.get("params")
        context = params.get("context") if isinstance(params, dict) else None
        drawn = context.get("result") if isinstance(context, dict) else None
        with ThreadPoolExecutor(TASKS_AT_ONCE) as pool:
            answers = list(pool.map(lambda task: self._answer(task, config, drawn), tasks))
        return {"results": [_prediction(answer) for answer in answers]}

    def _answer(self, task: Json, config: LabelConfig, drawn: Any) -> TaskAnswer:
        regions = drawn if isinstance(drawn, list) else drawn_regions(task)
        answer = TaskAnswer()
        by_picture: dict[str, list[Rectangle]] = {}
        for region in regions:
            if not isinstance(region, dict) or not is_rectangle(region) or region.get("from_name") not in config.boxes:
                continue
            try:
                rectangle = read_rectangle(region)
            except InputError as error:
                answer.faults.append(str(error))
                continue
            by_picture.setdefault(rectangle.to_name, []).append(rectangle)
        for to_name, rectangles in by_picture.items():
            try:
                self._label(task, config, to_name, rectangles, answer)
            except (InputError, ConfigError) as error:
                answer.faults.append(str(error))
        for fault in answer.faults:
            _log.warning("task %s: no mask: %s", task.get("id"), fault)
        return answer

    def _label(
        self, task: Json, config: LabelConfig, to_name: str, rectangles: Sequence[Rectangle], answer: TaskAnswer
    ) -> None:
        # Before any picture is fetched: a tool that takes no masks fails all of them.
        tools = [config.mask_tool(to_name, rectangle.labels) for rectangle in rectangles]
        data = task.get("data")
        address = data.get(config.pictures.get(to_name)) if isinstance(data, dict) else None
        if not isinstance(address, str):
            raise InputError(f"the task's data has no picture in the field {config.pictures.get(to_name)!r}")
        content = self._pictures.read(address)
        header = read_header(content, address)
        for rectangle in rectangles:
            check_picture(rectangle, header)
        labels = self._client.label_image(content, [rectangle.box for rectangle in rectangles], self._options)
        for rectangle, (tool, names), label in zip(rectangles, tools, labels, strict=True):
            fault = _fault(label)
            if fault is not None:
                answer.faults.append(f"region {rectangle.id!r}: {fault}")
                continue
            answer.regions += mask_regions(label, tool, names, f"{rectangle.id}-mask", self._tolerance_px)
            answer.scores.append(label.score)
            answer.model = label.model


def version_of(model: ModelRef) -> str:
    """Name, checkpoint and branch in one word."""
    return f"{model.name}-{model.checkpoint_sha256[:12]}-{model.branch}"


def drawn_regions(task: Json) -> list[Any]:
    """The regions of a task's newest annotation that was not skipped; of its newest prediction where there is none."""
    for kind in ("annotations", "predictions"):
        some = task.get(kind)
        rows = [row for row in some if isinstance(row, dict)] if isinstance(some, list) else []
        rows = [row for row in rows if isinstance(row.get("result"), list) and not row.get("was_cancelled")]
        if rows:
            newest: list[Any] = max(rows, key=lambda row: str(row.get("updated_at") or row.get("created_at")))["result"]
            return newest
    return []


def _fault(label: BoxLabel) -> str | None:
    if label.error is not None:
        return str(label.error)
    return None if label.area else "the mask is empty: no pixel of the box reached the threshold"


def _prediction(answer: TaskAnswer) -> Json | list[Json]:
    if answer.regions and answer.model is not None:
        # The lowest: Label Studio can then show the tasks with the least certain mask first.
        return {
            "result": answer.regions,
            "score": min(answer.scores),
            "model_version": version_of(answer.model),
        }
    # Without `result` Label Studio stores no prediction, and asks again the next time.
    return {"error": "; ".join(answer.faults)} if answer.faults else []
