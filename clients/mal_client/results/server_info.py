"""What a server says of itself: the models that it serves, and what requests must keep to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mal_client.errors import FieldViolation, InvalidRequest
from mal_client.results.labels import SERVER_DEFAULTS, LabelOptions, ModelRef
from mal_train.core.settings import Branch, ScoreBasis, can_compare, score_meaning


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
    """One model of a server; `categories` maps its class ids to names.

    `branches`: those that it can run; empty where an older server does not say.
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
    branches: tuple[Branch, ...] = ()


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
    one pass of the student or, with `score_calibrated_with_flip`, to its mean with a mirrored pass. `branches`: those
    that the model can run; empty where an older server does not say.
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
    branches: tuple[Branch, ...] = ()
    models: tuple[ModelInfo, ...] = ()
    data_folders: tuple[str, ...] = ()

    def score_meaning(self, options: LabelOptions = SERVER_DEFAULTS) -> str:
        """What the score of a label is that was asked for so, for files that carry labels."""
        manner = ScoreBasis(
            options.branch or self.model.branch,
            options.flip,
            overlaps_resolved=options.resolve_overlaps,
            threshold=options.threshold,
            min_component_area_px=options.min_component_area_px,
        )
        return score_meaning(
            manner, calibrated=self.score_calibrated, calibrated_with_flip=self.score_calibrated_with_flip
        )

    @property
    def known_branches(self) -> tuple[Branch, ...]:
        """The branches that the model can run; all of them where the server does not say."""
        return self.branches or tuple(Branch)

    def for_options(self, options: LabelOptions) -> ServerInfo:
        """The same server as seen by requests with these options; asked before any work, since every image would fail.

        Raises:
            RequestRefused: the model that they name is not served, or cannot answer so.
        """
        seen = self.of_model(options.model)
        if options.branch is not None and options.branch not in seen.known_branches:
            raise _takes_both(seen, "branch", str(options.branch))
        if options.agreement and not can_compare(seen.known_branches):
            raise _takes_both(seen, "agreement", "true")
        return seen

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
            raise InvalidRequest(f"model {name!r} is not served; there are {served}", "MODEL_NOT_FOUND")
        return replace(self, **vars(found))


def _takes_both(info: ServerInfo, option: str, value: str) -> InvalidRequest:
    text = (
        f"it takes both networks, and model {info.model.name!r} holds the {' and the '.join(info.branches)} alone; "
        f"leave --{option} out, or serve a checkpoint of both networks"
    )
    return InvalidRequest(f"{option}: {value}; {text}", violations=(FieldViolation(option, text),))
