"""Finds and reads encoded images by the file names of a COCO file: in a folder, below a prefix, or at their URLs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypedDict

from mal_train.core.errors import BadImage, StorageError, StoreUnreachable
from mal_train.core.images.folder_names import AmbiguousName, FolderNames, RepeatedNames, shown
from mal_train.core.images.header import DEFAULT_LIMITS, ImageLimits, bytes_error, read_container
from mal_train.core.images.pixels import FormatCounts, PixelFormat
from mal_train.core.input_files import cause_of
from mal_train.core.numbers import counted
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
        if error.reason == "TOO_LARGE":
            raise bytes_error("too many bytes", max_bytes, name) from None
        raise BadImage(str(error), "IMAGE_NOT_FOUND") from None
    except StoreUnreachable as error:
        if hosts is None:
            raise
        raise BadImage(str(error), "IMAGE_NOT_FOUND") from None
    # ValueError: a name with a NUL character.
    except (OSError, ValueError) as error:
        raise BadImage(
            f"{name}: cannot be read ({cause_of(error)}); check the image folder and the file name", "IMAGE_NOT_FOUND"
        ) from None


def read_image(
    location: Location,
    *,
    expected_wh: tuple[int, int] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    hosts: AllowedHosts | None = None,
    attempts: int | None = None,
    on_format: Callable[[PixelFormat], object] = lambda _: None,
) -> RgbImage:
    """Decodes an image file; see `decode_image` and, for the other arguments and errors, `read_image_bytes`.

    `on_format` receives the format of the stored values, once they are decoded.
    """
    # Imported here: it loads Pillow, which callers that decode nothing do not need.
    from mal_train.core.images.decoder import decode_container  # noqa: PLC0415

    name = redact(location)
    data = read_image_bytes(location, limits.max_bytes, hosts=hosts, attempts=attempts)
    container = read_container(data, limits=limits, name=name)
    pixels = decode_container(container, expected_wh=expected_wh, name=name)
    on_format(container.header.pixel_format)
    return pixels


@dataclass(frozen=True)
class ImageFolder:
    """Images in a folder or below a prefix, by the file names of a COCO file.

    In a local folder, a name that no file has leads to the file that it means (`FolderNames`).

    Attributes:
        base: folder, or address of a prefix, that the file names are relative to.
        repeated: the names of the annotations, for `FolderNames`.
        respelled: files that names led to which no file has, relative to the folder; grows as they are located.
        limits: of the images.
        formats: counts the images whose values or bands are not used as stored; grows as they are decoded.
    """

    base: Location
    repeated: RepeatedNames = field(default_factory=RepeatedNames, compare=False, repr=False)
    respelled: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    limits: ImageLimits = DEFAULT_LIMITS
    formats: FormatCounts = field(default_factory=FormatCounts, compare=False, repr=False)

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
            BadImage: the name leads out of the prefix, or may mean several files (reason IMAGE_NOT_FOUND).
        """
        location = join(self.base, file_name)
        if self.is_remote or os.path.lexists(location):
            return location
        return self.respell(file_name) or location

    def respell(self, file_name: str) -> Path | None:
        """Returns the file of a local folder that a name means which no file has; None if there is none.

        Raises:
            BadImage: there are several, or one that may be meant, as of another suffix (reason IMAGE_NOT_FOUND).
        """
        known = self.respelled.get(file_name)
        if known is not None:
            return Path(self.base) / known
        try:
            found = self._names.find(file_name)
        except AmbiguousName as error:
            raise BadImage(f"{file_name}: {error}", "IMAGE_NOT_FOUND") from None
        if found is not None:
            self.respelled[file_name] = str(found.relative_to(self.base))
            return found
        similar = self._names.similar(file_name)
        if similar is not None:
            raise BadImage(
                f"{file_name}: no such file in {self.base}; did you mean {similar}? Correct the name or the folder",
                "IMAGE_NOT_FOUND",
            )
        return None

    def of_names(self, names: Callable[[], Iterable[str]]) -> ImageFolder:
        """Returns the folder for annotations with these file names, which may be asked for once."""
        return self if self.is_remote else replace(self, repeated=RepeatedNames(names))

    @cached_property
    def _names(self) -> FolderNames:
        return FolderNames(Path(self.base), self.repeated)

    def read(self, file_name: str, max_bytes: int) -> bytes:
        """Returns the bytes of an image. Raises as `read_image_bytes`, and as `locate`."""
        return read_image_bytes(self.locate(file_name), max_bytes)


@dataclass(frozen=True)
class UrlImages:
    """Images at the URLs of a COCO file, which may come from a stranger.

    Attributes:
        urls: URL of each image by its file name.
        hosts: web hosts that the URLs may lead to.
        limits: of the images.
        formats: as in `ImageFolder`.
    """

    urls: Mapping[str, str]
    hosts: AllowedHosts
    limits: ImageLimits = DEFAULT_LIMITS
    formats: FormatCounts = field(default_factory=FormatCounts, compare=False, repr=False)

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


def for_names(images: Images, names: Callable[[], Iterable[str]]) -> Images:
    """Returns the images for annotations with these file names; see `ImageFolder.of_names`."""
    return images.of_names(names) if isinstance(images, ImageFolder) else images


class ImageFindings(TypedDict):
    """Facts for `image_notes` that a process found about images, in the form of JSON.

    Attributes:
        respelled: files by the names that led to another spelling.
        stretched: names of images with values beyond 8 bits.
        dropped: names of images with bands that are not used.
    """

    respelled: dict[str, str]
    stretched: list[str]
    dropped: list[str]


class NewFindings:
    """Findings of a process that reports them to another one.

    Args:
        images: the images that this process reads.
    """

    def __init__(self, images: Images) -> None:
        self._images = images
        self._taken = 0

    def take(self) -> ImageFindings:
        """Returns what was found since the last call."""
        # In one step: other threads locate images meanwhile.
        known = list(self._images.respelled.items()) if isinstance(self._images, ImageFolder) else []
        new, self._taken = known[self._taken :], len(known)
        stretched, dropped = self._images.formats.take()
        return ImageFindings(respelled=dict(new), stretched=stretched, dropped=dropped)


def add_findings(images: Images, findings: ImageFindings) -> None:
    """Adds what another process found; see `NewFindings`."""
    if isinstance(images, ImageFolder):
        images.respelled.update(findings["respelled"])
    images.formats.update(findings["stretched"], findings["dropped"])


def respelling_note(images: Images) -> str | None:
    """Returns a sentence on the names that led to files of another spelling; None without one."""
    if not isinstance(images, ImageFolder) or not images.respelled:
        return None
    name, found = next(iter(images.respelled.items()))
    example = f"{shown(found, name)} for {shown(name, found)}"
    return (
        f"{images.name}: {counted(len(images.respelled), 'image')} of another spelling than stated, such as {example}"
    )


def image_notes(images: Images) -> list[str]:
    """Returns a sentence on each way in which images of a run were not used as their names and files say."""
    respelled = respelling_note(images)
    return [*([] if respelled is None else [respelled]), *images.formats.notes()]


Images = ImageFolder | UrlImages
"""Images by the file names of a COCO file."""

ImageSource = Images | Path
"""Images, or the folder that they are in."""


def images_of(source: ImageSource) -> Images:
    """Returns `source` itself, or the images in a folder."""
    return source if isinstance(source, ImageFolder | UrlImages) else ImageFolder(source)
