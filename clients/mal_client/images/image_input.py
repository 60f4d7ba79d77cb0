"""Encodes the caller's image (array, Pillow image, path or bytes) for a request. Decodes nothing."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mal_train.core.errors import BadImage
from mal_train.core.images.files import read_image_bytes

if TYPE_CHECKING:
    from mal_client.types import ImageInput

# Modes that PNG stores as they are; the server's decoder then applies its one rule to alpha, gray and 16 bits.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})

MAX_FILE_BYTES = 1 << 30
"""Size limit of an image file whose server is not asked yet; above every limit that fits into a gRPC message."""


@dataclass(frozen=True)
class EncodedImage:
    """Bytes of an image file, and its size in px when the caller knows it, else (0, 0)."""

    content: bytes
    width: int = 0
    height: int = 0

    def size_bytes(self) -> int:
        """Returns the length of the file."""
        return len(self.content)

    def size_wh(self) -> tuple[int, int] | None:
        """Returns width and height in px, if need be from the header of the file; None for an unreadable header."""
        if self.width and self.height:
            return self.width, self.height
        # Imported here: callers that state the size do not need it.
        from mal_train.core.images.header import read_header  # noqa: PLC0415

        try:
            return read_header(self.content).size_wh
        except BadImage:
            return None


def encode(image: ImageInput) -> EncodedImage:
    """Returns the bytes to send.

    Arrays, uint8 (H, W, 3) RGB or (H, W) gray, and Pillow images become a lossless PNG; files and bytes are sent
    unchanged, so the server decodes exactly what is stored.

    Raises:
        BadImage: the file is missing (reason IMAGE_NOT_FOUND), the array has another shape or dtype (IMAGE_FORMAT), or
            the argument has another type.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return EncodedImage(bytes(image))
    if isinstance(image, str | Path):
        return EncodedImage(read_image_bytes(Path(image), MAX_FILE_BYTES))
    if isinstance(image, np.ndarray):
        return _encode_array(image)
    if hasattr(image, "save") and hasattr(image, "mode") and hasattr(image, "size"):
        return _encode_pillow(image)
    raise BadImage(f"image: {type(image).__name__}; a uint8 array, a Pillow image, a path or encoded bytes is needed")


def _encode_array(pixels: np.ndarray[Any, Any]) -> EncodedImage:
    is_gray, is_rgb = pixels.ndim == 2, pixels.ndim == 3 and pixels.shape[2] == 3
    if pixels.dtype != np.uint8 or not (is_gray or is_rgb) or not pixels.size:
        raise BadImage(
            f"image: {pixels.dtype} array of shape {pixels.shape}; uint8 of shape (H, W, 3) RGB or (H, W) is needed",
            "IMAGE_FORMAT",
        )
    # Imported here: it loads Pillow, which callers with files or bytes do not need.
    from mal_train.core.images.decoder import encode_png  # noqa: PLC0415

    return EncodedImage(encode_png(np.ascontiguousarray(pixels)), pixels.shape[1], pixels.shape[0])


def _encode_pillow(image: Any) -> EncodedImage:
    if image.mode == "F":
        raise BadImage("image: mode F has no defined range of values; convert it to 8 bits per channel", "IMAGE_FORMAT")
    # "I" holds what older Pillow reads from 16-bit files; as RGB it would be clipped at 255.
    stored = image if image.mode in _PNG_MODES else image.convert("I;16" if image.mode == "I" else "RGB")
    buffer = io.BytesIO()
    stored.save(buffer, format="PNG", compress_level=1)
    width, height = stored.size
    return EncodedImage(buffer.getvalue(), width, height)
