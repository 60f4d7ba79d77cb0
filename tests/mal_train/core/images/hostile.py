"""Image files that consist of headers: valid or nearly valid, small as images, and as large as a request may be."""

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image

ZEROS = bytes(1_000_000)


def saved(image_format: str, mode: str = "RGB", size_wh: tuple[int, int] = (8, 8), **options: object) -> bytes:
    """Returns a black image."""
    buffer = io.BytesIO()
    Image.new(mode, size_wh).save(buffer, image_format, **options)
    return buffer.getvalue()


def repeated(unit: bytes, size: int) -> bytes:
    """Returns at most `size` bytes of repetitions of a unit, at least one."""
    return unit * max(size // len(unit), 1)


# JPEG


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def jpeg_with(inserted: bytes, *, at: int = 2) -> bytes:
    """Returns a JPEG with bytes after its start marker, or elsewhere."""
    jpeg = saved("JPEG")
    return jpeg[:at] + inserted + jpeg[at:]


def jpeg_of(marker: int, content: bytes) -> Callable[[int], bytes]:
    """Returns a maker of JPEG files of a size, which repeat one segment."""
    return lambda size: jpeg_with(repeated(segment(marker, content), size))


def jpeg_after_scan(unit: bytes) -> Callable[[int], bytes]:
    """Returns a maker of JPEG files that repeat bytes before the end marker."""
    return lambda size: jpeg_with(repeated(unit, size), at=-2)


def jpeg_of_scans(count: int, size_wh: tuple[int, int], *, data: bytes = b"") -> bytes:
    """Returns a progressive JPEG with further scans, each with `data` in it."""
    jpeg = saved("JPEG", "L", size_wh, progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    scan = jpeg[last : last + 2 + int.from_bytes(jpeg[last + 2 : last + 4])]
    return jpeg[:-2] + (scan + data) * count + jpeg[-2:]


# PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(kind: bytes, content: bytes, *, before_data: bool = True) -> Callable[[int], bytes]:
    """Returns a maker of PNG files that repeat one chunk before or after their pixel data."""

    def make(size: int) -> bytes:
        png = saved("PNG")
        at = png.index(b"IDAT") - 4 if before_data else len(png) - 12
        return png[:at] + repeated(chunk(kind, content), size) + png[at:]

    return make


# TIFF

Tag = tuple[int, int, int, int]
"""Tag, type, count, and value or offset."""

STRIP_OFFSETS, TILE_WIDTH = 273, 322
TAGS: tuple[Tag, ...] = (
    *((256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1)),
    *((262, 3, 1, 1), (273, 4, 1, 0), (277, 3, 1, 1), (278, 3, 1, 1)),
)


def tiff(body: bytes, *tags: Tag, following: bytes = bytes(4)) -> bytes:
    """Returns a TIFF of 2x2 px: `body` at byte 8, then a directory of TAGS, replaced and extended by `tags`."""
    body += bytes(len(body) % 2)
    entries = {tag[0]: tag for tag in (*TAGS, *tags)}
    if TILE_WIDTH in entries:
        del entries[STRIP_OFFSETS]
    packed = b"".join(struct.pack("<HHII", *entries[tag]) for tag in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries)) + packed + following


def tiff_of_strips(size: int) -> bytes:
    return tiff(b"\x09\0" * (size // 2), (273, 3, size // 2, 8))


def tiff_of_values(tag: int, kind: int) -> Callable[[int], bytes]:
    """Returns a maker of TIFF files with one tag of many values."""
    width = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1}[kind]
    return lambda size: tiff(bytes(size), (tag, kind, size // width, 8))


def tiff_of_pages(size: int) -> bytes:
    """Returns a chain of directories without tags."""
    count = size // 6
    start = 8 + 2 + 12 * len(TAGS) + 4
    pages = b"".join(struct.pack("<HI", 0, start + 6 * (page + 1)) for page in range(count))
    return tiff(b"", following=struct.pack("<I", start)) + pages + bytes(6)


def tiff_of_tags(size: int) -> bytes:
    """Returns a directory of the largest number of tags, each of which refers to most of the file."""
    entries = b"".join(struct.pack("<HHII", tag, 7, size, 8) for tag in range(300, 65_500))
    head = b"".join(struct.pack("<HHII", *tag) for tag in TAGS)
    count = len(TAGS) + 65_200
    return b"II*\0" + struct.pack("<I", 8 + size) + bytes(size) + struct.pack("<H", count) + head + entries + bytes(4)


def tiff_of_shared_tiles(size: int) -> bytes:
    """Returns 62 500 tiles of 16x16 px that all read the same, nearly endless PackBits data without output."""
    count, side = 62_500, 4_000
    nothing = b"\x80" * (size - 4 * 2 * count) + b"\x81\0" * 2
    arrays = struct.pack("<I", 8) * count + struct.pack("<I", len(nothing)) * count
    return tiff(
        nothing + bytes(len(nothing) % 2) + arrays,
        *((256, 3, 1, side), (257, 3, 1, side), (259, 3, 1, 32773), (322, 3, 1, 16), (323, 3, 1, 16)),
        (324, 4, count, 8 + len(nothing) + len(nothing) % 2),
        (325, 4, count, 8 + len(nothing) + len(nothing) % 2 + 4 * count),
    )


def tiff_of_large_tiles(_: int) -> bytes:
    """Returns an image of 16384x16 px whose 1024 tiles have 64 million pixels each."""
    count = 1024
    tile = zlib.compress(bytes(1 << 20))
    arrays = struct.pack("<I", 8) * count + struct.pack("<I", len(tile)) * count
    start = 8 + len(tile) + len(tile) % 2
    return tiff(
        tile + bytes(len(tile) % 2) + arrays,
        *((256, 4, 1, 16_384), (257, 4, 1, 16), (259, 3, 1, 8), (322, 4, 1, 16), (323, 4, 1, 4_000_000)),
        *((324, 4, count, start), (325, 4, count, start + 4 * count)),
    )


# WebP and BMP


def webp_of(kind: bytes, content: bytes, *, extended: bool = True) -> Callable[[int], bytes]:
    """Returns a maker of WebP files that repeat one chunk after the pixels."""

    def make(size: int) -> bytes:
        image = saved("WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0") if extended else saved("WEBP")
        unit = kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
        body = image[8:] + repeated(unit, size)
        return b"RIFF" + struct.pack("<I", len(body)) + body

    return make


def webp_of_frames(size: int) -> bytes:
    """Returns an animation that repeats its last frame."""
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    image = buffer.getvalue()
    last = image[image.rindex(b"ANMF") :]
    body = image[8:] + repeated(last, size)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_of_runs(unit: bytes) -> Callable[[int], bytes]:
    """Returns a maker of run-length coded BMP files whose codes produce nothing."""

    def make(size: int) -> bytes:
        header = struct.pack("<IiiHHIIiiII", 40, 2000, 1000, 1, 8, 1, 0, 0, 0, 256, 0)
        palette = bytes(range(256)) * 4
        return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + palette + repeated(unit, size)

    return make


def bmp_of_header(size: int) -> bytes:
    return b"BM" + struct.pack("<IHHII", 0, 0, 0, 54, 0xFFFFFFF0) + bytes(size)


EXIF_OF_TAGS = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5_400) + struct.pack("<HHII", 700, 7, 4, 0) * 5_400

HOSTILE: dict[str, Callable[[int], bytes]] = {
    "JPEG of short EXIF segments": jpeg_of(0xE1, b"Exif\0\0" + b"x" * 10),
    "JPEG of full EXIF segments": jpeg_of(0xE1, b"Exif\0\0" + bytes(65_000)),
    "JPEG of EXIF tags": jpeg_of(0xE1, EXIF_OF_TAGS),
    "JPEG of empty segments": jpeg_of(0xE3, b""),
    "JPEG of comments": jpeg_of(0xFE, b"x"),
    "JPEG of profiles": jpeg_of(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(65_000)),
    "JPEG of Photoshop blocks": jpeg_of(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5_000),
    "JPEG of quantization tables": jpeg_of(0xDB, (b"\0" + b"\1" * 64) * 1_000),
    "JPEG of JFIF segments": jpeg_of(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"),
    "JPEG of fill bytes": lambda size: jpeg_with(b"\xff" * size),
    "JPEG of fill bytes after its scan": jpeg_after_scan(b"\xff"),
    "JPEG of escaped bytes after its scan": jpeg_after_scan(b"\xff\0"),
    "JPEG of restart markers": jpeg_after_scan(b"\xff\xd0"),
    "JPEG of segments after its scan": jpeg_after_scan(segment(0xE3, b"")),
    "JPEG of tables after its scan": jpeg_after_scan(segment(0xDB, (b"\0" + b"\1" * 64) * 1_000)),
    "JPEG of scans": lambda size: jpeg_of_scans(size // 12, (64, 64)),
    "JPEG of scans of a large image": lambda _: jpeg_of_scans(90, (5_000, 5_000)),
    "PNG of empty chunks": png_of(b"prVt", b""),
    "PNG of profiles": png_of(b"iCCP", b"a\0\0" + zlib.compress(ZEROS, 9)),
    "PNG of compressed texts": png_of(b"zTXt", b"a\0\0" + zlib.compress(ZEROS, 9)),
    "PNG of compressed texts after its pixels": png_of(b"zTXt", b"a\0\0" + zlib.compress(ZEROS, 9), before_data=False),
    "PNG of international texts": png_of(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(ZEROS, 9)),
    "PNG of texts": png_of(b"tEXt", b"a\0b"),
    "PNG of empty pixel data": png_of(b"IDAT", b""),
    "PNG of empty pixel data at its end": png_of(b"IDAT", b"", before_data=False),
    "PNG of frames": png_of(b"fcTL", bytes(26)),
    "PNG of palettes": png_of(b"PLTE", bytes(768)),
    "TIFF of strips": tiff_of_strips,
    "TIFF of pages": tiff_of_pages,
    "TIFF of tags": tiff_of_tags,
    "TIFF of bits per sample": tiff_of_values(258, 3),
    "TIFF of colors": tiff_of_values(320, 3),
    "TIFF of resolutions": tiff_of_values(282, 5),
    "TIFF of XMP": tiff_of_values(700, 1),
    "TIFF of tiles that share data": tiff_of_shared_tiles,
    "TIFF of tiles larger than the image": tiff_of_large_tiles,
    "WebP of empty chunks": webp_of(b"junk", b""),
    "WebP of empty chunks in a plain file": webp_of(b"junk", b"", extended=False),
    "WebP of EXIF": webp_of(b"EXIF", EXIF_OF_TAGS),
    "WebP of frames": webp_of_frames,
    "BMP of empty runs": bmp_of_runs(b"\0\0"),
    "BMP of empty deltas": bmp_of_runs(b"\0\2\0\0"),
    "BMP of header": bmp_of_header,
}
"""Makers of files of about a given size, by name."""
