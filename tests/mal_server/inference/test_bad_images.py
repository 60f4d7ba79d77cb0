"""Invalid, deceptive and unusual image files: each gets one clear status, and the server stays available."""

import asyncio
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from google.rpc import code_pb2
from mal.v1 import labeling_pb2
from PIL import Image

from tests.mal_server.calls import bulk, reason_of
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, bright_disc, encoded, label_request, serving


def chunk(chunk_type: bytes, data: bytes, length: int | None = None) -> bytes:
    size = struct.pack(">I", len(data) if length is None else length)
    return size + chunk_type + data + struct.pack(">I", zlib.crc32(chunk_type + data))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


JPEG = encoded(bright_disc(), "JPEG", quality=95)
DISC = Image.fromarray(bright_disc())
EXIF_ROTATED = saved(
    DISC, "JPEG", quality=95, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
)

REFUSED = {
    "zero bytes": (b"", "IMAGE_DECODE_FAILED"),
    "text named .jpg": (b"not an image file\n" * 20, "IMAGE_FORMAT"),
    "truncated JPEG": (JPEG[: len(JPEG) * 9 // 10], "IMAGE_DECODE_FAILED"),
    "truncated PNG": (DISC_PNG[: len(DISC_PNG) // 2], "IMAGE_DECODE_FAILED"),
    "PNG of 900 Mpix": (png_header(30_000, 30_000) + chunk(b"IDAT", b""), "IMAGE_TOO_LARGE"),
    "PNG with a forged chunk length": (png_header(8, 8) + chunk(b"IDAT", b"", 0xFFFFFFF0), "IMAGE_DECODE_FAILED"),
    "animated GIF": (
        saved(DISC.convert("P"), "GIF", save_all=True, append_images=[DISC.convert("P")]),
        "IMAGE_FORMAT",
    ),
}

ACCEPTED = {
    "CMYK JPEG": saved(DISC.convert("CMYK"), "JPEG", quality=95),
    "16-bit gray PNG": saved(Image.fromarray(bright_disc()[:, :, 0].astype(np.uint16) * 257), "PNG"),
    "gray JPEG": saved(DISC.convert("L"), "JPEG", quality=95),
    "alpha PNG": saved(DISC.convert("RGBA"), "PNG"),
    "palette PNG": saved(DISC.convert("P"), "PNG"),
    "WebP": saved(DISC, "WEBP", lossless=True),
    "BMP": saved(DISC, "BMP"),
    "TIFF": saved(DISC, "TIFF"),
    "EXIF-rotated JPEG": EXIF_ROTATED,
}


def responses_of(*requests: labeling_pb2.LabelImageRequest) -> list[labeling_pb2.LabelImagesResponse]:
    async def work() -> list[labeling_pb2.LabelImagesResponse]:
        async with serving() as running:
            responses = await asyncio.wait_for(bulk(running, *requests), 60)
            return [responses[f"item {i}"] for i in range(len(requests))]

    return asyncio.run(work())


def test_each_invalid_image_has_its_reason_and_the_valid_one_after_them_is_labeled() -> None:
    requests = [label_request(DISC_BOX, content=content) for content, _ in REFUSED.values()]
    *refused, good = responses_of(*requests, label_request(DISC_BOX))
    assert {name: reason_of(response.status) for name, response in zip(REFUSED, refused, strict=True)} == {
        name: reason for name, (_, reason) in REFUSED.items()
    }
    assert all(response.status.code == code_pb2.INVALID_ARGUMENT for response in refused)
    assert good.response.results[0].area_px > 300


def test_unusual_formats_give_the_same_mask_as_the_plain_image() -> None:
    responses = responses_of(*(label_request(DISC_BOX, content=content) for content in ACCEPTED.values()))
    areas = {name: item.response.results[0].area_px for name, item in zip(ACCEPTED, responses, strict=True)}
    plain = responses_of(label_request(DISC_BOX))[0].response.results[0].area_px
    assert areas == dict.fromkeys(ACCEPTED, pytest.approx(plain, rel=0.05))


def test_exif_rotation_is_not_applied() -> None:
    stored, rotated = label_request(DISC_BOX, content=EXIF_ROTATED), label_request(DISC_BOX, content=EXIF_ROTATED)
    stored.image.expected_width, stored.image.expected_height = 60, 40
    rotated.image.expected_width, rotated.image.expected_height = 40, 60
    good, bad = responses_of(stored, rotated)
    assert (good.response.results[0].masks[0].coco_rle.height, good.status.code) == (40, 0)
    assert reason_of(bad.status) == "IMAGE_SIZE_MISMATCH"
    assert "EXIF" in bad.status.message
