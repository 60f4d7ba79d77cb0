"""Computes features of a probability map and its mask, from which a `ScoreModel` predicts the IoU of the mask.

All but the geometry is computed on SIDE × SIDE samples of the box, so the time does not depend on its size.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.geometry import Box
from mal_train.core.score_model import MASK_FEATURES
from mal_train.kernel.labeler.overlaps import MaskClaim, logits

SIDE = 64
"""Rows and columns of samples of a box; a crop of 224 px has 56 logits in each direction."""
_CORNER = SIDE // 8
_CENTER = slice(SIDE // 4, SIDE - SIDE // 4)

Samples = NDArray[np.bool_]
"""The samples that belong to the mask, (SIDE, SIDE)."""


def mask_features(
    claim: MaskClaim, mask: NDArray[np.bool_], box_inside: Box, image_hw: tuple[int, int]
) -> NDArray[np.float64]:
    """Returns the features (F,) of a non-empty mask, in the order of `MASK_FEATURES`.

    Distances d are in logits from the threshold of the claim.

    Args:
        claim: claim of the mask's box.
        mask: (rows, columns) bool: the pixels of the claim that belong to the mask.
        box_inside: the labeled box, x, y, width, height in px.
        image_hw: height and width of the image in px.
    """
    rows, columns = (_positions(length) for length in mask.shape)
    grid = np.ix_(rows, columns)
    samples, claimed = mask[grid], claim.mask[grid]
    odds = math.log(claim.threshold / (1.0 - claim.threshold))
    d = (logits(claim.prob[grid]) - np.float32(odds)).astype(np.float64)
    lower, upper = d.size // 4, d.size * 3 // 4
    ordered = np.partition(d, (lower, upper), axis=None)
    features = {
        **_around_threshold(d, samples, claimed),
        **_shape(samples),
        **_borders(samples),
        **_geometry(box_inside, image_hw),
        "contrast": _contrast(d, samples),
        "center": float(d[_CENTER, _CENTER].mean()),
        "lower_quartile": float(ordered[lower]),
        "upper_quartile": float(ordered[upper]),
    }
    return np.array([features[name] for name in MASK_FEATURES], dtype=np.float64)


def _positions(length: int) -> NDArray[np.int64]:
    """Returns the index of each sample along a side of `length` px, the nearest pixel to its center."""
    return ((2 * np.arange(SIDE) + 1) * length) // (2 * SIDE)


def _around_threshold(d: NDArray[np.float64], samples: Samples, claimed: Samples) -> dict[str, float]:
    """Returns how many samples lie within 1, 2 and 4 logits of the threshold on both sides, and means."""
    count = max(int(np.count_nonzero(samples)), 1)
    probability = 1.0 / (1.0 + np.exp(-d))
    features = {}
    for offset in (1, 2, 4):
        features[f"inside_{offset}"] = np.count_nonzero((d > offset) & samples) / count
        features[f"around_{offset}"] = count / (count + np.count_nonzero((d > -offset) & ~claimed))
    return {
        **features,
        "fill": count / samples.size,
        "mean_inside": _mean(d[samples]),
        "mean_outside": _mean(d[~samples]),
        # Half the distance: the mean of |2p − 1| with the threshold at one half.
        "decisiveness": float(np.abs(2.0 * probability - 1.0).mean()),
        "soft_iou": float(probability[samples].sum()) / (count + float(probability[~samples].sum())),
    }


def _shape(samples: Samples) -> dict[str, float]:
    """Returns tightness of the box, share of the largest part, and length of the contour relative to √area."""
    count = max(int(np.count_nonzero(samples)), 1)
    extent = [np.flatnonzero(samples.any(axis)) for axis in (0, 1)]
    spans = [int(each[-1] - each[0] + 1) if each.size else 0 for each in extent]
    _, parts = cv2.connectedComponents(samples.view(np.uint8), connectivity=8)
    sizes = np.bincount(np.asarray(parts).ravel())[1:]
    padded = np.pad(samples, 1)
    steps = np.count_nonzero(padded[1:] != padded[:-1]) + np.count_nonzero(padded[:, 1:] != padded[:, :-1])
    return {
        "tightness": spans[0] * spans[1] / SIDE**2,
        "largest_part": int(sizes.max(initial=0)) / count,
        "contour": steps / math.sqrt(count),
    }


def _borders(samples: Samples) -> dict[str, float]:
    """Returns the shares of the sides and corners of the box that the mask covers."""
    sides = [float(side.mean()) for side in (samples[0], samples[-1], samples[:, 0], samples[:, -1])]
    ends = (slice(None, _CORNER), slice(-_CORNER, None))
    corners = [float(samples[vertical, horizontal].mean()) for vertical in ends for horizontal in ends]
    return {
        "longest_border": max(sides),
        "mean_border": sum(sides) / len(sides),
        "corners": sum(corners) / len(corners),
    }


def _geometry(box_inside: Box, image_hw: tuple[int, int]) -> dict[str, float]:
    """Returns log area and |log aspect| of a box, and the number of its sides on the border of the image."""
    x, y, width, height = box_inside
    touching = (x < 1, y < 1, x + width > image_hw[1] - 1, y + height > image_hw[0] - 1)
    return {
        "log_area": math.log(width * height),
        "aspect": abs(math.log(width / height)),
        "image_borders": float(sum(touching)),
    }


def _contrast(d: NDArray[np.float64], samples: Samples) -> float:
    """Returns the mean change in logits across the contour of the mask."""
    vertical = np.abs(np.diff(d, axis=0))[samples[1:] != samples[:-1]]
    horizontal = np.abs(np.diff(d, axis=1))[samples[:, 1:] != samples[:, :-1]]
    return _mean(np.concatenate([vertical, horizontal]))


def _mean(values: NDArray[np.float64]) -> float:
    """Returns the mean, 0 of nothing."""
    return float(values.mean()) if values.size else 0.0
