"""What made the masks of a file: enough to make them again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mal_client.types import LabelOptions, ModelRef, ServerInfo
from mal_train.core.version import distribution_version


def answering_model(info: ServerInfo, options: LabelOptions) -> ModelRef:
    """Which weights and network answer these options."""
    return info.model if options.branch is None else replace(info.model, branch=options.branch)


def provenance_of(info: ServerInfo, options: LabelOptions) -> dict[str, Any]:
    """The entry of a labeled file, and what servers that share a job must agree in."""
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
        "server_version": info.version,
        "client_version": distribution_version(),
    }
