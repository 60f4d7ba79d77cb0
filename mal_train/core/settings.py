"""How boxes become masks: the settings that travel inside a checkpoint, and the size classes. No torch.

A label depends on the weights and on what stands here, and on nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mal_train.core.errors import ConfigError

Knots = tuple[tuple[float, float], ...]
"""A map of [0, 1] into itself as points joined by lines: (from, to), both rising."""

SIZE_NAMES = ("small", "medium", "large")
SIZE_BOUNDS = (32.0**2, 96.0**2)
"""Upper bounds in px² of small and medium, inclusive: (0, 32²], (32², 96²], above (COCO's classes)."""


class Compat(StrEnum):
    """`tao` reproduces the published implementation where ours differs on purpose."""

    NONE = "none"
    TAO = "tao"


class Branch(StrEnum):
    """Which network answers; `mixed` is the mean of the two logit maps."""

    STUDENT = "student"
    TEACHER = "teacher"
    MIXED = "mixed"


def branches_of(*, has_teacher: bool) -> tuple[Branch, ...]:
    """The branches that a checkpoint can run: all of them where it holds both networks, else the student alone."""
    return tuple(Branch) if has_teacher else (Branch.STUDENT,)


def can_compare(branches: Iterable[Branch]) -> bool:
    """Whether agreement can be measured where these branches run: it takes the masks of both networks."""
    return Branch.MIXED in branches


class MaskFormat(StrEnum):
    """How a mask is written down."""

    RLE = "rle"
    """COCO's compressed run lengths, as pycocotools writes them; lossless and the smallest."""
    UNCOMPRESSED = "uncompressed"
    """The same run lengths as plain numbers; lossless, several times larger."""
    POLYGONS = "polygons"
    """Closed lines on pixel corners, holes included; lossless at a tolerance of 0 px."""
    PNG = "png"
    """The tight crop as a 1-bit picture; lossless."""


class ScoreKind(StrEnum):
    """What a score is made of before any calibration.

    `stability`: pixels whose logit is STABILITY_LOGITS above the threshold's, as a share of those that are not as far
    below it: how little the mask depends on where it was cut. `probability`: mean foreground probability over the mask,
    the published score. Measured in docs/quality.md: stability ranks masks better, above all where thresholds are low.
    """

    STABILITY = "stability"
    PROBABILITY = "probability"


STABILITY_LOGITS = 2.0


def size_class(area: ArrayLike) -> NDArray[np.int64]:
    """Class 0, 1, 2 (small, medium, large) of areas in px², any shape. Every positive area belongs to one.

    >>> size_class([1024.0, 1024.5, 9216.0, 9217.0]).tolist()
    [0, 1, 1, 2]
    """
    return np.searchsorted(np.asarray(SIZE_BOUNDS), np.asarray(area, dtype=np.float64), side="left").astype(np.int64)


def network_branch(area: ArrayLike, compat: Compat) -> NDArray[np.int64]:
    """Size branch of the network for box areas in px²: `size_class`, except −1 under `tao` for exactly 32² and 96².

    Those the published network leaves to none of its three strict intervals: −1 means no branch and zero logits.
    """
    area_array = np.asarray(area, dtype=np.float64)
    branch = size_class(area_array)
    if compat is Compat.TAO:
        branch = np.where(np.isin(area_array, SIZE_BOUNDS), -1, branch)
    return branch


@dataclass(frozen=True)
class ScoreBasis:
    """How labels are made, as far as their score depends on it; as it stands: one pass of the student, nothing else.

    Attributes:
        branch: which network answers.
        flip: its map is averaged with that of the mirrored crop.
        margins: the growths of the box that maps are averaged over; () for the checkpoint's one.
        shared_out: contested pixels go to one of their boxes.
        threshold: the one for all sizes instead of the checkpoint's; None for these.
        min_component_area_px: smaller parts are taken out of masks.
        refined_edges: edges are moved to where the colors change.
    """

    branch: Branch = Branch.STUDENT
    flip: bool = False
    margins: tuple[float, ...] = ()
    shared_out: bool = False
    threshold: float | None = None
    min_component_area_px: int = 0
    refined_edges: bool = False

    def beside(self, fitted_with_flip: bool) -> list[str]:
        """What of it is otherwise than in the answers that a calibration was fitted to, in words."""
        differs = {
            f"branch {self.branch}": self.branch is not Branch.STUDENT,
            "a mirrored pass": self.flip and not fitted_with_flip,
            "no mirrored pass": fitted_with_flip and not self.flip,
            f"margins {', '.join(f'{margin:g}' for margin in self.margins)}": bool(self.margins),
            "contested pixels shared out": self.shared_out,
            f"threshold {self.threshold}": self.threshold is not None,
            f"parts under {self.min_component_area_px} px left out": self.min_component_area_px > 0,
            "edges moved to the colors": self.refined_edges,
        }
        return [words for words, does in differs.items() if does]


def score_meaning(
    manner: ScoreBasis, *, calibrated: bool, fitted_with_flip: bool = False, kind: ScoreKind | None = None
) -> str:
    """What a score is, in the words of files that carry labels.

    Args:
        manner: how the labels are made.
        calibrated: whether a map from scores to expected IoU is applied.
        fitted_with_flip: whether that map was fitted to answers averaged with their mirror image.
        kind: None where it is not known, as to a client.

    >>> score_meaning(Manner(), calibrated=True)
    'expected IoU, calibrated'
    >>> score_meaning(Manner(flip=True), calibrated=True)
    'expected IoU, calibrated for one pass of the student, not for this: a mirrored pass'
    """
    if calibrated:
        beside = manner.beside(fitted_with_flip)
        fit = "two passes, one of them mirrored," if fitted_with_flip else "one pass"
        return "expected IoU, calibrated" + (
            f" for {fit} of the student, not for this: {', '.join(beside)}" if beside else ""
        )
    either = "stability of the mask (under compat tao and of older checkpoints, mean foreground probability)"
    meanings = {ScoreKind.STABILITY: "stability of the mask", ScoreKind.PROBABILITY: "mean foreground probability"}
    return f"{either if kind is None else meanings[kind]}, not calibrated"


def calibrated(score: float, knots: Knots) -> float:
    """The value at `score` of the map through `knots`.

    >>> calibrated(0.5, ((0.0, 0.0), (1.0, 0.8)))
    0.4
    """
    return float(np.interp(score, [knot[0] for knot in knots], [knot[1] for knot in knots]))


@dataclass(frozen=True)
class LabelerConfig:
    """What turns a box into a crop and a probability map into a mask.

    Attributes:
        crop_size: side in px of the square network input; a multiple of the backbone's patch size.
        margin_rate: the window is the box grown by half of this on every side (of the half extent); 0.6 in TAO.
        mask_thres: thresholds in (0, 1) for small, medium and large boxes; mask is where the probability is above.
        compat: see `Compat`.
        calibration: map from the score to expected IoU, fitted on masks for the student's answer with these settings;
            None: the score is as it was made.
        score: what it is made of; under `compat: tao` always the probability.
        calibrated_with_flip: whether the answers that it was fitted to were averaged with their mirror image.
    """

    crop_size: int = 512
    margin_rate: float = 0.6
    mask_thres: tuple[float, float, float] = (0.1, 0.1, 0.1)
    compat: Compat = Compat.NONE
    calibration: Knots | None = None
    score: ScoreKind = ScoreKind.STABILITY
    calibrated_with_flip: bool = False

    def __post_init__(self) -> None:
        if self.crop_size < 1:
            raise ConfigError(f"crop_size: {self.crop_size} px; it must be a positive multiple of the patch size")
        if not 0.0 <= self.margin_rate <= 4.0:
            raise ConfigError(f"margin_rate: {self.margin_rate}; it must lie in [0, 4] (TAO uses 0.6)")
        if len(self.mask_thres) != 3 or not all(0.0 < t < 1.0 for t in self.mask_thres):
            raise ConfigError(f"mask_thres: {self.mask_thres}; three thresholds between 0 and 1 (small, medium, large)")
        if self.calibration is not None:
            _check_knots(self.calibration)

    def score_meaning(self, manner: ScoreBasis = ScoreBasis()) -> str:
        """What the score of a label is that was made so, for files that carry labels."""
        if manner.margins == (self.margin_rate,):
            manner = replace(manner, margins=())
        return score_meaning(
            manner,
            calibrated=self.calibration is not None,
            fitted_with_flip=self.calibrated_with_flip,
            kind=self.score_kind,
        )

    @property
    def score_kind(self) -> ScoreKind:
        """What scores are made of: `score`, but for `compat: tao`."""
        return ScoreKind.PROBABILITY if self.compat is Compat.TAO else self.score

    def to_dict(self) -> dict[str, Any]:
        """The JSON form kept in checkpoints."""
        return {
            "crop_size": self.crop_size,
            "margin_rate": self.margin_rate,
            "mask_thres": list(self.mask_thres),
            "compat": str(self.compat),
            "calibration": None if self.calibration is None else [list(knot) for knot in self.calibration],
            "score": str(self.score),
            "calibrated_with_flip": self.calibrated_with_flip,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LabelerConfig":
        """Inverse of `to_dict`; checkpoints from before there was a choice have no calibration, and the probability."""
        small, medium, large = (float(t) for t in data["mask_thres"])
        knots = data.get("calibration")
        return cls(
            int(data["crop_size"]),
            float(data["margin_rate"]),
            (small, medium, large),
            Compat(data["compat"]),
            None if knots is None else tuple((float(x), float(y)) for x, y in knots),
            ScoreKind(data.get("score", ScoreKind.PROBABILITY)),
            bool(data.get("calibrated_with_flip", False)),
        )


def _check_knots(knots: Knots) -> None:
    columns = list(zip(*knots, strict=True))
    is_map = len(knots) > 1 and columns[0][0] == 0.0 and columns[0][-1] == 1.0
    rises = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(knots))
    if not (is_map and rises and columns[1][0] >= 0.0 and columns[1][-1] <= 1.0):
        raise ConfigError(f"calibration: {knots}; it must be rising points from score 0 to score 1, values in [0, 1]")
