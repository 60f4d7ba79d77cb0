"""Tests of Label Studio's brush encoding."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mal_client.integrations.label_studio.brush import encode_brush
from numpy.typing import NDArray

from mal_train.core.masks.rle import encode_mask
from tests.mal_client.integrations.label_studio.label_studio_tools import needs_label_studio
from tests.mal_client.integrations.label_studio.rle_pack import decode_brush, decode_rle_pack

# From label_studio_sdk 2.1.2: mask2rle of the mask whose rows are 110, 001. It appends a zero byte to
# an encoding that fills its last byte.
FROM_THE_SDK = [0, 0, 0, 24, 57, 27, 252, 255, 246, 192, 35, 255, 0]


def random_mask(height: int, width: int, density: float, seed: int) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random((height, width)) < density


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_the_encoding_preserves_the_mask(height: int, width: int, density: float, seed: int) -> None:
    drawn = random_mask(height, width, density, seed)
    assert (decode_brush(encode_brush(encode_mask(drawn)), height, width) == drawn).all()


def test_runs_longer_than_a_code_word_are_split() -> None:
    drawn = np.zeros((300, 400), dtype=bool)
    drawn[90:200] = True
    code = encode_brush(encode_mask(drawn))
    assert (decode_brush(code, 300, 400) == drawn).all()
    assert len(code) < 40


def test_all_four_channels_are_painted() -> None:
    values = decode_rle_pack(encode_brush(encode_mask(np.array([[0, 1]])))).tolist()
    assert values == [0, 0, 0, 0, 255, 255, 255, 255]


def test_the_encoding_equals_that_of_the_sdk() -> None:
    assert [*encode_brush(encode_mask(np.array([[1, 1, 0], [0, 0, 1]]))), 0] == FROM_THE_SDK


@pytest.mark.slow
def test_the_installed_sdk_encodes_and_decodes_the_same_bytes(tmp_path: Path) -> None:
    tools = needs_label_studio()
    masks = [
        random_mask(h, w, density, 3) for h, w in ((1, 1), (7, 5), (240, 320)) for density in (0.0, 0.01, 0.5, 1.0)
    ]
    path = tmp_path / "codes.json"
    path.write_text(json.dumps([[m.astype(int).tolist(), encode_brush(encode_mask(m))] for m in masks]))
    script = """
import json, sys
import numpy as np
from label_studio_sdk.converter.brush import decode_rle, mask2rle
for rows, code in json.load(open(sys.argv[1])):
    mask = np.array(rows, dtype=np.uint8)
    assert (decode_rle(code).reshape(*mask.shape, 4)[:, :, 3] == 255 * mask).all()
    from_sdk = mask2rle(255 * mask)
    # The SDK appends a zero byte to an encoding that fills its last byte.
    assert from_sdk in (code, code + [0]), mask.shape
"""
    subprocess.run([str(tools.python), "-c", script, str(path)], check=True, timeout=120)
