"""Finds the image files of a COCO file: in one folder, or among the files that a pattern matches.

The file names come with the annotations, maybe from strangers, and what they name is sent to a server. So neither "..",
an absolute name nor a symbolic link leads out of the folder, or out of the folder in which a pattern begins, unless the
user allows it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterator
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Final

from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.input_files import resolve_inside

LISTED = 3

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""Lower-case suffixes of the formats that are read (`mal_train.core.images.header.FORMATS`)."""


class ImageFiles:
    """Image files by the file names of a COCO file.

    A pattern such as `photos/**/*.jpg` (`**` matches any folders) is expanded once. A file name then refers to the only
    match that ends in it, folder by folder: both `a.jpg` and `2021/a.jpg` find `photos/2021/a.jpg`.

    Args:
        folder_or_pattern: a folder, or a glob pattern.
        allow_outside: also find files outside the folder, and through links that leave it.

    Attributes:
        name: absolute path or pattern, for messages and journals.

    Raises:
        BadDataset: the folder does not exist, or the pattern matches no file.
    """

    def __init__(self, folder_or_pattern: Path | str, *, allow_outside: bool = False) -> None:
        self._folder: Path | None = Path(folder_or_pattern)
        self._by_name: dict[str, list[str]] = {}
        self._allow_outside = allow_outside
        self._root = self._folder
        self.name = os.path.realpath(folder_or_pattern)
        if self._folder.is_dir():
            return
        if not glob.has_magic(str(folder_or_pattern)):
            raise BadDataset(
                f"{folder_or_pattern}: no such folder; give the folder that the file names of the annotations are "
                "relative to"
            )
        self._folder = None
        self._root = _fixed_part(self._root)
        for path in sorted(glob.iglob(str(folder_or_pattern), recursive=True)):
            if os.path.isfile(path):
                self._by_name.setdefault(os.path.basename(path), []).append(path)
        if not self._by_name:
            raise BadDataset(
                f"{folder_or_pattern}: the pattern matches no file; check it, and quote it to protect it from the shell"
            )

    @classmethod
    def of(cls, images: ImageFiles | Path | str) -> ImageFiles:
        """Returns `images` itself, or the image files of a folder or pattern."""
        return images if isinstance(images, ImageFiles) else cls(images)

    @property
    def is_folder(self) -> bool:
        """True for a folder, False for a pattern."""
        return self._folder is not None

    def path(self, file_name: str) -> Path:
        """Returns the path of an image; in a folder, the file may be missing.

        Raises:
            BadImage: the file is outside the folder, no match of the pattern ends in this name, or several do (reason
                IMAGE_NOT_FOUND).
        """
        path = self._match(file_name) if self._folder is None else self._folder / file_name
        if not self._allow_outside and resolve_inside(self._root, str(path.absolute())) is None:
            raise BadImage(
                f"{file_name}: outside {self._root}; move the file into that folder, or allow it with "
                "--allow-outside-images (ImageFiles(..., allow_outside=True))",
                "IMAGE_NOT_FOUND",
            )
        return path

    def _match(self, file_name: str) -> Path:
        parts = PurePosixPath(file_name).parts
        matches = [path for path in self._by_name.get(parts[-1], ()) if Path(path).parts[-len(parts) :] == parts]
        if len(matches) == 1:
            return Path(matches[0])
        more = f" and {len(matches) - LISTED} more" if len(matches) > LISTED else ""
        problem = f"{len(matches)} files end in it: {', '.join(matches[:LISTED])}{more}; add folders to the file name"
        raise BadImage(f"{file_name}: {problem if matches else 'no file of the pattern ends in it'}", "IMAGE_NOT_FOUND")

    def unlisted(self, file_names: Collection[str]) -> Iterator[str]:
        """Yields the image files that no file name refers to, in alphabetical order."""
        named = set(file_names)
        if self._folder is None:
            paths = sorted(path for paths in self._by_name.values() for path in paths)
            suffixes = {PurePosixPath(name).parts for name in named}
            yield from (path for path in paths if not _ends_in(Path(path).parts, suffixes) and _is_image(path))
            return
        for folder, inner, files in os.walk(self._folder):
            inner.sort()
            for name in sorted(files):
                path = os.path.relpath(os.path.join(folder, name), self._folder)
                if path not in named and _is_image(path):
                    yield path


def _fixed_part(pattern: Path) -> Path:
    """Returns the folder in which a pattern begins.

    >>> _fixed_part(Path("photos/2021*/**/*.jpg")).as_posix()
    'photos'
    """
    fixed = [*takewhile(lambda part: not glob.has_magic(part), pattern.parts)]
    return Path(*fixed)


def _ends_in(parts: tuple[str, ...], suffixes: Collection[tuple[str, ...]]) -> bool:
    return any(parts[start:] in suffixes for start in range(len(parts)))


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES
