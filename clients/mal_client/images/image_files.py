"""Finds the images of a COCO file: in a folder, by a pattern, below a prefix in a store, or at their URLs.

The file names come with the annotations, maybe from strangers, and what they name is sent to a server. So neither "..",
an absolute name nor a symbolic link leads out of the folder, or out of the folder in which a pattern begins, unless the
user allows it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Final

from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.images.files import ImageFolder, Images, UrlImages, for_names, read_image_bytes, respelling_note
from mal_train.core.images.folder_names import (
    AmbiguousName,
    RepeatedNames,
    check_only_name,
    ends_in,
    folded,
    readings,
)
from mal_train.core.images.header import DEFAULT_LIMITS
from mal_train.core.input_files import resolve_inside
from mal_train.core.storage.addresses import WEB_SCHEMES, Location, is_remote, scheme_of
from mal_train.core.storage.listing import list_names

LISTED = 3

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""Lower-case suffixes of the formats that are read (`mal_train.core.images.header.FORMATS`)."""


class ImageFiles:
    """Images by the file names of a COCO file.

    A pattern such as `photos/**/*.jpg` (`**` matches any folders) is expanded once. A file name then refers to the only
    match that ends in it, folder by folder: both `a.jpg` and `2021/a.jpg` find `photos/2021/a.jpg`. A name that no file
    has leads to the file that it means, as in `folder_names.FolderNames`.

    Args:
        source: a folder, a glob pattern, the address of a prefix such as s3://bucket/images, or images at their URLs.
        allow_outside: also find files outside a local folder, and through links that leave it.

    Attributes:
        name: absolute path, pattern or redacted address, for messages and journals.

    Raises:
        BadDataset: the folder does not exist, or the pattern matches no file.
    """

    def __init__(self, source: Location | UrlImages, *, allow_outside: bool = False) -> None:
        images = source if isinstance(source, UrlImages) else ImageFolder(source)
        self._images: Images | None = images
        """None for a pattern, whose matches are in `_by_name`."""
        self._by_name: dict[str, list[str]] = {}
        """Matches of a pattern by their file name, as it is equal in all spellings."""
        self._repeated = RepeatedNames()
        self._allow_outside = allow_outside
        self._root: Path | None = None
        self.name = images.name
        if not isinstance(source, UrlImages) and not is_remote(source):
            self._find(Path(source))

    @classmethod
    def of(cls, images: ImageFiles | Location) -> ImageFiles:
        """Returns `images` itself, or the images of a folder, pattern or prefix."""
        return images if isinstance(images, ImageFiles) else cls(images)

    @property
    def is_folder(self) -> bool:
        """True for a local folder, False for a pattern and for images elsewhere."""
        return self._images is not None and not self._images.is_remote

    @property
    def is_remote(self) -> bool:
        """True if reading an image needs the network."""
        return self._images is not None and self._images.is_remote

    def expect(self, names: Callable[[], Iterable[str]]) -> None:
        """Tells which file names the annotations have, so that no two of them lead to one file; asked for once."""
        if self._images is not None:
            self._images = for_names(self._images, names)
        else:
            self._repeated = RepeatedNames(names)

    def respelling_note(self) -> str | None:
        """Returns a sentence on the names that led to files of another spelling; None without one."""
        return None if self._images is None else respelling_note(self._images)

    def respelled(self, file_name: str) -> str:
        """Returns the name of the file in the folder, where a located name led to one of another spelling."""
        return self._images.respelled.get(file_name, file_name) if isinstance(self._images, ImageFolder) else file_name

    def locate(self, file_name: str) -> Location:
        """Returns the path or address of an image; except for a pattern, it may be missing.

        Raises:
            BadImage: the file is outside the folder or prefix, no match of the pattern ends in this name, or several
                do, or its row has no URL (reason IMAGE_NOT_FOUND).
        """
        location = self._match(file_name) if self._images is None else self._images.locate(file_name)
        if self._root is None or self._allow_outside or not isinstance(location, Path):
            return location
        if resolve_inside(self._root, str(location.absolute())) is None:
            raise BadImage(
                f"{file_name}: outside {self._root}; move the file into that folder, or allow it with "
                "--allow-outside-images (ImageFiles(..., allow_outside=True))",
                "IMAGE_NOT_FOUND",
            )
        return location

    def read(self, file_name: str, max_bytes: int = DEFAULT_LIMITS.max_bytes) -> bytes:
        """Returns the bytes of an image. Raises as `read_image_bytes`, and as `locate`."""
        return self.read_located(self.locate(file_name), max_bytes)

    def read_located(self, location: Location, max_bytes: int = DEFAULT_LIMITS.max_bytes) -> bytes:
        """Returns the bytes of an image at a result of `locate`. Raises as `read_image_bytes`."""
        hosts = None if self._images is None else self._images.hosts
        return read_image_bytes(location, max_bytes, hosts=hosts)

    def _find(self, source: Path) -> None:
        """Finds a local folder, or the matches of a pattern."""
        self.name = os.path.realpath(source)
        self._root = source
        if source.is_dir():
            return
        if not glob.has_magic(str(source)):
            raise BadDataset(
                f"{source}: no such folder; give the folder that the file names of the annotations are relative to"
            )
        self._images = None
        self._root = _fixed_part(source)
        for path in sorted(glob.iglob(str(source), recursive=True)):
            if os.path.isfile(path):
                self._by_name.setdefault(folded(os.path.basename(path)), []).append(path)
        if not self._by_name:
            raise BadDataset(
                f"{source}: the pattern matches no file; check it, and quote it to protect it from the shell"
            )

    def _match(self, file_name: str) -> Path:
        parts = PurePosixPath(file_name).parts
        matches = [path for path in self._named(parts) if Path(path).parts[-len(parts) :] == parts]
        if not matches:
            matches = self._meant(file_name)
        if len(matches) == 1:
            return Path(matches[0])
        more = f" and {len(matches) - LISTED} more" if len(matches) > LISTED else ""
        problem = f"{len(matches)} files end in it: {', '.join(matches[:LISTED])}{more}; add folders to the file name"
        raise BadImage(f"{file_name}: {problem if matches else 'no file of the pattern ends in it'}", "IMAGE_NOT_FOUND")

    def _meant(self, file_name: str) -> list[str]:
        """Returns the matches that a name may mean which no file has."""
        for parts in readings(file_name):
            for start in range(len(parts)):
                tail = parts[start:]
                wanted = list(map(folded, tail))
                matches = [path for path in self._named(tail) if ends_in(Path(path).parts, wanted)]
                if len(matches) == 1:
                    try:
                        check_only_name(file_name, tail, matches[0], self._repeated)
                    except AmbiguousName as error:
                        raise BadImage(f"{file_name}: {error}", "IMAGE_NOT_FOUND") from None
                if matches:
                    return matches
        return []

    def _named(self, parts: Sequence[str]) -> Sequence[str]:
        """Returns the matches with the last of these parts as file name; none without parts, as of "."."""
        return self._by_name.get(folded(parts[-1]), ()) if parts else ()

    def unlisted(self, file_names: Collection[str]) -> Iterator[str]:
        """Yields the image files that no file name refers to, in alphabetical order; none where files have no list."""
        named = set(file_names)
        if self._images is None:
            paths = sorted(path for paths in self._by_name.values() for path in paths)
            suffixes = {PurePosixPath(name).parts for name in named}
            yield from (path for path in paths if not _ends_in(Path(path).parts, suffixes) and is_image_name(path))
            return
        yield from (name for name in self.names() if name not in named)

    def names(self) -> Iterator[str]:
        """Yields the names of the image files below the folder or prefix, folder by folder in alphabetical order.

        Nothing for a pattern, for URLs and for web servers, which have no list.

        Raises:
            StorageError, StoreUnreachable: the store cannot be listed.
        """
        if not isinstance(self._images, ImageFolder) or scheme_of(self._images.base) in WEB_SCHEMES:
            return
        names = list_names(self._images.base)
        yield from (name for name in names if is_image_name(name))


def _fixed_part(pattern: Path) -> Path:
    """Returns the folder in which a pattern begins.

    >>> _fixed_part(Path("photos/2021*/**/*.jpg")).as_posix()
    'photos'
    """
    fixed = [*takewhile(lambda part: not glob.has_magic(part), pattern.parts)]
    return Path(*fixed)


def _ends_in(parts: tuple[str, ...], suffixes: Collection[tuple[str, ...]]) -> bool:
    return any(parts[start:] in suffixes for start in range(len(parts)))


def is_image_name(path: str) -> bool:
    """Returns True for a file name with the suffix of an image format, which spaces may follow.

    >>> is_image_name("a/b.JPG"), is_image_name("a.png "), is_image_name("a.txt")
    (True, True, False)
    """
    return os.path.splitext(path)[1].strip().lower() in IMAGE_SUFFIXES
