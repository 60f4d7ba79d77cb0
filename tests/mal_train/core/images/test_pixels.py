"""The one rule for stored values: bits, sign, floats, byte order, bands, alpha and palettes, in every format."""

import io
import itertools
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mal_train.core.errors import BadImage
from mal_train.core.images.decoder import decode_image
from mal_train.core.images.files import read_image
from mal_train.core.images.header import ImageLimits, read_header
from mal_train.core.images.large_tiff import open_large
from mal_train.core.images.pillow_pixels import rgb_of_pillow
from mal_train.core.images.pixels import RangeFinder, ValueRange, divided_by_alpha, rgb_of_values
from tests.mal_train.core.images.tiffs import packed_tiff_of, tiff_of
from tests.reference import shared

Values = np.ndarray[Any, Any]

HEIGHT, WIDTH = 70, 90
TYPES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


def levels(bands: int = 1) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns smooth colors (H, W, bands) with the complete range of 0 to 255."""
    ramp = np.add.outer(np.arange(HEIGHT) * 3, np.arange(WIDTH))
    found = np.stack([ramp * (band + 1) % 256 for band in range(bands)], -1).astype(np.uint8)
    found[0, :2] = [0], [255]
    found[1, :2] = [0], [255]
    return found


def values_of(colors: Values, kind: str) -> Values:
    """Returns values of a type of which the rule makes these colors."""
    numbers = colors.astype(np.float64)
    if kind == "u1":
        return colors
    if kind == "i1":
        return (colors.astype(np.int16) - 128).astype(np.int8)
    if kind[0] == "f":
        return (numbers / 512 - 0.25).astype(kind)
    return (numbers * 4 + (20_000 if kind[0] == "u" else -20_000)).astype(kind)


def wide_png(values: Values, color_type: int) -> bytes:
    """Returns a PNG of 16 bits, its rows filtered by differences."""
    height, width, bands = values.shape
    rows = values.astype(">u2").tobytes()
    table = np.frombuffer(rows, np.uint8).reshape(height, width, 2 * bands)
    filtered = np.diff(table, axis=1, prepend=np.uint8(0)).reshape(height, -1)
    body = b"".join(b"\1" + row.tobytes() for row in filtered)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_values_of_every_type_become_the_same_colors(kind: str, bands: int) -> None:
    colors = levels(bands)
    values = values_of(colors, kind)
    expected = np.broadcast_to(colors[:, :, :3], (HEIGHT, WIDTH, 3))
    np.testing.assert_array_equal(rgb_of_values(values), expected)
    for order, big, (tile, rows) in itertools.product("<>", (False, True), ((32, 0), (0, 20), (0, 0))):
        extra = (2,) if bands == 4 else ()
        file = tiff_of(values, order=order, big=big, extra=extra, tile=tile, rows_per_strip=rows)
        np.testing.assert_array_equal(decode_image(file), expected)


@pytest.mark.parametrize("kind", ["u1", "u2", "i4", "f4"])
@pytest.mark.parametrize(
    "options",
    [
        {"planar": True, "tile": 16},
        {"deflate": False},
        {"deflate": False, "planar": True},
        {"predictor": 2, "tile": 48},
    ],
    ids=str,
)
def test_every_storage_of_values_gives_the_same_colors(kind: str, options: dict[str, Any]) -> None:
    colors = levels(3)
    for order in "<>":
        file = tiff_of(values_of(colors, kind), order=order, **options)
        np.testing.assert_array_equal(decode_image(file), colors)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_the_floating_point_predictor_is_undone(kind: str) -> None:
    colors = levels(3)
    for planar in (False, True):
        file = tiff_of(values_of(colors, kind), predictor=3, tile=32, planar=planar)
        np.testing.assert_array_equal(decode_image(file), colors)


def test_files_of_another_writer_are_read_as_it_reads_them() -> None:
    tifffile = pytest.importorskip("tifffile")
    for kind, bands, order, tile, predictor in itertools.product(
        ("u1", "u2", "i2", "f4"), (1, 3), "<>", (None, (48, 64)), (False, True)
    ):
        if predictor and kind == "f4":  # which needs another package
            continue
        colors = levels(bands)
        values = values_of(colors, kind)
        buffer = io.BytesIO()
        photometric = "rgb" if bands == 3 else "minisblack"
        options = {"compression": "zlib", "tile": tile, "predictor": predictor, "photometric": photometric}
        tifffile.imwrite(buffer, values if bands == 3 else values[:, :, 0], byteorder=order, **options)
        np.testing.assert_array_equal(decode_image(buffer.getvalue()), np.broadcast_to(colors, (HEIGHT, WIDTH, 3)))


@pytest.mark.parametrize(("color_type", "bands"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_png_of_16_bits_keeps_all_of_them(color_type: int, bands: int) -> None:
    colors = levels(1 if bands < 3 else 3)
    alpha = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    values = values_of(colors, "u2")
    file = wide_png(np.concatenate([values, alpha], -1) if bands in (2, 4) else values, color_type)
    np.testing.assert_array_equal(decode_image(file), np.broadcast_to(colors, (HEIGHT, WIDTH, 3)))
    assert str(read_header(file).pixel_format).startswith("16-bit unsigned")


def test_12_bits_in_16_and_a_narrow_range_lose_nothing_to_the_full_range() -> None:
    full = (levels().astype(np.float64) * 257).astype(np.uint16)
    expected = decode_image(tiff_of(full))
    for narrow in (full >> 4, 51_200 + full // 64):
        found = decode_image(wide_png(narrow.astype(np.uint16), 0))
        assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_bits_are_unpacked(bits: int) -> None:
    values = levels()[:, :, 0].astype(np.uint16) * ((1 << bits) // 256)
    np.testing.assert_array_equal(decode_image(packed_tiff_of(values, bits)), np.repeat(levels(), 3, 2))


def test_dead_pixels_nan_and_no_data_do_not_decide_the_range() -> None:
    colors = np.resize(levels()[:, :, 0], (200, 200))
    floats = colors.astype(np.float32)
    plain = rgb_of_values(floats)
    floats[5, 5], floats[6, 6], floats[7, 7] = np.nan, np.inf, 1e30
    found = rgb_of_values(floats)
    assert found[5, 5].tolist() == [0, 0, 0]
    assert found[6, 6].tolist() == found[7, 7].tolist() == [255, 255, 255]
    assert np.count_nonzero(found != plain) <= 9
    integers = colors.astype(np.int16)
    integers[:100] = -9999
    with_tag = decode_image(tiff_of(integers, nodata="-9999"))
    assert not with_tag[:100].any()
    assert with_tag[100:].max() == 255
    assert with_tag[100:].mean() > 60
    assert rgb_of_values(integers)[100:].min() > 240


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((3, 20, 30), "np.moveaxis(array, 0, -1)"),
        ((1, 20, 30), "np.moveaxis(array, 0, -1)"),
        ((4, 20, 30), "np.moveaxis(array, 0, -1)"),
        ((1, 20, 30, 3), "array[0]"),
        ((20, 30, 2), "array[:, :, 0]"),
        ((20, 30, 7), "array[:, :, [2, 1, 0]]"),
    ],
)
def test_the_remedy_for_an_array_of_another_shape_makes_an_image_of_it(shape: tuple[int, ...], remedy: str) -> None:
    array = np.zeros(shape, np.uint8)
    with pytest.raises(BadImage) as error:
        rgb_of_values(array)
    assert error.value.reason == "IMAGE_FORMAT"
    assert str(error.value).endswith(remedy)
    assert rgb_of_values(eval(remedy, {"np": np, "array": array})).shape == (20, 30, 3)


@pytest.mark.parametrize(("bands", "options"), [(2, "-b 1"), (5, "-b 3 -b 2 -b 1")])
def test_the_remedy_for_the_bands_of_a_file_names_bands_that_it_has(bands: int, options: str) -> None:
    with pytest.raises(BadImage) as error:
        decode_image(tiff_of(np.repeat(levels(), bands, 2)))
    assert str(error.value).endswith(f"gdal_translate {options}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -9999.0])
def test_an_image_without_a_finite_value_is_refused_by_name(value: float, tmp_path: Path) -> None:
    values = np.full((20, 30), value, np.float32)
    content = tiff_of(values, nodata="-9999")
    with pytest.raises(BadImage, match=r"^a\.tif: ") as error:
        decode_image(content, name="a.tif")
    assert error.value.reason == "IMAGE_FORMAT"
    path = tmp_path / "large.tif"
    path.write_bytes(content)
    large = open_large(path, ImageLimits(max_side=25), "large.tif")
    assert large is not None
    for _ in range(2):
        with pytest.raises(BadImage, match=r"^large\.tif: "):
            large[1][0:5, 0:5]


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_an_image_of_one_value_is_black(value: int) -> None:
    assert not rgb_of_values(np.full((4, 5), value, np.uint16)).any()


def test_a_few_bright_pixels_on_a_flat_image_stay() -> None:
    values = np.full((300, 300), 100, np.uint16)
    values[10:12, 10:12] = 4000
    assert rgb_of_values(values)[10, 10].tolist() == [255, 255, 255]


def test_the_range_does_not_depend_on_the_parts_in_which_values_come() -> None:
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    whole = RangeFinder(values.size)
    whole.add(values)
    ordered = np.sort(values)
    assert whole.range() == ValueRange(float(ordered[20]), float(ordered[-21]))
    for size in (7, 1000, 90_000):
        parts = RangeFinder(values.size)
        for start in range(0, values.size, size):
            parts.add(values[start : start + size])
        assert parts.range() == whole.range()


def test_white_is_zero_inverts_the_stretched_values_but_not_no_data() -> None:
    values = values_of(levels(), "u2")
    np.testing.assert_array_equal(decode_image(tiff_of(values, photometric=0)), 255 - decode_image(tiff_of(values)))
    values[20:40] = 7
    for sparse in (frozenset[int](), frozenset({1})):
        found = decode_image(tiff_of(values, photometric=0, nodata="7", rows_per_strip=20, sparse=sparse))
        assert not found[20:40].any()
        assert found[:20].max() == 255


@pytest.mark.parametrize(
    ("file", "named"),
    [
        (tiff_of(levels(2), photometric=1, extra=(0,)), "2 bands"),
        (tiff_of(levels(5), extra=(0,) * 4), "5 bands"),
        (tiff_of(levels(5).astype(np.float32), extra=(0,) * 4), "5 bands"),
        (tiff_of(levels(7), planar=True, extra=(0,) * 6), "7 bands"),
        (tiff_of(levels().astype(np.complex64)), "complex"),
        (tiff_of(levels(), photometric=32803), "32803"),
        (tiff_of(levels(), more=((258, 3, (3,)),)), "3 bits"),
        (tiff_of(levels(), more=((259, 3, (34887,)),)), "34887"),
    ],
)
def test_values_that_form_no_image_are_refused_by_name(file: bytes, named: str) -> None:
    with pytest.raises(BadImage, match=named) as caught:
        decode_image(file)
    assert caught.value.reason == "IMAGE_FORMAT"


def test_further_bands_are_dropped_and_counted_and_alpha_is_only_dropped() -> None:
    for bands, extra, dropped in ((4, (0,), 1), (4, (2,), 0), (6, (0, 0, 2), 2)):
        file = tiff_of(levels(bands), photometric=2, extra=extra)
        assert read_header(file).pixel_format.dropped_bands == dropped
        np.testing.assert_array_equal(decode_image(file), levels(3) if bands == 3 else levels(bands)[:, :, :3])


@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("deflate", [True, False])
def test_blocks_that_are_not_stored_are_black(kind: str, deflate: bool) -> None:
    values = values_of(levels(3), kind)
    found = decode_image(tiff_of(values, tile=32, deflate=deflate, sparse=frozenset({1, 4})))
    assert not found[:32, 32:64].any()
    assert found[:32, :32].any()
    found = decode_image(tiff_of(values, rows_per_strip=20, deflate=deflate, sparse=frozenset({1})))
    assert not found[20:40].any()
    assert found[:20].any()
    assert found[40:].any()


@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("planar", [True, False])
def test_an_uncompressed_image_in_one_strip_that_is_not_stored_is_black(kind: str, planar: bool) -> None:
    width = 10_000  # its one strip is read as several
    values = np.tile(levels(3), (1, -(-width // WIDTH), 1))[:, :width].astype(kind)
    sparse = frozenset({1}) if planar else frozenset({0})
    found = decode_image(tiff_of(values, deflate=False, planar=planar, sparse=sparse))
    assert not found[:, :, 1].any()
    assert found[:, :, 0].any() == found[:, :, 2].any() == planar


def premultiplied(colors: Values, kind: str) -> tuple[Values, Values]:
    """Returns colors (H, W, 3) and an alpha of a type, and the bands (H, W, 4) that store them."""
    opaque = 1.0 if kind[0] == "f" else float(np.iinfo(kind).max)
    alpha = np.resize(np.array([1.0, 0.75, 0.5, 0.25]), (*colors.shape[:2], 1))
    alpha = (alpha * opaque).astype(kind)
    full = colors.astype(np.float64) * (opaque / 255)
    return full, np.concatenate([np.rint(full * (alpha / opaque)).astype(kind), alpha], -1)


@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize("kind", ["u1", "u2", "u4"])
def test_premultiplied_colors_are_divided_by_alpha_in_every_storage(kind: str, planar: bool) -> None:
    colors = levels(3)
    _, bands = premultiplied(colors, kind)
    found = decode_image(tiff_of(bands, extra=(1,), planar=planar))
    assert np.abs(found.astype(int) - colors).max() <= (4 if kind == "u1" else 1)
    plain = decode_image(tiff_of(bands, extra=(2,), planar=planar))
    assert np.abs(plain.astype(int) - colors).max() > 100


def test_premultiplied_colors_of_8_bits_are_equal_in_planes_and_together() -> None:
    bands = levels(4)
    bands[:, :, :3] = np.minimum(bands[:, :, :3], bands[:, :, 3:])
    planes, together = (decode_image(tiff_of(bands, extra=(1,), planar=planar)) for planar in (True, False))
    np.testing.assert_array_equal(planes, together)


def test_divided_colors_keep_no_data_and_have_a_limit() -> None:
    colors = np.array([[[7, 200, 60]]], np.uint16)
    alpha = np.array([[[50]]], np.uint16)
    assert divided_by_alpha(colors, alpha, 255, nodata=7).tolist() == [[[7, 255, 255]]]
    assert not divided_by_alpha(colors, alpha * 0, 255).any()
    numbers = np.array([[[0.25, np.nan, 3.0]]], np.float32)
    np.testing.assert_array_equal(divided_by_alpha(numbers, numbers[:, :, :1] * 2, 1), [[[0.5, np.nan, 6.0]]])


@pytest.mark.parametrize("kind", ["i2", "u8", "f8"])
def test_premultiplied_colors_that_are_not_divided_are_refused(kind: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode_image(tiff_of(values_of(levels(4), kind), extra=(1,)))
    assert caught.value.reason == "IMAGE_FORMAT"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB"])
def test_colors_of_a_tiff_and_of_its_pillow_image_are_equal(mode: str, tmp_path: Path) -> None:
    rgb = Image.fromarray(levels(3))
    image = {
        "LAB": lambda: Image.merge("LAB", rgb.split()),
        "PA": lambda: rgb.convert("P").convert("PA"),
        "La": lambda: rgb.convert("LA").convert("La"),
        "RGBa": lambda: rgb.convert("RGBA").convert("RGBa"),
    }.get(mode, lambda: rgb.convert(mode))()
    if mode in {"PA", "La", "RGBa"}:  # which Pillow does not write
        assert rgb_of_pillow(image).shape == (HEIGHT, WIDTH, 3)
        return
    path = tmp_path / "image.tif"
    # Older versions of Pillow do not read YCbCr without compression.
    image.save(path, compression="jpeg" if mode == "YCbCr" else None)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(read_image(path), rgb_of_pillow(opened))


def test_damaged_values_raise_only_bad_image() -> None:
    rng = np.random.default_rng(5)
    files = [
        tiff_of(values_of(levels(3), "u2"), tile=32, predictor=2),
        tiff_of(values_of(levels(3), "f4"), planar=True, rows_per_strip=16, order=">"),
        tiff_of(values_of(levels(), "i4"), big=True, tile=32, order=">"),
        tiff_of(values_of(levels(4), "u1"), big=True, extra=(0,)),
        wide_png(values_of(levels(3), "u2"), 2),
        wide_png(np.repeat(values_of(levels(), "u2"), 2, 2), 4),
    ]
    for file in files:
        data = np.frombuffer(file, np.uint8)
        directory = data.size - 400
        for number in range(200):
            mutant = data.copy()
            positions = rng.integers(0 if number % 2 else directory, mutant.size, rng.integers(1, 6))
            mutant[positions] = rng.integers(0, 256, positions.size)
            try:
                image = decode_image(mutant[: rng.integers(20, data.size) if number % 5 == 0 else None].tobytes())
            except BadImage:
                continue
            assert image.ndim == 3
            assert image.shape[2] == 3


@pytest.fixture
def depth() -> Path:
    return shared("cases", "depth")


def test_the_thermal_and_the_12_bit_image_equal_their_full_range(depth: Path) -> None:
    full = read_image(depth / "full.png")
    for name in ("thermal.png", "xray12.png"):
        assert np.abs(read_image(depth / name).astype(int) - full).max() <= 1
    with Image.open(depth / "big_endian_16.tif") as image:
        np.testing.assert_array_equal(rgb_of_pillow(image), read_image(depth / "big_endian_16.tif"))
    assert len(json.loads((depth / "in.json").read_text())["images"]) == 4
