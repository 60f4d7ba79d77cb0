"""What a server says of itself: the models that it serves, and what requests must keep to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mal_client.errors import RequestRefused
from mal_client.labels import AS_SERVED, LabelOptions, ModelRef
from mal_train.labeling.settings import Manner, score_meaning


@dataclass(frozen=True)
class ServerLimits:
    """What requests must keep to: bytes, boxes an image, pixels, and unanswered items of one stream."""

    max_request_bytes: int
    max_response_bytes: int
    max_boxes: int
    max_pixels: int
    max_side: int
    max_image_bytes: int
    max_items_in_flight: int
    image_cache_bytes: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """One model of a server; `categories` maps its class ids to names."""

    model: ModelRef
    arch: str
    crop_size: int
    margin_rate: float
    mask_thresholds: tuple[float, float, float]
    categories: dict[int, str]
    devices: tuple[str, ...]
    precision: str
    score_calibrated: bool
    score_calibrated_with_flip: bool = False


@dataclass(frozen=True)
class ModelStatus:
    """A model in a server's memory.

    Attributes:
        info: what it is.
        calls: how many use it right now.
        is_retiring: it was replaced or unloaded and finishes the calls that it has.
        is_default: it answers requests that name no model.
    """

    info: ModelInfo
    calls: int
    is_retiring: bool
    is_default: bool


@dataclass(frozen=True)
class ServerInfo:
    """What a server serves and accepts. The fields about a model are those of the default one.

    `categories` maps the model's class ids to names. `score_calibrated`: scores are expected IoUs, by a map fitted to
    one pass of the student or, with `score_calibrated_with_flip`, to its mean with a mirrored pass.
    """

    version: str
    model: ModelRef
    arch: str
    crop_size: int
    margin_rate: float
    mask_thresholds: tuple[float, float, float]
    categories: dict[int, str]
    limits: ServerLimits
    devices: tuple[str, ...]
    precision: str
    score_calibrated: bool = False
    score_calibrated_with_flip: bool = False
    models: tuple[ModelInfo, ...] = ()
    data_folders: tuple[str, ...] = ()

    def score_meaning(self, options: LabelOptions = AS_SERVED) -> str:
        """What the score of a label is that was asked for so, for files that carry labels."""
        manner = Manner(
            options.branch or self.model.branch,
            options.flip,
            shared_out=options.resolve_overlaps,
            threshold=options.threshold,
            min_component_area_px=options.min_component_area_px,
        )
        return score_meaning(manner, calibrated=self.score_calibrated, fitted_with_flip=self.score_calibrated_with_flip)

    def of_model(self, name: str | None) -> ServerInfo:
        """The same server as seen by requests that name a model; None = the default one.

        Raises:
            RequestRefused: nothing is served under this name.
        """
        if name is None:
            return self
        found = next((info for info in self.models if info.model.name == name), None)
        if found is None:
            served = ", ".join(info.model.name for info in self.models) or self.model.name
            raise RequestRefused(f"model {name!r} is not served; there are {served}", "MODEL_NOT_FOUND")
        return replace(self, **vars(found))
