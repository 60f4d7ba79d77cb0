"""CVAT's mask encoding: run lengths in row order inside the tight box of the mask, then the box with inclusive ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import Rle, decode_mask
from mal_train.core.masks.row_runs import check_frame, encode_row_bounds


def mask_points(rle: Rle) -> list[int]:
    """Encodes a mask as the `points` of a CVAT shape: runs, background first, then left, top, right, bottom.

    Equals `cvat_sdk.masks.encode_mask` (a test compares them) without needing the SDK.

    >>> from mal_train.core.masks.rle import encode_mask
    >>> mask_points(encode_mask(np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]])))
    [0, 2, 1, 1, 1, 1, 2, 2]

    Raises:
        ValueError: the mask is empty.
    """
    mask = decode_mask(rle)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise ValueError("mask is empty; CVAT cannot encode it")
    top, bottom, left, right = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    flat = mask[top : bottom + 1, left : right + 1].ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs: list[int] = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return [*([0] if flat[0] else []), *runs, left, top, right, bottom]


def mask_from_runs(
    runs: Sequence[int], region: tuple[int, int, int, int], size_wh: tuple[int, int], name: str = "mask"
) -> Rle:
    """Decodes a mask of CVAT.

    >>> from mal_train.core.masks.rle import encode_mask
    >>> mask = encode_mask(np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]))
    >>> mask_from_runs([0, 2, 1, 1], (1, 1, 2, 2), (4, 3)) == mask
    True

    Args:
        runs: lengths in px in row order inside the region, background first.
        region: left, top, width, height in px.
        size_wh: width and height of the image in px.
        name: begins every message.

    Raises:
        BadDataset: the region is not inside the image, the runs do not fill it, or the mask has too many runs.
    """
    (left, top, width, height), (image_width, image_height) = region, size_wh
    check_frame(size_wh, name)
    is_inside = 0 <= left <= left + width <= image_width and 0 <= top <= top + height <= image_height
    if not is_inside or width <= 0 or height <= 0:
        raise BadDataset(
            f"{name}: region of {width}x{height} px at {left}, {top}; it must be inside the image of "
            f"{image_width}x{image_height} px"
        )
    if min(runs, default=-1) < 0 or sum(runs) != width * height:
        raise BadDataset(f"{name}: runs do not fill their region of {width}x{height} px")
    bounds = np.cumsum(np.asarray(runs, dtype=np.int64))
    return encode_row_bounds(bounds[: len(runs) // 2 * 2], region, size_wh, name)
