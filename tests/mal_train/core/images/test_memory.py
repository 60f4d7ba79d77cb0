"""The memory that decoding takes, measured in a process of its own, against what the walk through the file states."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mal_train.core.images.header import read_container
from tests.mal_train.core.images.test_decoder import encoded
from tests.mal_train.core.images.test_pixels import wide_png
from tests.mal_train.core.images.tiffs import packed_tiff_of, tiff_of

SIZE_WH = (2000, 1600)
NOISE_BYTES = 12 * 1024 * 1024
"""Other memory of the process: buffers of libraries, and freed memory that the allocator keeps."""

SCRIPT = """
import os, sys
from mal_train.core.images.decoder import decode_image, encode_png
import numpy as np

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

decode_image(encode_png(np.zeros((8, 8, 3), np.uint8)))  # imports of Pillow
for size in sys.argv[1:]:
    data = sys.stdin.buffer.read(int(size))
    if os.fork() == 0:  # the peak of the child starts at its memory now
        before = kilobytes("VmRSS")
        image = decode_image(data)
        print((kilobytes("VmHWM") - before) * 1024, flush=True)
        os._exit(0)
    os.wait()
"""


def smooth(mode: str) -> Image.Image:
    """Returns a smooth image, so that its file is small."""
    width, height = SIZE_WH
    ramp = np.add.outer(np.arange(height) // 8, np.arange(width) // 8).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    return Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], 2)).convert(mode)


FILES: dict[str, bytes] = {
    **{f"JPEG {mode}": encoded(smooth(mode), "JPEG") for mode in ("L", "RGB", "CMYK")},
    **{f"progressive JPEG {mode}": encoded(smooth(mode), "JPEG", progressive=True) for mode in ("L", "RGB", "CMYK")},
    "progressive JPEG 4:4:4": encoded(smooth("RGB"), "JPEG", progressive=True, subsampling=0),
    **{f"PNG {mode}": encoded(smooth(mode), "PNG") for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16")},
    **{f"WebP {mode}": encoded(smooth(mode), "WEBP", lossless=True, method=0) for mode in ("RGB", "RGBA")},
    "lossy WebP": encoded(smooth("RGBA"), "WEBP", method=0),
    **{f"BMP {mode}": encoded(smooth(mode), "BMP") for mode in ("L", "P", "RGB")},
    **{f"TIFF {mode}": encoded(smooth(mode), "TIFF") for mode in ("1", "L", "RGB", "RGBA", "CMYK", "I;16")},
    **{
        f"TIFF {mode} {compression} in one strip": encoded(
            smooth(mode), "TIFF", compression=compression, strip_size=1 << 30
        )
        for mode, compression in (("RGB", "tiff_adobe_deflate"), ("L", "tiff_lzw"), ("YCbCr", "jpeg"), ("RGB", "jpeg"))
    },
}

WIDE = np.asarray(smooth("RGB")).astype(np.uint16) * 200
FILES |= {
    "PNG RGB of 16 bits": wide_png(WIDE, 2),
    "PNG RGBA of 16 bits": wide_png(np.concatenate([WIDE, WIDE[:, :, :1]], 2), 6),
    "PNG LA of 16 bits": wide_png(WIDE[:, :, :2], 4),
    "TIFF gray of floats in one strip": tiff_of(WIDE[:, :, 0].astype(np.float32)),
    "TIFF gray of half floats in one strip": tiff_of(WIDE[:, :, 0].astype(np.float16)),
    "TIFF gray of 12 bits in one strip": packed_tiff_of(WIDE[:, :, 0] & 0xFFF, 12),
    "TIFF gray of 12 bits in strips": packed_tiff_of(WIDE[:, :, 0] & 0xFFF, 12, rows_per_strip=64),
    "TIFF RGBA of 16 bits, premultiplied, in one strip": tiff_of(np.concatenate([WIDE, WIDE[:, :, :1]], 2), extra=(1,)),
    "TIFF RGBA of 8 bits, premultiplied, in planes": tiff_of(
        np.concatenate([WIDE, WIDE[:, :, :1]], 2).astype(np.uint8), extra=(1,), planar=True
    ),
    "TIFF RGB of 16 bits in one strip": tiff_of(WIDE),
    "TIFF RGB of 16 bits in tiles": tiff_of(WIDE, tile=256),
    "TIFF RGB of 16 bits, uncompressed": tiff_of(WIDE, deflate=False),
    "TIFF gray of floats in strips": tiff_of(WIDE[:, :, 0].astype(np.float32), rows_per_strip=100, predictor=3),
    "TIFF RGB of 8 bits in planes": tiff_of(WIDE.astype(np.uint8), planar=True, rows_per_strip=64),
}


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Returns the measured bytes of decoding each file."""
    sizes = [str(len(data)) for data in FILES.values()]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *sizes],
        input=b"".join(FILES.values()),
        capture_output=True,
        check=True,
        # Otherwise the allocator keeps freed memory of the parent, and the child takes that.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return dict(zip(FILES, map(int, done.stdout.split()), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_decoding_takes_no_more_memory_than_its_charge(name: str, peaks: dict[str, int]) -> None:
    charge = read_container(FILES[name]).peak_bytes
    assert peaks[name] <= charge + NOISE_BYTES
    assert charge <= 1.5 * peaks[name] + NOISE_BYTES
