"""Evaluates a served model on images with ground truth: a local data set, or one on the server."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from mal.v1 import evaluation_pb2

from mal_client.bulk.dispatcher import OnNotice
from mal_client.dataset.run import OnProgress
from mal_client.errors import ServerError
from mal_client.evaluation.checkpoint import EvaluationCheckpoint
from mal_client.evaluation.sources import LocalDataset, ServerDataset
from mal_client.evaluation.stream import EvaluationSource, EvaluationStream, RetryBudget
from mal_client.images.image_files import ImageFiles
from mal_client.transport.base import Transport
from mal_client.transport.serialization import evaluation_messages, labeling_messages
from mal_client.types import Evaluation, LabelOptions
from mal_train.core.coco.annotations import read_coco
from mal_train.core.coco.box_form import form_note
from mal_train.core.coco.left_out import ignored_rows
from mal_train.core.coco.members import content_sha256
from mal_train.core.settings import COCO_RULES, RowRules
from mal_train.core.size_class import SIZE_NAMES
from mal_train.core.storage.addresses import Location, redact


def evaluate(
    client: Transport,
    coco_json: Location,
    images_dir: ImageFiles | Location,
    options: LabelOptions,
    *,
    worst_count: int = 100,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    resume: Path | None = None,
    rules: RowRules = COCO_RULES,
) -> Evaluation:
    """Evaluates on a local data set; see `Client.evaluate`."""
    coco, files = read_coco(coco_json, rules), ImageFiles.of(images_dir)
    files.expect(coco.file_names)
    if on_notice is not None:
        for line in ignored_rows(coco.notes, redact(coco_json)):
            on_notice(line)
        if (note := form_note(coco.annotations, coco.images)) is not None:
            on_notice(f"{redact(coco_json)}: {note}")
    source = LocalDataset(coco, files, options=options, worst_count=worst_count)
    source.prepare(client)  # without a retry: raises at once where no server is reachable
    content = {"annotations_sha256": content_sha256(coco_json), "images": files.name, **rules.manifest()}
    job = {**content, "options": repr(options)}
    return _evaluate(client, source, job=job, on_progress=on_progress, on_notice=on_notice, resume=resume)


def evaluate_on_server(
    client: Transport,
    annotations: str,
    images: str,
    options: LabelOptions,
    *,
    worst_count: int = 100,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    resume: Path | None = None,
    rules: RowRules = COCO_RULES,
) -> Evaluation:
    """Evaluates on a data set on the server; see `Client.evaluate_on_server`."""
    source = ServerDataset(annotations, images, options, worst_count, rules)
    job = {"on_server": [annotations, images], "options": repr(options), **rules.manifest()}
    return _evaluate(client, source, job=job, on_progress=on_progress, on_notice=on_notice, resume=resume)


def _evaluate(
    client: Transport,
    source: EvaluationSource,
    *,
    job: dict[str, Any],
    on_progress: OnProgress | None,
    on_notice: OnNotice | None,
    resume: Path | None,
) -> Evaluation:
    with closing(EvaluationCheckpoint(resume, job)) as checkpoint:
        if len(checkpoint) and on_notice is not None:
            on_notice(f"{checkpoint.path}: resuming an unfinished evaluation; measurements so far: {len(checkpoint)}")
        stream = EvaluationStream(client, source, checkpoint, on_progress=on_progress, on_notice=on_notice)
        result = stream.run(RetryBudget(client.timeout_s))
        if on_notice is not None:
            for note in source.notes():
                on_notice(note)
        try:
            evaluation = _evaluation_of(result, source)
        except LookupError as error:
            raise ServerError(
                f"{client.address}: the result has an object that was not sent ({error}); check that client and server "
                "have compatible versions"
            ) from error
        checkpoint.clear()
    return evaluation


def _evaluation_of(result: evaluation_pb2.EvaluateResult, source: EvaluationSource) -> Evaluation:
    """Returns the server's metrics with the ids of the data set, and with the objects that were not sent."""
    skipped = Counter(source.skipped)
    skipped.update({row.reason: row.instances for row in result.skipped})
    return Evaluation(
        images=result.images,
        images_skipped=result.images_skipped + source.images_skipped,
        overall=evaluation_messages.group_miou(result.overall),
        by_size={name: evaluation_messages.group_miou(getattr(result, name)) for name in SIZE_NAMES},
        class_miou=result.class_miou if result.HasField("class_miou") else None,
        share_good=result.share_good if result.HasField("share_good") else None,
        ap_at_1=evaluation_messages.coco_metrics(result.ap_at_one),
        ap_at_score=evaluation_messages.coco_metrics(result.ap_at_score),
        lvis_at_1=evaluation_messages.lvis_metrics(result, "lvis_at_one"),
        lvis_at_score=evaluation_messages.lvis_metrics(result, "lvis_at_score"),
        score=evaluation_messages.score_quality(result.score),
        categories=tuple(
            evaluation_messages.category_row(row, source.category_id(row.category.category_id))
            for row in result.categories
        ),
        skipped=dict(skipped.most_common()),
        skipped_rows=tuple(source.skipped_rows),
        skipped_messages={row.reason: source.message(row.message) for row in result.skipped if row.message},
        worst=tuple(map(source.instance, result.worst)),
        model=labeling_messages.model_ref(result.model),
    )
