"""Finds and reads encoded images by the file names of a COCO file: in a folder, below a prefix, or at their URLs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mal_train.core.errors import BadImage, StorageError, StoreUnreachable
from mal_train.core.images.header import DEFAULT_LIMITS, ImageLimits
from mal_train.core.storage.addresses import Location, is_remote, join, redact
from mal_train.core.storage.hosts import AllowedHosts
from mal_train.core.storage.reading import read_bytes

if TYPE_CHECKING:
    from mal_train.core.images.decoder import RgbImage

_STORE_FAULTS: Final = ("NO_CREDENTIALS", "CREDENTIALS_REFUSED", "BUCKET_NOT_FOUND")
"""Reasons that concern all images, not one."""


def read_image_bytes(
    location: Location, max_bytes: int, *, hosts: AllowedHosts | None = None, attempts: int | None = None
) -> bytes:
    """Returns the bytes of an image file.

    Args:
        location: path or address.
        max_bytes: size limit.
        hosts: web hosts that may be contacted for a URL that the user did not give; None for other locations.
        attempts: number of attempts while a store is unreachable; None: `retry.ATTEMPTS`.

    Raises:
        BadImage: the file cannot be read (reason IMAGE_NOT_FOUND) or is larger than `max_bytes` (IMAGE_TOO_LARGE).
        StorageError, StoreUnreachable, ConfigError: the store as a whole cannot be used.
    """
    name = redact(location)
    try:
        return read_bytes(location, max_bytes, hosts=hosts, attempts=attempts)
    except StorageError as error:
        if error.reason in _STORE_FAULTS:
            raise
        reason = "IMAGE_TOO_LARGE" if error.reason == "TOO_LARGE" else "IMAGE_NOT_FOUND"
        raise BadImage(str(error), reason) from None
    except StoreUnreachable as error:
        if hosts is None:
            raise
        raise BadImage(str(error), "IMAGE_NOT_FOUND") from None
    # ValueError: a name with a NUL character.
    except (OSError, ValueError) as error:
        detail = error.strerror if isinstance(error, OSError) else str(error)
        raise BadImage(
            f"{name}: cannot be read ({detail}); check the image folder and the file name", "IMAGE_NOT_FOUND"
        ) from None


def read_image(
    location: Location,
    *,
    expected_wh: tuple[int, int] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    hosts: AllowedHosts | None = None,
    attempts: int | None = None,
) -> RgbImage:
    """Decodes an image file; see `decode_image` and, for the other arguments and errors, `read_image_bytes`."""
    # Imported here: it loads Pillow, which callers that decode nothing do not need.
    from mal_train.core.images.decoder import decode_image  # noqa: PLC0415

    data = read_image_bytes(location, limits.max_bytes, hosts=hosts, attempts=attempts)
    return decode_image(data, expected_wh=expected_wh, limits=limits, name=redact(location))


@dataclass(frozen=True)
class ImageFolder:
    """Images in a folder or below a prefix, by the file names of a COCO file.

    Attributes:
        base: folder, or address of a prefix, that the file names are relative to.
    """

    base: Location

    @property
    def name(self) -> str:
        """Real path or redacted address, for journals."""
        return redact(self.base) if self.is_remote else os.path.realpath(self.base)

    @property
    def is_remote(self) -> bool:
        """True if reading an image needs the network."""
        return is_remote(self.base)

    @property
    def hosts(self) -> None:
        """No rule for web hosts: the user gave the address."""
        return None

    def locate(self, file_name: str) -> Location:
        """Returns the location of an image; it may be missing.

        Raises:
            BadImage: the name leads out of the prefix (reason IMAGE_NOT_FOUND).
        """
        return join(self.base, file_name)

    def read(self, file_name: str, max_bytes: int) -> bytes:
        """Returns the bytes of an image. Raises as `read_image_bytes`, and as `locate`."""
        return read_image_bytes(self.locate(file_name), max_bytes)


@dataclass(frozen=True)
class UrlImages:
    """Images at the URLs of a COCO file, which may come from a stranger.

    Attributes:
        urls: URL of each image by its file name.
        hosts: web hosts that the URLs may lead to.
    """

    urls: Mapping[str, str]
    hosts: AllowedHosts

    @property
    def name(self) -> str:
        """The allowed hosts, for journals; no URL, which may be signed."""
        return f"coco_url at {', '.join(self.hosts.listed())}"

    @property
    def is_remote(self) -> bool:
        """True: reading an image needs the network."""
        return True

    def locate(self, file_name: str) -> Location:
        """Returns the URL of an image. Raises BadImage if its row has none (reason IMAGE_NOT_FOUND)."""
        url = self.urls.get(file_name)
        if url is None:
            raise BadImage(f"{file_name}: its row has no coco_url that is a web address", "IMAGE_NOT_FOUND")
        return url

    def read(self, file_name: str, max_bytes: int) -> bytes:
        """Returns the bytes of an image. Raises as `read_image_bytes`, and as `locate`."""
        return read_image_bytes(self.locate(file_name), max_bytes, hosts=self.hosts)


Images = ImageFolder | UrlImages
"""Images by the file names of a COCO file."""

ImageSource = Images | Path
"""Images, or the folder that they are in."""


def images_of(source: ImageSource) -> Images:
    """Returns `source` itself, or the images in a folder."""
    return source if isinstance(source, ImageFolder | UrlImages) else ImageFolder(source)
