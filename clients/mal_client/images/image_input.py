"""Encodes the caller's image (array, Pillow image, path or bytes) for a request. Decodes nothing."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from mal_train.core.errors import BadImage

if TYPE_CHECKING:
    import numpy as np

    from mal_client.types import ImageInput, ServerLimits
    from mal_train.core.images.container import ImageRegion

# Modes of 8 bits that PNG stores as they are.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})

MAX_FILE_BYTES = 1 << 30
"""Size limit of an image file whose server is not asked yet; above every limit that fits into a gRPC message."""


@dataclass(frozen=True)
class EncodedImage:
    """Bytes of an image file, and its size in px when the caller knows it, else (0, 0).

    Attributes:
        content: the file.
        width: in px.
        height: in px.
        region: set for a part of a larger image.
    """

    content: bytes
    width: int = 0
    height: int = 0
    region: ImageRegion | None = None

    def size_bytes(self) -> int:
        """Returns the length of the file."""
        return len(self.content)

    def size_wh(self) -> tuple[int, int] | None:
        """Returns width and height of masks in px, if need be from the header; None for an unreadable header."""
        if self.region is not None:
            return self.region.image_wh
        if self.width and self.height:
            return self.width, self.height
        # Imported here: callers that state the size do not need it.
        from mal_train.core.images.header import read_header  # noqa: PLC0415

        try:
            return read_header(self.content).size_wh
        except BadImage:
            return None


def check_image_size(size_bytes: int, limits: ServerLimits, name: str = "image") -> None:
    """Raises BadImage, reason IMAGE_TOO_LARGE, for a file that exceeds the server's limit."""
    if size_bytes > limits.max_image_bytes:
        from mal_train.core.images.header import bytes_error  # noqa: PLC0415 - for a short import of the client

        raise bytes_error(f"{size_bytes} bytes", limits.max_image_bytes, name)


def encode(image: ImageInput) -> EncodedImage:
    """Returns the bytes to send.

    Arrays and Pillow images become a lossless PNG, by the rule of `mal_train.core.images.pixels`; files and bytes are
    sent unchanged, and the server applies the same rule. So is the file of a Pillow image of more than 8 bits that was
    opened and not changed: Pillow's colors have 8 bits.

    Raises:
        BadImage: the file is missing (reason IMAGE_NOT_FOUND), the array has another shape or dtype (IMAGE_FORMAT), or
            the argument has another type.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return EncodedImage(bytes(image))
    if isinstance(image, str | Path):
        # Imported here: what reads files of every kind takes a quarter of the time to import the client.
        from mal_train.core.images.files import read_image_bytes  # noqa: PLC0415

        return EncodedImage(read_image_bytes(Path(image), MAX_FILE_BYTES))
    if _is_array(image):
        return _encode_array(image)
    if hasattr(image, "save") and hasattr(image, "mode") and hasattr(image, "size"):
        return _encode_pillow(image)
    raise BadImage(f"image: {type(image).__name__}; an array, a Pillow image, a path or encoded bytes is needed")


def _is_array(image: object) -> TypeGuard[np.ndarray[Any, Any]]:
    numpy = sys.modules.get("numpy")  # not imported: without it, nobody has made an array
    return numpy is not None and isinstance(image, numpy.ndarray)


def _encode_array(values: np.ndarray[Any, Any]) -> EncodedImage:
    # Imported here: they load NumPy and Pillow, which callers with files or bytes do not need.
    import numpy as np  # noqa: PLC0415

    from mal_train.core.images.decoder import encode_png  # noqa: PLC0415
    from mal_train.core.images.pixels import rgb_of_values  # noqa: PLC0415

    rgb = rgb_of_values(values)
    is_gray = values.ndim == 2 or values.shape[2] == 1
    # Gray is smaller; the server repeats it.
    return EncodedImage(encode_png(np.ascontiguousarray(rgb[:, :, 0]) if is_gray else rgb), rgb.shape[1], rgb.shape[0])


def _encode_pillow(image: Any) -> EncodedImage:
    width, height = image.size
    if not width or not height:
        raise BadImage(f"image: a Pillow image of {width}x{height} px; it has no pixels", "IMAGE_FORMAT")
    stored = _unread_file(image)
    if stored is not None:
        return stored
    if image.mode not in _PNG_MODES:
        from mal_train.core.images.pillow_pixels import rgb_of_pillow  # noqa: PLC0415 - as above

        return _encode_array(rgb_of_pillow(image))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return EncodedImage(buffer.getvalue(), width, height)


def _unread_file(image: Any) -> EncodedImage | None:
    """Returns the file of a Pillow image whose values Pillow would cut to 8 bits, if nothing was read from it yet."""
    if not getattr(image, "tile", None) or image.tell():
        return None
    from mal_train.core.images.header import read_header  # noqa: PLC0415 - as above

    try:
        position = image.fp.tell()
        image.fp.seek(0)
        content = image.fp.read()
        image.fp.seek(position)
        header = read_header(content)
    except (AttributeError, OSError, ValueError, BadImage):
        return None
    is_as_opened = header.size_wh == image.size and header.orientation == 1
    return EncodedImage(content, *header.size_wh) if header.pixel_format.is_stretched and is_as_opened else None
