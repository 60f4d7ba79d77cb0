"""Converts messages about the served models and the server to domain types and back. Pure functions, no calls."""

from collections.abc import Sequence

from mal.v1 import model_pb2, types_pb2

from mal_server.api.serialization.labeling_messages import Violations, read_branch, write_branches, write_model_ref
from mal_server.config.model_config import MAX_NAME_CHARS, NAME_RULE, is_name
from mal_server.config.server import ServerConfig
from mal_server.models.loader import ModelInfo
from mal_server.models.registry import ModelEntry
from mal_server.security.caller import Caller
from mal_train.core.masks.points import MAX_POINTS
from mal_train.core.settings import Branch


def read_load(request: model_pb2.LoadModelRequest) -> Branch | None:
    """Checks a request to load a model and returns its branch; None where it names none. Raises InvalidRequest."""
    violations = Violations()
    check_model_name(request.name, violations)
    if bool(request.folder) != bool(request.path):
        violations.add("path", "give folder and path, or neither to reload the configured checkpoint")
    branch = read_branch(request.branch, violations, "branch")
    violations.raise_if_any()
    return branch


def read_unload(request: model_pb2.UnloadModelRequest) -> str:
    """Returns the name of the model to unload. Raises InvalidRequest."""
    violations = Violations()
    check_model_name(request.name, violations)
    violations.raise_if_any()
    return request.name


def check_model_name(name: str, violations: Violations) -> None:
    """Adds a violation for a name that no model can have."""
    if not name:
        violations.add("name", "missing")
    elif not is_name(name):
        violations.add("name", f"{name[:MAX_NAME_CHARS]!r}; {NAME_RULE}")


def write_server_info(
    infos: Sequence[ModelInfo], config: ServerConfig, version: str, caller: Caller
) -> model_pb2.GetServerInfoResponse:
    """Builds the message with the served models, limits, and the folders that the caller may name."""
    limits, images = config.limits, config.limits.images()
    models = [write_model_info(info) for info in infos]
    return model_pb2.GetServerInfoResponse(
        version=version,
        model=models[0],
        models=models,
        limits=model_pb2.ServerLimits(
            max_request_bytes=limits.max_request_bytes,
            max_response_bytes=limits.max_response_bytes,
            max_boxes=limits.max_boxes,
            max_pixels=images.max_pixels,
            max_side=images.max_side,
            max_image_bytes=images.max_bytes,
            max_items_in_flight=limits.max_items_in_flight,
            image_cache_bytes=config.image_cache_bytes,
            max_points=MAX_POINTS,
        ),
        devices=infos[0].devices,
        precision=infos[0].precision,
        data_folders=[folder.name for folder in config.data_folders if caller.may_name(folder.name)],
    )


def write_model_info(info: ModelInfo) -> model_pb2.ModelInfo:
    """Builds the message that describes a model."""
    small, medium, large = info.labeler.mask_thres
    return model_pb2.ModelInfo(
        ref=write_model_ref(info, info.branch),
        arch=info.arch,
        crop_size=info.labeler.crop_size,
        margin_rate=info.labeler.margin_rate,
        mask_thresholds=model_pb2.SizeThresholds(small=small, medium=medium, large=large),
        categories=[_write_category(index, category) for index, category in enumerate(info.categories)],
        score_calibrated=info.labeler.calibration is not None,
        score_calibrated_with_flip=info.labeler.calibrated_with_flip,
        score_calibrated_resolved=info.labeler.calibrates_resolved,
        devices=info.devices,
        precision=info.precision,
        branches=write_branches(info.branches),
        network_engine=info.network_engine,
    )


def write_models(entries: Sequence[ModelEntry]) -> model_pb2.ListModelsResponse:
    """Builds the message with every model in memory and its state."""
    return model_pb2.ListModelsResponse(
        models=[
            model_pb2.ModelStatus(
                model=write_model_info(entry.info),
                state=model_pb2.MODEL_STATE_RETIRING if entry.is_draining else model_pb2.MODEL_STATE_SERVING,
                calls=entry.users,
                is_default=entry.is_default,
            )
            for entry in entries
        ]
    )


def write_loaded(info: ModelInfo, replaced: ModelInfo | None) -> model_pb2.LoadModelResponse:
    """Builds the message with the model that serves now, and the one that it replaced."""
    previous = None if replaced is None else write_model_ref(replaced, replaced.branch)
    return model_pb2.LoadModelResponse(model=write_model_info(info), replaced=previous)


def write_unloaded(info: ModelInfo) -> model_pb2.UnloadModelResponse:
    """Builds the message with the model that was unloaded."""
    return model_pb2.UnloadModelResponse(model=write_model_ref(info, info.branch))


def _write_category(index: int, category: dict[str, object]) -> types_pb2.Category:
    category_id, name = category.get("id"), category.get("name")
    fits = isinstance(category_id, int) and -(2**63) <= category_id < 2**63
    return types_pb2.Category(
        category_id=category_id if isinstance(category_id, int) and fits else index + 1,
        # A text of protobuf holds no half of a surrogate pair, which an annotation file can hold.
        name=name.encode(errors="replace").decode() if isinstance(name, str) else "",
    )
