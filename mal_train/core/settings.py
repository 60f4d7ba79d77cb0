"""Defines the settings that turn boxes into masks, as checkpoints store them.

A label depends on the image, the box, the weights and these settings only. Imports neither torch nor NumPy, so that the
client can import it in little time.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any, TypeVar

from mal_train.core.errors import ConfigError
from mal_train.core.score_model import MASK_FEATURES, RESOLVED_FEATURES, ScoreModel

Choice = TypeVar("Choice", bound=StrEnum)

Knots = tuple[tuple[float, float], ...]
"""Piecewise linear map from [0, 1] to [0, 1]: points (x, y), x strictly rising, y not falling."""


def member_of(choices: type[Choice], value: str, name: str) -> Choice:
    """Returns the member of an enumeration that a caller of the library gives, as such or by its value.

    Members are compared by identity: a text that was taken as it is would select none of them.

    Raises:
        ConfigError: there is no such member; the message begins with `name`.
    """
    try:
        return choices(value)
    except ValueError:
        raise ConfigError(f"{name}: {value!r}; it must be one of {', '.join(choices)}") from None


class Compat(StrEnum):
    """Compatibility mode: `tao` reproduces the published implementation where this one differs on purpose."""

    NONE = "none"
    TAO = "tao"


class Branch(StrEnum):
    """Network that predicts: `mixed` averages the logit maps of student and teacher."""

    STUDENT = "student"
    TEACHER = "teacher"
    MIXED = "mixed"


def branches_of(*, has_teacher: bool) -> tuple[Branch, ...]:
    """Returns the branches that a checkpoint can run: all with a teacher, otherwise the student only."""
    return tuple(Branch) if has_teacher else (Branch.STUDENT,)


def can_compare(branches: Iterable[Branch]) -> bool:
    """Returns True if `branches` allow agreement to be measured, which needs the masks of both networks."""
    return Branch.MIXED in branches


class NetworkEngine(StrEnum):
    """Library that runs the networks: torch on all devices, openvino on CPUs."""

    TORCH = "torch"
    OPENVINO = "openvino"


class Precision(StrEnum):
    """Dtype of the forward pass. `auto` is bfloat16 on devices with fast bfloat16 kernels, else float32.

    With openvino, `auto` is float32. int8 is the dtype of layers with calibrated ranges (`networks.quantization`).
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


class MaskFormat(StrEnum):
    """Encoding of a mask."""

    RLE = "rle"
    """Compressed run lengths of COCO, as pycocotools writes them; lossless, the smallest encoding."""
    UNCOMPRESSED = "uncompressed"
    """The same run lengths as integers; lossless, several times larger."""
    POLYGONS = "polygons"
    """Closed polygons on pixel corners, holes included; lossless at a tolerance of 0 px."""
    PNG = "png"
    """Tight crop of the mask as a 1-bit PNG; lossless."""


class RowFilter(StrEnum):
    """Selects the annotations to label; the others are copied unchanged."""

    ALL = "all"
    """All annotations; existing masks are replaced."""
    MISSING = "missing"
    """Annotations without a mask, and those that failed in an earlier run."""
    FLAGGED = "flagged"
    """Annotations that an earlier run flagged, and those that failed in it."""
    IDS = "ids"
    """Annotations in a list of ids."""


class BoxForm(StrEnum):
    """Meaning of the four numbers of `bbox`."""

    XYWH = "xywh"
    """x, y, width, height in px, as in COCO."""
    CORNERS = "corners"
    """x_min, y_min, x_max, y_max in px."""
    SHARES = "shares"
    """x, y, width, height as shares of the width and the height of the image."""


class RotatedBoxes(StrEnum):
    """Treatment of boxes that are rotated, as CVAT exports them."""

    REFUSE = "refuse"
    """The annotation gets no mask: the mask would be misplaced."""
    UPRIGHT = "upright"
    """The smallest upright box around it is labeled, and the annotation gets the flag BOX_ROTATED."""


@dataclass(frozen=True)
class RowRules:
    """Rules by which rows of COCO files are read where files of different origin mean different things.

    Attributes:
        crowd_as_objects: read a row with `iscrowd` 1 as one object; CVAT sets it for every mask.
        rotated_boxes: what to do with a rotated box.

    Raises:
        ConfigError: an unknown value of `rotated_boxes`.
    """

    crowd_as_objects: bool = False
    rotated_boxes: RotatedBoxes = RotatedBoxes.REFUSE

    def __post_init__(self) -> None:
        rotated = member_of(RotatedBoxes, self.rotated_boxes, "--rotated-boxes (rotated_boxes=)")
        object.__setattr__(self, "rotated_boxes", rotated)

    def manifest(self) -> dict[str, Any]:
        """Returns the rules that are not the default as JSON data, for the manifest of a job, by RULE_KEYS."""
        crowds, rotated = RULE_KEYS
        stated = {crowds: self.crowd_as_objects, rotated: str(self.rotated_boxes)}
        return {key: value for key, value in stated.items() if value not in (False, str(RotatedBoxes.REFUSE))}


RULE_KEYS = ("crowd_as_objects", "rotated_boxes")
"""Keys of `RowRules` in the manifest of a job."""


COCO_RULES = RowRules()
"""Crowd regions are regions of many objects, and rotated boxes get no mask."""


LABELED = RowRules(rotated_boxes=RotatedBoxes.UPRIGHT)
"""For files that have masks: their masks count, whatever their boxes are."""


class ScoreType(StrEnum):
    """Measure that a score is computed from, before calibration.

    `stability`: pixels above the threshold + STABILITY_LOGITS divided by pixels above the threshold − STABILITY_LOGITS
    (logits): how little the mask depends on the exact threshold. `probability`: mean foreground probability over the
    mask, the published score. `regression`: IoU that a `ScoreModel` predicts, which is fitted on masks.
    docs/experiments/masks-of-photographs.md has measurements: regression ranks masks best, then stability.
    """

    STABILITY = "stability"
    PROBABILITY = "probability"
    REGRESSION = "regression"


MAX_CROP_SIZE = 2048
"""Upper bound of the crop side in px; the largest published crops have 512 px."""
MAX_SIZES = {
    "mask_head_num_convs": 64,
    "mask_head_hidden_channel": 1024,
    "mask_head_out_channel": 1024,
    "mask_scale_ratio_pre": 4,
}
"""Upper bounds of the sizes of a network that specs and checkpoints may state."""
MAX_SCALE_RATIO = 8.0
"""Upper bound of mask_scale_ratio."""
MAX_KNOTS = 10_000
"""Upper bound of the points of a calibration; a fit has some hundred."""

STABILITY_LOGITS = 2.0
"""Distance in logits by which `ScoreType.STABILITY` moves the threshold up and down."""


@dataclass(frozen=True)
class ScoreBasis:
    """Options of a prediction that change its scores. The default is one pass of the student with no extras.

    Attributes:
        branch: network that predicts.
        flip: average with the prediction for the mirrored crop.
        margins: box margins to average over; () uses the checkpoint's margin.
        overlaps_resolved: each contested pixel is assigned to one of its boxes.
        threshold: one threshold for all sizes; None uses the checkpoint's three.
        min_component_area_px: mask components smaller than this are removed.
        refined_edges: mask edges are moved to color edges.
    """

    branch: Branch = Branch.STUDENT
    flip: bool = False
    margins: tuple[float, ...] = ()
    overlaps_resolved: bool = False
    threshold: float | None = None
    min_component_area_px: int = 0
    refined_edges: bool = False

    def differences(self, *, calibrated_with_flip: bool, calibrated_resolved: bool) -> list[str]:
        """Describes each option that differs from the predictions that the calibration was fitted on."""
        margins = ", ".join(f"{margin:g}" for margin in self.margins)
        differs = {
            f"branch {self.branch}": self.branch is not Branch.STUDENT,
            "a mirrored pass": self.flip and not calibrated_with_flip,
            "no mirrored pass": calibrated_with_flip and not self.flip,
            f"margins {margins}": bool(self.margins),
            "overlaps resolved": self.overlaps_resolved and not calibrated_resolved,
            f"threshold {self.threshold}": self.threshold is not None,
            f"components under {self.min_component_area_px} px removed": self.min_component_area_px > 0,
            "edges refined": self.refined_edges,
        }
        return [description for description, is_different in differs.items() if is_different]


def score_meaning(
    basis: ScoreBasis,
    *,
    calibrated: bool,
    calibrated_with_flip: bool = False,
    calibrated_resolved: bool = False,
    score_type: ScoreType | None = None,
) -> str:
    """Returns the description of a score that labeled files carry.

    Args:
        basis: options of the prediction.
        calibrated: a calibration maps scores to expected IoU.
        calibrated_with_flip: the calibration was fitted on predictions averaged with the mirrored crop.
        calibrated_resolved: masks whose overlaps are resolved have a calibration of their own.
        score_type: measure behind the score; None if unknown, as it is to a client.

    >>> score_meaning(ScoreBasis(), calibrated=True)
    'expected IoU, calibrated'
    >>> score_meaning(ScoreBasis(flip=True), calibrated=True)
    'expected IoU, calibrated for one pass of the student, not for: a mirrored pass'
    """
    if calibrated:
        differences = ", ".join(
            basis.differences(calibrated_with_flip=calibrated_with_flip, calibrated_resolved=calibrated_resolved)
        )
        passes = "two passes (one mirrored)" if calibrated_with_flip else "one pass"
        caveat = f" for {passes} of the student, not for: {differences}" if differences else ""
        return f"expected IoU, calibrated{caveat}"
    meanings = {
        None: "stability of the mask (mean foreground probability with compat tao and in older checkpoints)",
        ScoreType.STABILITY: "stability of the mask",
        ScoreType.PROBABILITY: "mean foreground probability",
        ScoreType.REGRESSION: "IoU predicted by regression",
    }
    return f"{meanings[score_type]}, not calibrated"


def calibrated(score: float, knots: Knots) -> float:
    """Returns the value at `score` of the piecewise linear map through `knots`.

    >>> calibrated(0.5, ((0.0, 0.0), (1.0, 0.8)))
    0.4
    """
    after = bisect_right(knots, score, key=lambda knot: knot[0])
    if after in (0, len(knots)):
        return knots[min(after, len(knots) - 1)][1]
    (x0, y0), (x1, y1) = knots[after - 1 : after + 1]
    return float((y1 - y0) / (x1 - x0) * (score - x0) + y0)


@dataclass(frozen=True)
class FittedScore:
    """Score that is fitted to masks.

    Attributes:
        model: predicts the IoU of a mask from its features.
        calibration: map from that prediction to expected IoU.
    """

    model: ScoreModel
    calibration: Knots

    def __post_init__(self) -> None:
        _check_knots(self.calibration)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object that checkpoints store."""
        return {"model": self.model.to_dict(), "calibration": [list(knot) for knot in self.calibration]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "FittedScore":
        """Inverse of `to_dict`; raises ConfigError for a score that this version cannot evaluate."""
        return cls(ScoreModel.from_dict(data["model"]), _read_knots(data["calibration"]))


@dataclass(frozen=True)
class LabelerConfig:
    """Settings that turn a box into a crop and a probability map into a mask; part of every checkpoint.

    Attributes:
        crop_size: side of the square network input in px; a multiple of the backbone's patch size.
        margin_rate: growth of the crop window: half of this rate times the half extent of the box, on each side; 0.6
            in TAO.
        mask_thres: thresholds in (0, 1) for small, medium and large boxes; a pixel above its threshold is foreground.
        compat: see `Compat`.
        calibration: map from the score to expected IoU, fitted on masks of the student with these settings; None
            leaves scores as measured.
        score: measure behind the score; `compat: tao` always uses the probability.
        score_model: the fitted model of `ScoreType.REGRESSION`; None with every other score.
        calibrated_with_flip: calibrations were fitted on predictions averaged with the mirrored crop.
        resolved_score: score of masks whose overlaps are resolved, beside `ScoreType.REGRESSION`; None: these have the
            score of all masks.
    """

    crop_size: int = 512
    margin_rate: float = 0.6
    mask_thres: tuple[float, float, float] = (0.1, 0.1, 0.1)
    compat: Compat = Compat.NONE
    calibration: Knots | None = None
    score: ScoreType = ScoreType.STABILITY
    calibrated_with_flip: bool = False
    score_model: ScoreModel | None = None
    resolved_score: FittedScore | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.crop_size <= MAX_CROP_SIZE:
            raise ConfigError(
                f"crop_size: {self.crop_size} px; it must be a positive multiple of the patch size, {MAX_CROP_SIZE} px "
                "or less"
            )
        if not 0.0 <= self.margin_rate <= 4.0:
            raise ConfigError(f"margin_rate: {self.margin_rate}; it must lie in [0, 4] (TAO uses 0.6)")
        if len(self.mask_thres) != 3 or not all(0.0 < t < 1.0 for t in self.mask_thres):
            raise ConfigError(f"mask_thres: {self.mask_thres}; three thresholds between 0 and 1 (small, medium, large)")
        if self.calibration is not None:
            _check_knots(self.calibration)
        if (self.score_model is not None) != (self.score is ScoreType.REGRESSION):
            given = "none" if self.score_model is None else "given"
            raise ConfigError(
                f"score_model: {given}, but score is {self.score}; regression has a model, no other score"
            )
        if self.score_model is not None and self.score_model.features != MASK_FEATURES:
            raise ConfigError("score_model: fitted to masks with resolved overlaps; it must be fitted to complete ones")
        if self.resolved_score is not None:
            self._check_resolved_score(self.resolved_score)

    def without_fitted_score(self) -> "LabelerConfig":
        """Returns these settings with a score that is not fitted to masks: stability in place of regression."""
        score = ScoreType.STABILITY if self.score is ScoreType.REGRESSION else self.score
        return replace(
            self, score=score, score_model=None, calibration=None, calibrated_with_flip=False, resolved_score=None
        )

    def score_meaning(self, basis: ScoreBasis = ScoreBasis()) -> str:
        """Returns the description of the scores of predictions with these options, for files that carry labels."""
        if basis.margins == (self.margin_rate,):
            basis = replace(basis, margins=())
        return score_meaning(
            basis,
            calibrated=self.calibration is not None,
            calibrated_with_flip=self.calibrated_with_flip,
            calibrated_resolved=self.calibrates_resolved,
            score_type=self.score_type,
        )

    @property
    def score_type(self) -> ScoreType:
        """Measure behind the scores: `score`, except with `compat: tao`."""
        return ScoreType.PROBABILITY if self.compat is Compat.TAO else self.score

    @property
    def calibrates_resolved(self) -> bool:
        """True if masks whose overlaps are resolved have a score of their own; never with `compat: tao`."""
        return self.resolved_score is not None and self.score_type is ScoreType.REGRESSION

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object that checkpoints store."""
        content: dict[str, Any] = {
            "crop_size": self.crop_size,
            "margin_rate": self.margin_rate,
            "mask_thres": list(self.mask_thres),
            "compat": str(self.compat),
            "calibration": None if self.calibration is None else [list(knot) for knot in self.calibration],
            "score": str(self.score),
            "calibrated_with_flip": self.calibrated_with_flip,
        }
        fitted = {"score_model": self.score_model, "resolved_score": self.resolved_score}
        return {**content, **{name: one.to_dict() for name, one in fitted.items() if one is not None}}

    def summary(self) -> dict[str, Any]:
        """Returns `to_dict` with the number of features of each score model in place of its weights, for users."""
        content = {k: v for k, v in self.to_dict().items() if k not in ("score_model", "resolved_score")}
        if self.score_model is not None:
            content["score_features"] = len(self.score_model.weight)
        if self.resolved_score is not None:
            content["resolved_score_features"] = len(self.resolved_score.model.weight)
        return content

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LabelerConfig":
        """Reads `to_dict`. Checkpoints without a score or a calibration predate both and use the probability."""
        small, medium, large = (float(t) for t in data["mask_thres"])
        knots, model, resolved = (data.get(key) for key in ("calibration", "score_model", "resolved_score"))
        return cls(
            int(data["crop_size"]),
            float(data["margin_rate"]),
            (small, medium, large),
            Compat(data["compat"]),
            None if knots is None else _read_knots(knots),
            ScoreType(data.get("score", ScoreType.PROBABILITY)),
            bool(data.get("calibrated_with_flip", False)),
            None if model is None else ScoreModel.from_dict(model),
            None if resolved is None else _read_resolved_score(resolved),
        )

    def _check_resolved_score(self, resolved: FittedScore) -> None:
        if self.score_model is None:
            raise ConfigError(f"resolved_score: given, but score is {self.score}; only regression has one")
        if self.calibration is None:
            raise ConfigError("resolved_score: given, but calibration is none; the score of all masks needs one too")
        if resolved.model.features != RESOLVED_FEATURES or resolved.model.pooled != self.score_model.pooled:
            raise ConfigError(
                f"resolved_score: {len(resolved.model.features)} features of masks and {resolved.model.pooled} pooled; "
                f"it must have {len(RESOLVED_FEATURES)}, and {self.score_model.pooled} as score_model has"
            )


def _read_resolved_score(data: dict[str, Any]) -> FittedScore:
    try:
        return FittedScore.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"resolved_score: {error}") from None


def _read_knots(knots: Sequence[Sequence[float]]) -> Knots:
    if len(knots) > MAX_KNOTS:
        raise ConfigError(f"calibration: {len(knots)} points; the limit is {MAX_KNOTS}")
    return tuple((float(x), float(y)) for x, y in knots)


def _check_knots(knots: Knots) -> None:
    columns = list(zip(*knots, strict=True))
    is_map = len(knots) > 1 and columns[0][0] == 0.0 and columns[0][-1] == 1.0
    rises = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(knots))
    if not (is_map and rises and columns[1][0] >= 0.0 and columns[1][-1] <= 1.0):
        raise ConfigError(f"calibration: {knots}; it must be rising points from score 0 to score 1, values in [0, 1]")
