"""Where the pictures of a COCO file lie: below one folder, or anywhere among the files that a pattern finds."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from mal_train.core.errors import BadDataset, BadImage

LISTED = 3

PICTURES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""Endings, in small letters, of the files that are read (`mal_train.core.masks.images.FORMATS`)."""


class ImageFiles:
    """The pictures by the file names of their rows.

    A pattern such as `photos/**/*.jpg` (`**`: any folders) is looked up once. A row's file name then means the one
    file that ends in it, folder for folder: `a.jpg` finds `photos/2021/a.jpg`, and so does `2021/a.jpg`.

    Args:
        where: a folder, or a pattern.

    Attributes:
        name: what it is, for messages and ledgers.

    Raises:
        BadDataset: no such folder, or a pattern that finds no file: every image would be missing.
    """

    def __init__(self, where: Path | str) -> None:
        self._folder: Path | None = Path(where)
        self._by_name: dict[str, list[str]] = {}
        self.name = os.path.realpath(where)
        if self._folder.is_dir():
            return
        if not glob.has_magic(str(where)):
            raise BadDataset(f"{where}: no such folder; give the one that the file names of the annotations start at")
        self._folder = None
        for found in sorted(glob.iglob(str(where), recursive=True)):
            if os.path.isfile(found):
                self._by_name.setdefault(os.path.basename(found), []).append(found)
        if not self._by_name:
            raise BadDataset(f"{where}: no file fits this pattern; quote it, so that the shell leaves it alone")

    @property
    def is_folder(self) -> bool:
        """Whether a folder was given, and no pattern."""
        return self._folder is not None

    def path(self, file_name: str) -> Path:
        """The file of a row, which may not exist where a folder was given.

        Raises:
            BadImage: a pattern finds none that ends in this name, or several (reason IMAGE_NOT_FOUND).
        """
        if self._folder is not None:
            return self._folder / file_name
        parts = PurePosixPath(file_name).parts
        found = [path for path in self._by_name.get(parts[-1], ()) if Path(path).parts[-len(parts) :] == parts]
        if len(found) == 1:
            return Path(found[0])
        listed = ", ".join(found[:LISTED]) + (f" and {len(found) - LISTED} more" if len(found) > LISTED else "")
        text = f"several files end in it: {listed}" if found else "no file that the pattern finds ends in it"
        raise BadImage(f"{file_name}: {text}", "IMAGE_NOT_FOUND")

    def unlisted(self, file_names: Collection[str]) -> Iterator[str]:
        """Files with the ending of a picture that none of the rows' names means, in the order of their names."""
        named = set(file_names)
        if self._folder is None:
            paths = sorted(path for paths in self._by_name.values() for path in paths)
            suffixes = {PurePosixPath(name).parts for name in named}
            yield from (path for path in paths if not _ends_in(Path(path).parts, suffixes) and _is_picture(path))
            return
        for folder, inner, files in os.walk(self._folder):
            inner.sort()
            for name in sorted(files):
                path = os.path.relpath(os.path.join(folder, name), self._folder)
                if path not in named and _is_picture(path):
                    yield path


def _ends_in(parts: tuple[str, ...], suffixes: Collection[tuple[str, ...]]) -> bool:
    return any(parts[start:] in suffixes for start in range(len(parts)))


def _is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in PICTURES
