"""Description of a server: its models and the limits of its requests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mal_client.errors import POINTS_UNSUPPORTED, FieldViolation, InvalidRequest
from mal_client.results.labels import SERVER_DEFAULTS, LabelOptions, ModelRef
from mal_train.core.settings import Branch, ScoreBasis, can_compare, score_meaning

if TYPE_CHECKING:
    from mal_train.core.images.header import ImageLimits


@dataclass(frozen=True)
class ServerLimits:
    """Limits of requests: bytes of messages and files, boxes and pixels of an image, items in flight on one stream."""

    max_request_bytes: int
    max_response_bytes: int
    max_boxes: int
    max_pixels: int
    max_side: int
    max_image_bytes: int
    max_items_in_flight: int
    image_cache_bytes: int = 0
    max_points: int = 0
    """Points of one box; 0 for a server that ignores points."""

    def images(self) -> ImageLimits:
        """Returns the limits of one image."""
        from mal_train.core.images.header import ImageLimits  # noqa: PLC0415 - for a short import of the client

        return ImageLimits(self.max_image_bytes, self.max_pixels, self.max_side)

    def check_points(self) -> None:
        """Raises InvalidRequest if the server ignores points (reason POINTS_UNSUPPORTED)."""
        if not self.max_points:
            raise InvalidRequest(
                "points: the server's version ignores them; update the server, or label without points",
                POINTS_UNSUPPORTED,
            )


@dataclass(frozen=True)
class ModelInfo:
    """One served model.

    Attributes:
        model: name and weights.
        arch: name of the backbone.
        crop_size: side of the network's input in px.
        margin_rate: margin around a box, as a fraction of its size.
        mask_thresholds: probabilities in (0, 1) for small, medium and large boxes.
        categories: names by class id.
        devices: that run it.
        precision: of its arithmetic, for example float32.
        score_calibrated: scores are expected IoUs, by a map fitted to one pass of the student.
        score_calibrated_with_flip: the maps were fitted to the mean with a mirrored pass.
        score_calibrated_resolved: labels with overlaps resolved have a score and a map of their own.
        branches: networks that it can run; empty when an older server does not report them.
        network_engine: what runs its network, torch or openvino.
    """

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
    score_calibrated_resolved: bool = False
    branches: tuple[Branch, ...] = ()
    network_engine: str = "torch"


@dataclass(frozen=True)
class ModelStatus:
    """State of a model in a server's memory.

    Attributes:
        info: the model.
        calls: number of calls that use it.
        is_retiring: it was replaced or unloaded, and only finishes its calls.
        is_default: it answers requests that name no model.
    """

    info: ModelInfo
    calls: int
    is_retiring: bool
    is_default: bool


@dataclass(frozen=True)
class ServerInfo:
    """Description of a server. The fields of `ModelInfo` describe its default model.

    Attributes:
        version: of the server.
        limits: of requests.
        models: all served models.
        data_folders: names of the folders that `Client.evaluate_on_server` may use.
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
    score_calibrated_resolved: bool = False
    branches: tuple[Branch, ...] = ()
    network_engine: str = "torch"
    models: tuple[ModelInfo, ...] = ()
    data_folders: tuple[str, ...] = ()

    def score_meaning(self, options: LabelOptions = SERVER_DEFAULTS) -> str:
        """Returns a description of the score of labels with these options, for files that hold labels."""
        manner = ScoreBasis(
            options.branch or self.model.branch,
            options.flip,
            overlaps_resolved=options.resolve_overlaps,
            threshold=options.threshold,
            min_component_area_px=options.min_component_area_px,
        )
        return score_meaning(
            manner,
            calibrated=self.score_calibrated,
            calibrated_with_flip=self.score_calibrated_with_flip,
            calibrated_resolved=self.score_calibrated_resolved,
        )

    @property
    def known_branches(self) -> tuple[Branch, ...]:
        """Branches that the model can run; all branches when an older server does not report them."""
        return self.branches or tuple(Branch)

    def for_options(self, options: LabelOptions) -> ServerInfo:
        """Returns the description with the model of these options as the default one.

        Jobs call it before any work, since every image would fail.

        Raises:
            InvalidRequest: the model is not served, or cannot run the branch or the agreement.
        """
        info = self.of_model(options.model)
        if options.branch is not None and options.branch not in info.known_branches:
            raise _both_branches_error(info, "branch", str(options.branch))
        if options.agreement and not can_compare(info.known_branches):
            raise _both_branches_error(info, "agreement", "true")
        return info

    def of_model(self, name: str | None) -> ServerInfo:
        """Returns the description with the named model as the default one; None keeps the server's default.

        Raises:
            InvalidRequest: the model is not served (reason MODEL_NOT_FOUND).
        """
        if name is None:
            return self
        match = next((info for info in self.models if info.model.name == name), None)
        if match is None:
            served = ", ".join(info.model.name for info in self.models) or self.model.name
            raise InvalidRequest(f"model {name!r}: not served; choose one of {served}", "MODEL_NOT_FOUND")
        return replace(self, **vars(match))


def _both_branches_error(info: ServerInfo, option: str, value: str) -> InvalidRequest:
    text = (
        f"it needs student and teacher, and model {info.model.name!r} has only the {' and the '.join(info.branches)}; "
        f"omit {option} (--{option}), or serve a checkpoint with both networks"
    )
    return InvalidRequest(f"{option}: {value}; {text}", violations=(FieldViolation(option, text),))
