"""Decodes rle-pack bit by bit, as its specification says; the reference for our encoder."""

import numpy as np
from numpy.typing import NDArray


def decode_rle_pack(code: list[int]) -> NDArray[np.uint8]:
    """Returns the decoded values."""
    bits = "".join(f"{byte:08b}" for byte in code)
    position = 0

    def read(count: int) -> int:
        nonlocal position
        position += count
        return int(bits[position - count : position], 2)

    total, value_bits = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        is_repeated = read(1)
        length = read(sizes[read(2)]) + 1
        values += [read(value_bits)] * length if is_repeated else [read(value_bits) for _ in range(length)]
    return np.array(values, dtype=np.uint8)


def decode_brush(code: list[int], height: int, width: int) -> NDArray[np.bool_]:
    """Returns the mask (height, width) of a brush region, where alpha is above 0."""
    return decode_rle_pack(code).reshape(height, width, 4)[:, :, 3] > 0
