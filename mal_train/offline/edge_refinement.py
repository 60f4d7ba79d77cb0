"""Moves the edge of a mask to where the colors change: pixel-adaptive refinement, in a narrow band alone.

Each pixel becomes the mean of neighbors near and far, weighed by how alike their colors are, a few times over.
Without the band it would also fill or empty what the network was right about. Pure; knows no network and no files.

Letters: H rows, W columns, C = 3 colors, K neighbors of a pixel.
Source: Araslanov and Roth, "Single-stage semantic segmentation from image labels", CVPR 2020 (PAMR).
"""

from collections.abc import Iterator
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

DISTANCES = (1, 2, 4, 8, 12, 24)
"""How far the eight neighbors of each ring are away, px."""
NUM_NEIGHBORS = 8 * len(DISTANCES)
ITERATIONS = 10
SHARPNESS = 0.1
"""Two colors are alike where they differ by less than this share of the deviation round the pixel."""
BAND_SHARE = 1 / 75
"""How far an edge may move, as a share of the crop's side: 3 px at 224."""

_LEAST_DEVIATION = 1e-6
"""Added to deviations (of colors 0..255), so that flat areas weigh all their pixels alike."""


def refine_edges(
    prob_HW: NDArray[np.float32], pixels_HWC: NDArray[np.uint8], box_mask_HW: NDArray[np.uint8], threshold: float
) -> NDArray[np.float32]:
    """Foreground probability (H, W) whose edge at `threshold` follows the colors; far from that edge as it was.

    Args:
        prob_HW: of the network.
        pixels_HWC: the crop it belongs to.
        box_mask_HW: the box on the crop, 0 or 1. Within the band nothing outside it stays foreground.
        threshold: where the mask will be cut, in (0, 1).

    >>> pixels = np.zeros((3, 75, 3), np.uint8)
    >>> pixels[:, 40:] = 200  # the object's edge
    >>> prob = np.full((3, 75), 0.1, np.float32)
    >>> prob[:, 41:] = 0.9  # seen one pixel too late
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
    """Pixels that lie within the reach of `BAND_SHARE` of the mask's edge, at least one to each side."""
    radius = max(1, round(max(mask_HW.shape) * BAND_SHARE))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    pixels_HW = mask_HW.astype(np.uint8)
    return np.asarray(cv2.dilate(pixels_HW, disc) != cv2.erode(pixels_HW, disc))


def _color_weights(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(K, H, W) weights of each pixel's neighbors, 1 together."""
    color_HWC = pixels_HWC.astype(np.int32)
    total_HWC, squares_HWC = np.zeros_like(color_HWC), np.zeros_like(color_HWC)
    for neighbor_HWC in _neighbors(color_HWC):
        total_HWC += neighbor_HWC
        squares_HWC += np.square(neighbor_HWC)
    # Whole numbers below 2³¹: no rounding makes a flat area look less than flat.
    spread_HWC = NUM_NEIGHBORS * squares_HWC - np.square(total_HWC)
    deviation_HWC = np.sqrt(spread_HWC / (NUM_NEIGHBORS * (NUM_NEIGHBORS - 1)), dtype=np.float64)
    per_color_HWC = (1.0 / (SHARPNESS * deviation_HWC + _LEAST_DEVIATION)).astype(np.float32)
    weight_KHW = np.empty((NUM_NEIGHBORS, *pixels_HWC.shape[:2]), np.float32)
    for weight_HW, neighbor_HWC in zip(weight_KHW, _neighbors(color_HWC), strict=True):
        distance_HWC = np.abs(neighbor_HWC - color_HWC) * per_color_HWC
        np.negative(distance_HWC.mean(axis=2), out=weight_HW)
    # A pixel unlike all its neighbors, on flat ground, would otherwise have weights of 0 alone.
    np.exp(weight_KHW - weight_KHW.max(axis=0), out=weight_KHW)
    return np.asarray(weight_KHW / weight_KHW.sum(axis=0))


def _neighbors(values: NDArray[Scalar]) -> Iterator[NDArray[Scalar]]:
    """(H, W[, C]) arrays that hold, at each pixel, its K neighbors one after the other; the border goes on outside."""
    height, width = values.shape[:2]
    reach = max(DISTANCES)
    wide = np.pad(values, ((reach, reach), (reach, reach), *[(0, 0)] * (values.ndim - 2)), mode="edge")
    for distance in DISTANCES:
        for dy in (-distance, 0, distance):
            for dx in (-distance, 0, distance):
                if dy or dx:
                    yield wide[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
