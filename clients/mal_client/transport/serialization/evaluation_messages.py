"""Converts evaluation messages to the client's types and back. Pure functions.

Functions shared with labeling are in `labeling_messages`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from mal.v1 import evaluation_pb2, types_pb2

from mal_client.images.image_input import EncodedImage
from mal_client.transport.serialization.labeling_messages import (
    coco_rle,
    image_source,
    instance,
    label_options,
    wire_text,
)
from mal_client.types import BoxXywh, CocoMetrics, GroupMiou, LabelOptions
from mal_train.core.coco.annotations import JsonId
from mal_train.core.metrics.average_precision import AP_NAMES, LVIS_NAMES
from mal_train.core.metrics.report import CategoryRow
from mal_train.core.metrics.score_quality import ScoreQuality
from mal_train.core.settings import COCO_RULES, RotatedBoxes, RowRules

if TYPE_CHECKING:
    from mal_train.core.masks.rle import Rle


def evaluate_options(
    options: LabelOptions,
    categories: Iterable[types_pb2.Category],
    images_total: int,
    worst_count: int,
    token: bytes = b"",
    *,
    is_federated: bool = False,
) -> evaluation_pb2.EvaluateRequest:
    """Builds the first message of an evaluation.

    Args:
        options: options of labeling.
        categories: the categories, by their ids on the wire.
        images_total: number of images that follow.
        worst_count: number of instances to list, lowest IoU first.
        token: token of the evaluation to resume; empty = none.
        is_federated: only some categories are judged in each image, as in LVIS.
    """
    return evaluation_pb2.EvaluateRequest(
        options=evaluation_pb2.EvaluateOptions(
            label=label_options(options),
            categories=categories,
            is_federated=is_federated,
            images_total=images_total,
            worst_count=worst_count,
            want_records=True,
            resume_token=token,
        )
    )


def category(wire_id: int, name: str, frequency: str = "") -> types_pb2.Category:
    """Builds the message of a category; `frequency` is that of LVIS."""
    return types_pb2.Category(category_id=wire_id, name=wire_text(name), frequency=wire_text(frequency))


def evaluate_dataset(
    options: LabelOptions,
    names: tuple[str, str],
    worst_count: int,
    token: bytes = b"",
    rules: RowRules = COCO_RULES,
) -> evaluation_pb2.EvaluateRequest:
    """Builds the first message of an evaluation of a data set on the server.

    `names` are its annotations and images, each as FOLDER/PATH.
    """
    annotations, images = names
    dataset = evaluation_pb2.DatasetSource(
        annotations=wire_text(annotations),
        images=wire_text(images),
        crowd_as_objects=rules.crowd_as_objects,
        upright_boxes=rules.rotated_boxes is RotatedBoxes.UPRIGHT,
    )
    return evaluation_pb2.EvaluateRequest(
        options=evaluation_pb2.EvaluateOptions(
            label=label_options(options),
            dataset=dataset,
            worst_count=worst_count,
            want_records=True,
            resume_token=token,
        )
    )


def evaluate_image(
    item_id: str,
    image: EncodedImage,
    truths: Iterable[evaluation_pb2.GroundTruth],
    sha256: str | None = None,
    record: bytes = b"",
    *,
    continues: bool = False,
    not_exhaustive: Iterable[int] = (),
) -> evaluation_pb2.EvaluateRequest:
    """Builds the message with one image of an evaluation; with `sha256`, the hash replaces the content.

    With `continues`, it has more objects of the image before. `not_exhaustive`: categories of which not every object is
    annotated, as in LVIS.
    """
    return evaluation_pb2.EvaluateRequest(
        image=evaluation_pb2.EvaluateImage(
            item_id=item_id,
            image=image_source(image, sha256),
            ground_truth=truths,
            record=record,
            continues=continues,
            not_exhaustive_category_ids=not_exhaustive,
        )
    )


def evaluate_record(item_id: str, record: bytes) -> evaluation_pb2.EvaluateRequest:
    """Builds the message with the record of an image of a data set on the server."""
    return evaluation_pb2.EvaluateRequest(image=evaluation_pb2.EvaluateImage(item_id=item_id, record=record))


def ground_truth(
    instance_id: int, box: BoxXywh, category_id: int, rle: Rle, is_crowd: bool
) -> evaluation_pb2.GroundTruth:
    """Builds the message of one annotated object; the ids are those on the wire."""
    return evaluation_pb2.GroundTruth(
        instance=instance(instance_id, box), category_id=category_id, mask=coco_rle(rle), is_crowd=is_crowd
    )


def group_miou(group: evaluation_pb2.GroupMiou) -> GroupMiou:
    """Decodes the mean IoU of a group."""
    return GroupMiou(group.instances, group.miou if group.HasField("miou") else None)


def coco_metrics(metrics: evaluation_pb2.CocoFigures) -> CocoMetrics:
    """Decodes COCO's metrics by the names of AP_NAMES; None where unset."""
    fields = (field.name for field in evaluation_pb2.CocoFigures.DESCRIPTOR.fields)
    return {
        name: getattr(metrics, field) if metrics.HasField(field) else None  # type: ignore[arg-type]
        for name, field in zip(AP_NAMES, fields, strict=True)
    }


def lvis_metrics(
    result: evaluation_pb2.EvaluateResult, field_name: Literal["lvis_at_one", "lvis_at_score"]
) -> CocoMetrics:
    """Decodes LVIS's metrics in a field by the names of LVIS_NAMES; None where unset, {} without the field."""
    if not result.HasField(field_name):
        return {}
    metrics: evaluation_pb2.LvisFigures = getattr(result, field_name)
    fields = (field.name for field in evaluation_pb2.LvisFigures.DESCRIPTOR.fields)
    return {
        name: getattr(metrics, field) if metrics.HasField(field) else None  # type: ignore[arg-type]
        for name, field in zip(LVIS_NAMES, fields, strict=True)
    }


def score_quality(score: evaluation_pb2.ScoreQuality) -> ScoreQuality:
    """Decodes the quality of the score; None where unset."""
    return ScoreQuality(
        mean_score=score.mean_score if score.HasField("mean_score") else None,
        bias=score.bias if score.HasField("bias") else None,
        calibration_error=score.calibration_error if score.HasField("calibration_error") else None,
        spearman=score.rank_correlation if score.HasField("rank_correlation") else None,
        bad_count=score.bad_instances,
        bad_in_worst_fifth=score.bad_in_worst_fifth if score.HasField("bad_in_worst_fifth") else None,
    )


def category_row(row: evaluation_pb2.CategoryFigures, category_id: JsonId) -> CategoryRow:
    """Decodes the metrics of a category; `category_id` is its id in the data set."""
    return CategoryRow(
        category_id=category_id,
        name=row.category.name,
        count=row.instances,
        miou=row.miou,
        share_good=row.share_good,
        mean_score=row.mean_score,
    )
