"""Run-length codes that no encoder writes."""

from collections.abc import Sequence

import numpy as np


def compressed(runs: Sequence[int]) -> bytes:
    """Returns COCO's string of any integers: base 32, low digits first, differences from the fourth run on."""
    code = bytearray()
    for index, run in enumerate(runs):
        value, is_open = run - (runs[index - 2] if index > 2 else 0), True
        while is_open:
            digit, value = value & 31, value >> 5
            is_open = value != (-1 if digit & 16 else 0)
            code.append(digit + (32 if is_open else 0) + 48)
    return bytes(code)


def wrapping_runs(rng: np.random.Generator, pixels: int) -> list[int]:
    """Returns runs that are not negative and add up to 2^64 + `pixels`, but to other numbers modulo 2^32 in parts."""
    unit = 1 << 47
    large = [unit * (j + (j > 255)) for j in range(1, 512)]
    for _ in range(8):
        first, second = rng.choice(len(large), 2, replace=False)
        moved = int(rng.integers(1, 1 << 20))
        large[first] += moved
        large[second] -= moved
    return [0, pixels, *(run for value in large for run in (value, 0))]
