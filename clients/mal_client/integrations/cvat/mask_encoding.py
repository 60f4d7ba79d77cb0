"""CVAT's mask encoding: run lengths in row order inside the tight box of the mask, then the box with inclusive ends."""

from __future__ import annotations

import numpy as np

from mal_train.core.masks.rle import Rle, decode_mask


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
