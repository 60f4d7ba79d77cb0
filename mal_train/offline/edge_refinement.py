"""Moves the edges of a mask to color edges: pixel-adaptive mask refinement, limited to a narrow band.

In each iteration, a pixel becomes the mean of near and far neighbors, weighted by the similarity of their colors.
Outside the band, refinement would also change areas that the network got right. Pure; knows no network and no files.

Letters: H rows, W columns, C = 3 colors, K neighbors of a pixel.
Source: Araslanov and Roth, "Single-stage semantic segmentation from image labels", CVPR 2020 (arXiv 2005.08104), PAMR.
"""

from collections.abc import Iterator
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

DISTANCES = (1, 2, 4, 8, 12, 24)
"""Distance in px of the eight neighbors of each ring."""
NUM_NEIGHBORS = 8 * len(DISTANCES)
ITERATIONS = 10
SHARPNESS = 0.1
"""Color differences are divided by this fraction of the local standard deviation; larger quotients weigh little."""
BAND_FRACTION = 1 / 75
"""Distance that an edge may move, as a fraction of the crop size: 3 px at 224."""

_MIN_DEVIATION = 1e-6
"""Added to standard deviations (of colors 0..255), so that all pixels of a flat area weigh the same."""


def refine_edges(
    prob_HW: NDArray[np.float32], pixels_HWC: NDArray[np.uint8], box_mask_HW: NDArray[np.uint8], threshold: float
) -> NDArray[np.float32]:
    """Returns foreground probability (H, W), float32, whose edge at `threshold` follows the color edges.

    Only pixels in the band change: those at most `BAND_FRACTION` of the crop size away from the predicted edge.

    Args:
        prob_HW: foreground probability from the network, float32 in [0, 1].
        pixels_HWC: the crop, uint8 RGB.
        box_mask_HW: the box on the crop, uint8 0 or 1. Within the band, no pixel outside the box stays foreground.
        threshold: threshold of the mask, in (0, 1).

    >>> pixels = np.zeros((3, 75, 3), np.uint8)
    >>> pixels[:, 40:] = 200  # the object's edge
    >>> prob = np.full((3, 75), 0.1, np.float32)
    >>> prob[:, 41:] = 0.9  # the predicted edge, one pixel off
    >>> refined = refine_edges(prob, pixels, np.ones((3, 75), np.uint8), 0.5)
    >>> int((refined[1] > 0.5).argmax())
    40
    """
    band_HW = _edge_band(prob_HW > threshold)
    if not band_HW.any():
        return prob_HW
    weight_KHW = _color_weights(pixels_HWC)
    box_HW = box_mask_HW.astype(np.float32)
    refined_HW, product_HW = prob_HW * box_HW, np.empty_like(prob_HW)
    for _ in range(ITERATIONS):
        mean_HW = np.zeros_like(prob_HW)
        for weight_HW, neighbor_HW in zip(weight_KHW, _neighbors(refined_HW), strict=True):
            mean_HW += np.multiply(weight_HW, neighbor_HW, out=product_HW)
        refined_HW = mean_HW * box_HW
    return np.where(band_HW, refined_HW, prob_HW)


def _edge_band(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns the pixels within `BAND_FRACTION` of the mask's edge, at least one on each side, as bool (H, W)."""
    radius = max(1, round(max(mask_HW.shape) * BAND_FRACTION))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    pixels_HW = mask_HW.astype(np.uint8)
    return np.asarray(cv2.dilate(pixels_HW, disc) != cv2.erode(pixels_HW, disc))


def _color_weights(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns the weights (K, H, W) float32 of each pixel's neighbors; they sum to 1."""
    color_HWC = pixels_HWC.astype(np.int32)
    total_HWC, squares_HWC = np.zeros_like(color_HWC), np.zeros_like(color_HWC)
    for neighbor_HWC in _neighbors(color_HWC):
        total_HWC += neighbor_HWC
        squares_HWC += np.square(neighbor_HWC)
    # Integers (below 2³¹): without rounding, the spread of a flat area is exactly 0.
    spread_HWC = NUM_NEIGHBORS * squares_HWC - np.square(total_HWC)
    deviation_HWC = np.sqrt(spread_HWC / (NUM_NEIGHBORS * (NUM_NEIGHBORS - 1)), dtype=np.float64)
    per_color_HWC = (1.0 / (SHARPNESS * deviation_HWC + _MIN_DEVIATION)).astype(np.float32)
    weight_KHW = np.empty((NUM_NEIGHBORS, *pixels_HWC.shape[:2]), np.float32)
    for weight_HW, neighbor_HWC in zip(weight_KHW, _neighbors(color_HWC), strict=True):
        distance_HWC = np.abs(neighbor_HWC - color_HWC) * per_color_HWC
        np.negative(distance_HWC.mean(axis=2), out=weight_HW)
    # Subtracting the maximum keeps a pixel that differs from all its neighbors from having only zero weights.
    np.exp(weight_KHW - weight_KHW.max(axis=0), out=weight_KHW)
    return np.asarray(weight_KHW / weight_KHW.sum(axis=0))


def _neighbors(values: NDArray[Scalar]) -> Iterator[NDArray[Scalar]]:
    """Yields K arrays (H, W[, C]) that hold one neighbor of each pixel. Border pixels are repeated outside."""
    height, width = values.shape[:2]
    reach = max(DISTANCES)
    padded = np.pad(values, ((reach, reach), (reach, reach), *[(0, 0)] * (values.ndim - 2)), mode="edge")
    for distance in DISTANCES:
        for dy in (-distance, 0, distance):
            for dx in (-distance, 0, distance):
                if dy or dx:
                    yield padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
