"""What clients may know of the server, as messages."""

from mal.v1 import model_pb2, types_pb2

from mal_server.codec import write_model_ref
from mal_server.config import Limits
from mal_server.loading import ModelInfo


def write_server_info(info: ModelInfo, limits: Limits, version: str) -> model_pb2.GetServerInfoResponse:
    """What the server serves and accepts."""
    small, medium, large = info.labeler.mask_thres
    images = limits.images()
    return model_pb2.GetServerInfoResponse(
        version=version,
        model=model_pb2.ModelInfo(
            ref=write_model_ref(info, info.branch),
            arch=info.arch,
            crop_size=info.labeler.crop_size,
            margin_rate=info.labeler.margin_rate,
            mask_thresholds=model_pb2.SizeThresholds(small=small, medium=medium, large=large),
            categories=[_write_category(index, category) for index, category in enumerate(info.categories)],
            score_calibrated=info.labeler.calibration is not None,
        ),
        limits=model_pb2.ServerLimits(
            max_request_bytes=limits.max_request_bytes,
            max_response_bytes=limits.max_response_bytes,
            max_boxes=limits.max_boxes,
            max_pixels=images.max_pixels,
            max_side=images.max_side,
            max_image_bytes=images.max_bytes,
            max_items_in_flight=limits.max_items_in_flight,
        ),
        devices=info.devices,
        precision=info.precision,
    )


def _write_category(index: int, category: dict[str, object]) -> types_pb2.Category:
    category_id, name = category.get("id"), category.get("name")
    fits = isinstance(category_id, int) and -(2**63) <= category_id < 2**63
    return types_pb2.Category(
        category_id=category_id if isinstance(category_id, int) and fits else index + 1,
        name=name if isinstance(name, str) else "",
    )
