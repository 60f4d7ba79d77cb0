"""Random masks for property tests: noise, blobs, full, empty, at the border."""

import cv2
import numpy as np
from numpy.typing import NDArray


def random_mask(seed: int) -> NDArray[np.bool_]:
    """Returns a mask (H, W) with sides of 1 to 60 px: noise, or smooth blobs with holes and islands."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 60, 2)
    if rng.random() < 0.5:
        noise: NDArray[np.bool_] = rng.random((height, width)) < rng.choice([0, 0.1, 0.5, 0.9, 1])
        return noise
    smooth = cv2.GaussianBlur(rng.random((height, width)).astype(np.float32), (0, 0), 2.5)
    blobs: NDArray[np.bool_] = smooth > rng.choice([0.47, 0.5, 0.53])
    return blobs
