"""Headers of real files: size, orientation and frames, and metadata of any size, which changes no pixel."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from mal_train.core.errors import BadImage
from mal_train.core.images.container import ImageHeader
from mal_train.core.images.decoder import decode_image
from mal_train.core.images.header import read_header
from tests.mal_train.core.images.hostile import chunk, segment
from tests.mal_train.core.images.test_decoder import encoded, noise
from tests.mal_train.core.images.tiffs import tiff_of

IMAGE = Image.fromarray(noise())
SIZE_WH = (60, 40)
PLAIN = {form: encoded(IMAGE, form) for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")}


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description " * 200
    return exif


def inserted(data: bytes, at: int, *parts: bytes) -> bytes:
    return data[:at] + b"".join(parts) + data[at:]


def full_segments(marker: int, prefix: bytes, count: int) -> list[bytes]:
    return [segment(marker, prefix + bytes([index % 255]) * (65_533 - len(prefix))) for index in range(count)]


def png_with(*chunks: bytes) -> bytes:
    return inserted(PLAIN["PNG"], 33, *chunks)


def geotiff() -> bytes:
    tags = ImageFileDirectory_v2()
    tags[33550] = (0.5, 0.5, 0.0)
    tags[33922] = (0.0, 0.0, 0.0, 440_720.0, 3_751_320.0, 0.0)
    tags[34735] = (1, 1, 0, 1, 1024, 0, 1, 1)
    tags[42112] = "<GDALMetadata>" + "<Item/>" * 100_000 + "</GDALMetadata>"
    return encoded(IMAGE, "TIFF", tiffinfo=tags, icc_profile=bytes(600_000), exif=None)


def png_with_texts() -> bytes:
    info = PngInfo()
    for number in range(200):
        info.add_text(f"key {number}", "text " * 500, zip=number % 2 == 0)
    info.add_itxt("XML:com.adobe.xmp", "<x/>" * 100_000, zip=True)
    return encoded(IMAGE, "PNG", pnginfo=info, icc_profile=bytes(600_000), exif=exif_of(1))


RICH = {
    "JPEG with 10 MB of extended XMP": (
        "JPEG",
        inserted(PLAIN["JPEG"], 2, *full_segments(0xE1, b"http://ns.adobe.com/xmp/extension/\0", 160)),
    ),
    "JPEG with a profile of 255 segments": (
        "JPEG",
        inserted(PLAIN["JPEG"], 2, *full_segments(0xE2, b"ICC_PROFILE\0\1\xff", 255)),
    ),
    "JPEG with Photoshop blocks, FlashPix and comments": (
        "JPEG",
        inserted(
            PLAIN["JPEG"],
            2,
            *full_segments(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\xff\0", 20),
            *full_segments(0xE2, b"FPXR\0", 20),
            *full_segments(0xFE, b"", 3),
        ),
    ),
    "PNG with texts, XMP, profile and EXIF": ("PNG", png_with_texts()),
    "PNG with 20 MB of private data": ("PNG", png_with(chunk(b"prVt", bytes(20_000_000)))),
    "WebP with EXIF, profile and XMP": (
        "WEBP",
        encoded(IMAGE, "WEBP", exif=exif_of(1), icc_profile=bytes(600_000), xmp=b"<x/>" * 100_000),
    ),
    "TIFF with GeoTIFF and GDAL tags": ("TIFF", geotiff()),
    "BMP with trailing bytes": ("BMP", PLAIN["BMP"] + bytes(1000)),
}


@pytest.mark.parametrize("name", RICH)
def test_metadata_of_real_files_is_accepted_and_changes_no_pixel(name: str) -> None:
    form, data = RICH[name]
    np.testing.assert_array_equal(decode_image(data), decode_image(PLAIN[form]))
    assert read_header(data) == ImageHeader(SIZE_WH)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_read_and_never_applied(form: str, orientation: int) -> None:
    data = encoded(IMAGE, form, exif=exif_of(orientation))
    assert read_header(data) == ImageHeader(SIZE_WH, orientation)
    np.testing.assert_array_equal(decode_image(data), decode_image(PLAIN[form]))


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"junk" * 9])
def test_damaged_exif_counts_as_upright(exif: bytes) -> None:
    data = inserted(PLAIN["JPEG"], 2, segment(0xE1, b"Exif\0\0" + exif))
    assert read_header(data) == ImageHeader(SIZE_WH)


@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("MPO", {"quality": 95})],
)
def test_frames_are_counted_and_the_first_is_decoded(form: str, options: dict[str, object]) -> None:
    data = encoded(IMAGE, form, save_all=True, append_images=[IMAGE.rotate(180), IMAGE.rotate(90)], **options)
    first = encoded(IMAGE, "JPEG" if form == "MPO" else form, **options)
    assert read_header(data) == ImageHeader(SIZE_WH, frames=3)
    np.testing.assert_array_equal(decode_image(data), decode_image(first))


def test_the_gain_map_of_an_ultra_hdr_image_is_no_frame() -> None:
    data = encoded(IMAGE, "MPO", save_all=True, append_images=[IMAGE])
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<rdf:Description hdrgm:Version="1.0"/>')
    assert read_header(inserted(data, 2, xmp)).frames == 1


def test_an_image_beside_an_animation_counts_as_a_frame() -> None:
    data = encoded(IMAGE, "PNG", save_all=True, append_images=[IMAGE.rotate(180), IMAGE.rotate(90)], default_image=True)
    assert read_header(data).frames == 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_the_header_agrees_with_pillow_for_every_mode(form: str) -> None:
    for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK"):
        buffer = io.BytesIO()
        try:
            IMAGE.convert(mode).save(buffer, form)
        except OSError:
            continue  # the format has no such mode
        assert read_header(buffer.getvalue()).size_wh == SIZE_WH


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_in_tiles_planes_and_byte_orders_keeps_every_pixel(big_endian: bool, bits: int) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = noise() if bits == 8 else noise().astype(np.uint16) * 257
    for options in (
        {"tile": (16, 16)},
        {"tile": (512, 512), "compression": "zlib"},
        {"rowsperstrip": 1},
        {"planarconfig": "separate", "compression": "zlib"},
    ):
        buffer = io.BytesIO()
        planar = "planarconfig" in options
        tifffile.imwrite(
            buffer,
            np.ascontiguousarray(pixels.transpose(2, 0, 1)) if planar else pixels,
            photometric="rgb",
            byteorder=">" if big_endian else "<",
            **options,
        )
        if planar and bits == 16:
            continue  # Pillow reads no planes of 16 bits
        np.testing.assert_array_equal(decode_image(buffer.getvalue()), noise())


def test_big_tiff_is_decoded() -> None:
    np.testing.assert_array_equal(decode_image(encoded(IMAGE, "TIFF", big_tiff=True)), noise())


def test_a_png_of_empty_and_small_chunks_of_pixel_data_is_decoded() -> None:
    raw = b"".join(b"\0" + row.tobytes() for row in noise())
    packed = zlib.compress(raw)
    chunks = [chunk(b"IDAT", packed[at : at + 100]) + chunk(b"IDAT", b"") for at in range(0, len(packed), 100)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *SIZE_WH, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)  # and no end chunk, which Pillow does not ask for
    np.testing.assert_array_equal(decode_image(data), noise())


def test_a_header_of_a_size_above_the_limits_is_read_by_tools_and_refused_by_the_decoder() -> None:
    large = encoded(Image.new("1", (20_000, 1)), "PNG")
    assert read_header(large).size_wh == (20_000, 1)
    with pytest.raises(BadImage) as caught:
        decode_image(large)
    assert caught.value.reason == "IMAGE_TOO_LARGE"


def test_values_that_take_more_memory_than_the_largest_image_are_refused() -> None:
    values = np.zeros((100, 100, 3), np.float64)
    large = tiff_of(values, more=tuple((tag, 4, (6_000,)) for tag in (256, 257, 278)))
    many = tiff_of(np.zeros((8, 8, 3), np.uint8), more=((277, 4, (1 << 31,)),), extra=(0,))
    for file in (large, many):
        with pytest.raises(BadImage) as caught:
            decode_image(file)
        assert caught.value.reason == "IMAGE_TOO_LARGE"
    assert decode_image(tiff_of(values)).shape == (100, 100, 3)
