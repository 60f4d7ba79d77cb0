"""Arguments and results of the client: frozen dataclasses, all importable from here.

Knows nothing of gRPC. The modules of `mal_client.results` define them and do not import this one.
"""

from __future__ import annotations

from mal_client.results.dataset import (
    DEFAULT_DATASET_OPTIONS,
    FAILED_LISTED,
    DatasetOptions,
    DatasetResult,
    FailedAnnotation,
    Progress,
)
from mal_client.results.evaluation import CocoMetrics, Evaluation, GroupMiou, MeasuredInstance
from mal_client.results.labels import (
    SERVER_DEFAULTS,
    BoxLabel,
    BoxPoints,
    BoxXywh,
    ImageInput,
    LabelOptions,
    ModelRef,
    Timing,
)
from mal_client.results.server_info import ModelInfo, ModelStatus, ServerInfo, ServerLimits
from mal_train.core.masks.points import Point
from mal_train.core.settings import COCO_RULES, RotatedBoxes, RowFilter, RowRules

__all__ = [
    "COCO_RULES",
    "DEFAULT_DATASET_OPTIONS",
    "FAILED_LISTED",
    "SERVER_DEFAULTS",
    "BoxLabel",
    "BoxPoints",
    "BoxXywh",
    "CocoMetrics",
    "DatasetOptions",
    "DatasetResult",
    "Evaluation",
    "FailedAnnotation",
    "GroupMiou",
    "ImageInput",
    "LabelOptions",
    "MeasuredInstance",
    "ModelInfo",
    "ModelRef",
    "ModelStatus",
    "Point",
    "Progress",
    "RotatedBoxes",
    "RowFilter",
    "RowRules",
    "ServerInfo",
    "ServerLimits",
    "Timing",
]
