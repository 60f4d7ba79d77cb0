"""Images above the limits: their windows, read from disk, are those of the complete image."""

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mal_train.core.errors import BadBox, BadImage
from mal_train.core.images import large_tiff, tiff
from mal_train.core.images.decoder import decode_image
from mal_train.core.images.header import MAX_FRAME_PIXELS, ImageLimits
from mal_train.core.images.large_tiff import FileSource, open_large
from mal_train.core.images.tiff_reader import TiffReader
from mal_train.core.masks.geometry import Window, cut
from mal_train.core.masks.image_patch import cut_patch
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from tests.mal_train.core.images.test_decoder import encoded
from tests.mal_train.core.images.test_pixels import HEIGHT, WIDTH, levels, values_of
from tests.mal_train.core.images.tiffs import tiff_of

SMALL = ImageLimits(max_pixels=HEIGHT * WIDTH, max_side=80)


def opened(path: Path, content: bytes, limits: ImageLimits = SMALL) -> TiffReader:
    path.write_bytes(content)
    large = open_large(path, limits, str(path))
    assert large is not None
    assert large[0].size_wh == (large[1].shape[1], large[1].shape[0])
    return large[1]


FILES: dict[str, bytes] = {
    **{
        f"{kind} {options}": tiff_of(values_of(levels(bands), kind), **options)
        for kind, bands in (("u1", 3), ("u1", 1), ("u2", 1), ("u2", 3), ("f4", 1), ("i2", 4))
        for options in (
            *({"tile": 16}, {"tile": 48, "order": ">", "big": True}, {"rows_per_strip": 7}, {"deflate": False}),
            {"rows_per_strip": 7, "deflate": False, "sparse": frozenset({0, 5})},
            *({"tile": 32, "planar": True, "predictor": 2}, {"tile": 32, "sparse": frozenset({0, 5})}),
        )
        if not (kind == "f4" and "predictor" in options)
    },
}


@pytest.mark.parametrize("name", FILES)
def test_every_window_equals_that_of_the_complete_image(name: str, tmp_path: Path) -> None:
    image = decode_image(FILES[name])
    reader = opened(tmp_path / "image.tif", FILES[name])
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(reader.read(), image)
    for _ in range(20):
        x0, y0 = (int(v) for v in rng.integers(-20, 80, 2))
        window = Window(x0, y0, x0 + int(rng.integers(1, 60)), y0 + int(rng.integers(1, 60)))
        np.testing.assert_array_equal(cut(reader, window), cut(image, window))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *(("RGB", {"compression": "jpeg"}), ("YCbCr", {"compression": "jpeg"}), ("CMYK", {"compression": "tiff_lzw"})),
        *(("P", {"compression": "packbits"}), ("1", {"compression": "group4"}), ("L", {"compression": "tiff_lzw"})),
        ("LAB", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_windows_of_strips_that_pillow_wrote_are_those_of_the_image(
    mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    rgb = Image.fromarray(np.repeat(np.repeat(levels(3), 3, 0), 3, 1))
    image = Image.merge("LAB", rgb.split()) if mode == "LAB" else rgb.convert(mode)
    file = encoded(image, "TIFF", strip_size=3000, **options)
    whole = decode_image(file)
    reader = opened(tmp_path / "image.tif", file, ImageLimits(max_side=80))
    for window in (Window(5, 7, 100, 90), Window(-9, 150, 40, 230), Window(0, 0, 270, 210)):
        np.testing.assert_array_equal(cut(reader, window), cut(whole, window))


@pytest.mark.parametrize(
    "options",
    [
        {"photometric": 5, "rows_per_strip": 7},
        {"photometric": 5, "tile": 32, "deflate": False, "order": ">"},
        {"photometric": 8, "tile": 32},
        {"photometric": 2, "tile": 32, "jpeg": True},
    ],
    ids=str,
)
def test_windows_of_colors_in_planes_are_those_of_the_image(options: dict[str, Any], tmp_path: Path) -> None:
    file = tiff_of(levels(4 if options["photometric"] == 5 else 3), planar=True, **options)
    whole = decode_image(file)
    assert int(whole.max()) - int(whole.min()) > 150
    reader = opened(tmp_path / "image.tif", file)
    for window in (Window(5, 7, 60, 50), Window(-9, 40, 40, 80), Window(0, 0, WIDTH, HEIGHT)):
        np.testing.assert_array_equal(cut(reader, window), cut(whole, window))


class FailingDisk:
    """The bytes of a file, of which those from a position on cannot be read; counts the attempts."""

    def __init__(self, content: bytes, start: int) -> None:
        self._content = content
        self._start = start
        self.failed = 0

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, part: slice) -> bytes:
        if part.stop > self._start:
            self.failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._content[part]


def test_an_error_of_the_disk_concerns_one_image_and_its_range_is_sought_once(tmp_path: Path) -> None:
    content = FILES["u2 {'tile': 16}"]
    _, page = tiff.walk(content)
    disk = FailingDisk(content, int(page.blocks[..., 0].max()))
    reader = TiffReader(disk, page)
    for _ in range(3):
        with pytest.raises(BadImage) as caught:
            reader[0:8, 0:8]
        assert caught.value.reason == "IMAGE_NOT_FOUND"
    assert disk.failed == 1


def test_an_error_of_the_disk_in_the_directory_concerns_one_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(FILES["u1 {'tile': 16}"])
    monkeypatch.setattr(large_tiff, "FileSource", lambda path: FailingDisk(path.read_bytes(), 100))
    with pytest.raises(BadImage) as caught:
        open_large(path, SMALL, "image")
    assert caught.value.reason == "IMAGE_NOT_FOUND"


def test_crops_of_patches_equal_those_of_the_image_at_any_fraction_of_a_pixel(tmp_path: Path) -> None:
    """Far from the origin, float32 corners round differently than near it; windows may not move by that."""
    width, rng = 60_000, np.random.default_rng(3)
    image = rng.integers(0, 256, (24, width, 3), dtype=np.uint8)
    reader = opened(tmp_path / "wide.tif", tiff_of(image, rows_per_strip=8), ImageLimits())
    network = MalNetwork(ModelConfig("vit-micro/16", mask_head_hidden_channel=4, mask_head_out_channel=4))
    labeler = Labeler(network, LabelerConfig(crop_size=16), precision="float32")
    boxes = [
        *(
            (width - 40 + rng.random() * 30, rng.random() * 10, 2 + rng.random() * 30, 2 + 9 * rng.random())
            for _ in range(200)
        ),
        *((-3.5, -2.0, 20.0, 12.0), (width / 3, 0.0, 33.3, 24.0)),
    ]
    limits = ImageLimits(max_side=100)
    for box in boxes:
        patch = cut_patch(reader, box, labeler.config.margin_rate, limits)
        (crop,), (expected,) = labeler.prepare(patch, [box]), labeler.prepare(image, [box])
        assert isinstance(crop, Crop)
        assert isinstance(expected, Crop)
        np.testing.assert_array_equal(crop.pixels, expected.pixels)
        for name in ("box_xywh", "box_inside", "window", "image_hw", "area"):
            assert getattr(crop, name) == getattr(expected, name)


def test_a_box_outside_its_patch_fails_alone(tmp_path: Path) -> None:
    reader = opened(tmp_path / "image.tif", tiff_of(levels(3), tile=16))
    network = MalNetwork(ModelConfig("vit-micro/16", mask_head_hidden_channel=4, mask_head_out_channel=4))
    labeler = Labeler(network, LabelerConfig(crop_size=16), precision="float32")
    patch = cut_patch(reader, (10, 10, 12, 12), labeler.config.margin_rate, SMALL)
    inside, outside = labeler.prepare(patch, [(10, 10, 12, 12), (50, 40, 12, 12)])
    assert isinstance(inside, Crop)
    assert isinstance(outside, BadBox)


def test_a_crop_above_the_limits_and_an_invalid_box_have_different_errors(tmp_path: Path) -> None:
    reader = opened(tmp_path / "image.tif", tiff_of(levels(3), tile=16))
    with pytest.raises(BadImage) as caught:
        cut_patch(reader, (0, 0, WIDTH, HEIGHT), 0.6, SMALL)
    assert caught.value.reason == "IMAGE_TOO_LARGE"
    assert str(caught.value).startswith(f"{reader.name}: ")
    with pytest.raises(BadBox):
        cut_patch(reader, (200, 0, 5, 5), 0.6, SMALL)


def test_files_within_the_limits_and_other_formats_are_not_read_by_windows(tmp_path: Path) -> None:
    tiff, png, missing = tmp_path / "a.tif", tmp_path / "a.png", tmp_path / "missing.tif"
    tiff.write_bytes(tiff_of(levels(3)))
    png.write_bytes(b"\x89PNG\r\n\x1a\n")
    os.mkfifo(tmp_path / "pipe.tif")
    assert open_large(tiff, ImageLimits(), "a") is None
    for path in (png, missing, tmp_path, tmp_path / "pipe.tif"):
        assert open_large(path, SMALL, "a") is None
    assert open_large(tiff, ImageLimits(max_bytes=100), "a") is not None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff_of(levels(5), extra=(0,) * 4), "IMAGE_FORMAT"),
        (tiff_of(levels(3), more=((256, 4, (MAX_FRAME_PIXELS,)),)), "IMAGE_TOO_LARGE"),
        (tiff_of(levels(3), more=tuple((tag, 4, (16_000,)) for tag in (256, 257, 278))), "IMAGE_TOO_LARGE"),
        (tiff_of(levels(3), tile=16)[:-100], "IMAGE_DECODE_FAILED"),
    ],
    ids=["bands", "frame", "one compressed strip", "truncated directory"],
)
def test_what_cannot_be_read_by_windows_is_refused_with_its_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        open_large(path, ImageLimits(max_side=80), "image")
    assert caught.value.reason == reason


def test_a_source_reads_what_a_file_has(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    source = FileSource(path)
    for part in (slice(0, 4), slice(190, 400), slice(300, 500), slice(0, 0), slice(5, 1 << 70)):
        assert source[part] == bytes(range(200))[part]
    descriptors = len(os.listdir("/proc/self/fd"))
    del source
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1


def test_damaged_files_raise_only_bad_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    path = tmp_path / "image.tif"
    names = ("u1 {'tile': 16}", "u2 {'rows_per_strip': 7}", "f4 {'tile': 48, 'order': '>', 'big': True}")
    for name, number in itertools.product(names, range(150)):
        data = np.frombuffer(FILES[name], np.uint8).copy()
        first = 0 if number % 3 else data.size - 400
        positions = rng.integers(first, data.size, rng.integers(1, 6))
        data[positions] = rng.integers(0, 256, positions.size)
        path.write_bytes(data[: rng.integers(8, data.size) if number % 5 == 0 else None].tobytes())
        try:
            large = open_large(path, SMALL, "image")
            if large is not None:
                assert large[1][0:20, 0:20].shape[2] == 3
        except BadImage:
            continue
