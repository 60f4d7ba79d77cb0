"""Masks that need no learning: what a trained labeler has to beat, printed beside it in the demo and in reports.

Each takes a box x, y, width, height (px) that meets its image and answers with a mask inside the box, cut to the image.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks import geometry, rle
from mal_train.core.masks.geometry import Box, Region, Window
from mal_train.core.masks.rle import Rle

_CLUSTERING_PIXELS = 5000


def box_filled(box_xywh: Box, image_hw: tuple[int, int]) -> Rle:
    """Every pixel whose center lies in the box.

    >>> rle.area(box_filled((1, 1, 3, 2), (6, 6)))
    6
    """
    region = geometry.box_pixels(box_xywh, image_hw)
    return _encoded(_ones(region), region, image_hw)


def ellipse(box_xywh: Box, image_hw: tuple[int, int]) -> Rle:
    """The largest axis-parallel ellipse in the box: every pixel whose center lies in it.

    >>> rle.decode_mask(ellipse((0, 0, 4, 4), (4, 4))).sum(axis=0).tolist()
    [2, 4, 4, 2]
    """
    region = geometry.box_pixels(box_xywh, image_hw)
    x, y, w, h = box_xywh
    across = (np.arange(region.col0, region.col1) + 0.5 - x) / w * 2 - 1
    down = (np.arange(region.row0, region.row1) + 0.5 - y) / h * 2 - 1
    return _encoded(across[None, :] ** 2 + down[:, None] ** 2 <= 1.0, region, image_hw)


def color_clustering(
    image_rgb: NDArray[np.uint8],
    box_xywh: Box,
    *,
    clusters: int = 16,
    ratio: float = 0.7,
    margin_rate: float = 0.6,
) -> Rle:
    """Pixels of the box whose color is not one of its surroundings.

    k-means of the CIELAB colors of the window; a color is foreground when its share of the box's pixels exceeds
    `ratio` times its share of the margin's. Deterministic. The whole box where there is no margin to learn from, or
    where no color stands out. (Of 2-means of the box, 2-means seeded with the margin, and this with 4, 8 and 16
    clusters, this one with 16 did best on real photographs.)

    Args:
        image_rgb: (H, W, 3) uint8.
        box_xywh: the box.
        clusters: colors.
        ratio: see above; smaller keeps more.
        margin_rate: the window is that of `geometry.inference_window`, cut to the image.
    """
    image_hw = (image_rgb.shape[0], image_rgb.shape[1])
    region = geometry.box_pixels(box_xywh, image_hw)
    pixels, inside = _window_pixels(image_rgb, geometry.inference_window(box_xywh, margin_rate), region)
    if min(np.count_nonzero(inside), np.count_nonzero(~inside)) < clusters:
        return _encoded(_ones(region), region, image_hw)
    colors = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB).reshape(-1, 3).astype(np.float32)
    nearest = _nearest_cluster(colors, clusters).reshape(inside.shape)
    share_inside = np.bincount(nearest[inside], minlength=clusters) / np.count_nonzero(inside)
    share_margin = np.bincount(nearest[~inside], minlength=clusters) / np.count_nonzero(~inside)
    mask = (share_inside > ratio * share_margin)[nearest[inside]].reshape(_ones(region).shape)
    return _encoded(mask if mask.any() else _ones(region), region, image_hw)


def _nearest_cluster(colors: NDArray[np.float32], clusters: int) -> NDArray[np.int64]:
    """Cluster number (N,) of colors (N, 3), by k-means on at most a few thousand of them."""
    sample = np.ascontiguousarray(colors[:: max(len(colors) // _CLUSTERING_PIXELS, 1)])
    # Starting from bands of brightness makes the result repeatable; OpenCV's own start draws from a shared generator.
    start = np.empty((len(sample), 1), dtype=np.int32)
    start[np.argsort(sample.sum(axis=1), kind="stable"), 0] = np.arange(len(sample)) * clusters // len(sample)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 10, 0.5)
    centers = np.asarray(cv2.kmeans(sample, clusters, start, stop, 1, cv2.KMEANS_USE_INITIAL_LABELS)[2])
    distance = (centers**2).sum(axis=1) - 2 * colors @ centers.T
    return np.asarray(distance.argmin(axis=1), dtype=np.int64)


def _window_pixels(
    image_rgb: NDArray[np.uint8], window: Window, region: Region
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The part of a window inside the image (h, w, 3), and which of its pixels belong to the box (h, w)."""
    row0, col0 = max(window.y0, 0), max(window.x0, 0)
    pixels = image_rgb[row0 : max(window.y1, 0), col0 : max(window.x1, 0)]
    inside = np.zeros(pixels.shape[:2], dtype=np.bool_)
    inside[region.row0 - row0 : region.row1 - row0, region.col0 - col0 : region.col1 - col0] = True
    return np.ascontiguousarray(pixels), inside


def _ones(region: Region) -> NDArray[np.bool_]:
    rows, columns = max(region.row1 - region.row0, 0), max(region.col1 - region.col0, 0)
    return np.ones((rows, columns), dtype=np.bool_)


def _encoded(mask: NDArray[np.bool_], region: Region, image_hw: tuple[int, int]) -> Rle:
    if region.is_empty:
        return rle.encode_region(np.zeros((0, 0), dtype=np.bool_), 0, 0, image_hw)
    return rle.encode_region(mask, region.row0, region.col0, image_hw)
