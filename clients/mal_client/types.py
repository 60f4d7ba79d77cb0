"""What the client takes and gives: plain frozen values, gathered here under one name for callers.

Knows nothing of gRPC. Each group of values has a file of its own, and those import nothing of this one.
"""

from __future__ import annotations

from mal_client.results.dataset import (
    FAILED_LISTED,
    WHOLE_FILE,
    DatasetOptions,
    DatasetResult,
    FailedAnnotation,
    Only,
    Progress,
)
from mal_client.results.evaluation import Evaluation, Figures, GroupMiou, MeasuredInstance
from mal_client.results.labels import AS_SERVED, BoxLabel, BoxXywh, ImageInput, LabelOptions, ModelRef, Timing
from mal_client.results.server_info import ModelInfo, ModelStatus, ServerInfo, ServerLimits

__all__ = [
    "AS_SERVED",
    "FAILED_LISTED",
    "WHOLE_FILE",
    "BoxLabel",
    "BoxXywh",
    "DatasetOptions",
    "DatasetResult",
    "Evaluation",
    "FailedAnnotation",
    "Figures",
    "GroupMiou",
    "ImageInput",
    "LabelOptions",
    "MeasuredInstance",
    "ModelInfo",
    "ModelRef",
    "ModelStatus",
    "Only",
    "Progress",
    "ServerInfo",
    "ServerLimits",
    "Timing",
]
