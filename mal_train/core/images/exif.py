"""Reads single values of EXIF and MPF metadata, which are small TIFF files. Never raises on damaged metadata."""

from mal_train.core.images.tiff_directory import Directory

PREFIX = b"Exif\0\0"
_ORIENTATION = 0x0112
_NUMBER_OF_IMAGES = 0xB001


def orientation(content: bytes) -> int:
    """Returns the EXIF orientation 1–8; 1 if there is none."""
    value = _first_value(content.removeprefix(PREFIX), _ORIENTATION)
    return value if value in range(2, 9) else 1


def images_of_mpf(content: bytes) -> int:
    """Returns the number of images of a multi-image file (MPF, CIPA DC-007); 1 if it is not stated."""
    return max(_first_value(content, _NUMBER_OF_IMAGES), 1)


def _first_value(content: bytes, tag: int) -> int:
    try:
        return Directory.first(content).number(tag, 0)
    except ValueError:
        return 0
