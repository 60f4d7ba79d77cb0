"""Provenance of a labeled file: everything that is needed to make its masks again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mal_client.types import DatasetOptions, LabelOptions, ModelRef, ServerInfo
from mal_train.core.settings import RULE_KEYS
from mal_train.core.version import distribution_version

if TYPE_CHECKING:
    from mal_train.core.coco.plan import DatasetPlan


_DETECTIONS = "detections_sha256"
OPTIONAL_KEYS = (*RULE_KEYS, _DETECTIONS)
"""Keys of `job_fingerprint` that only some jobs have."""


def answering_model(info: ServerInfo, options: LabelOptions) -> ModelRef:
    """Returns the weights and the branch that answer requests with these options."""
    return info.model if options.branch is None else replace(info.model, branch=options.branch)


def provenance_of(info: ServerInfo, options: LabelOptions) -> dict[str, Any]:
    """Returns the `mask_auto_labeler` entry of a labeled file; all servers of a job must agree in it."""
    model = answering_model(info, options)
    return {
        "model": model.name,
        "checkpoint_sha256": model.checkpoint_sha256,
        "arch": info.arch,
        "crop_size": info.crop_size,
        "margin_rate": info.margin_rate,
        "branch": str(model.branch),
        "thresholds": [options.threshold] * 3 if options.threshold is not None else list(info.mask_thresholds),
        "flip": options.flip,
        "min_component_area_px": options.min_component_area_px,
        "resolve_overlaps": options.resolve_overlaps,
        "score": info.score_meaning(options),
        "precision": info.precision,
        "network_engine": info.network_engine,
        "server_version": info.version,
        "client_version": distribution_version(),
    }


def job_fingerprint(plan: DatasetPlan, options: DatasetOptions) -> dict[str, Any]:
    """Returns the part of a job's manifest that tells which rows of which file are labeled.

    Options that change only how the file is written, such as `update_bbox`, have no part in it.
    """
    selection = {"only": str(options.only), "ids": sorted(map(repr, options.ids))}
    detections = {} if plan.detections is None else {_DETECTIONS: plan.detections.sha256}
    return {"input_sha256": plan.head.sha256, **detections, **selection, **options.rules.manifest()}
