"""Memory of results: what budgets count is at least what they take."""

import tracemalloc

import numpy as np
import pytest

from mal_server.inference.requests import InstanceResult
from mal_train.core.errors import BadBox
from mal_train.core.masks.encodings import encode
from mal_train.core.masks.rle import encode_mask
from mal_train.core.settings import MaskFormat


@pytest.mark.parametrize("mask_format", list(MaskFormat))
@pytest.mark.parametrize("step", [2, 40])
def test_a_mask_is_counted_with_all_the_memory_that_it_takes(mask_format: MaskFormat, step: int) -> None:
    mask = np.zeros((200, 200), bool)
    mask[::step, ::step] = True
    code = encode_mask(mask)
    encode(code, [mask_format])  # warms up caches
    tracemalloc.start()
    try:
        masks = encode(code, [mask_format])
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    counted = InstanceResult(0, BadBox("none"), masks).size_bytes
    assert taken <= 1.2 * counted + 4096
