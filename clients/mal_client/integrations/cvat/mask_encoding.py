"""CVAT's code of a mask: lengths of runs, row by row inside the mask's tight box, then that box with inclusive ends."""

from __future__ import annotations

import numpy as np

from mal_train.core.masks.rle import Rle, decode_mask


def mask_points(rle: Rle) -> list[int]:
    """The `points` of a shape of type mask: runs of background and mask in turn, then left, top, right, bottom.

    `cvat_sdk.masks.encode_mask` gives the same (a test holds the two together); this one needs no SDK.

    >>> from mal_train.core.masks.rle import encode_mask
    >>> mask_points(encode_mask(np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]])))
    [0, 2, 1, 1, 1, 1, 2, 2]

    Raises:
        ValueError: an empty mask has no tight box.
    """
    mask = decode_mask(rle)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise ValueError("an empty mask has no points")
    top, bottom, left, right = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    flat = mask[top : bottom + 1, left : right + 1].ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs: list[int] = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return [*([0] if flat[0] else []), *runs, left, top, right, bottom]
