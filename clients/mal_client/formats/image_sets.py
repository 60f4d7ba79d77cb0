"""Reads lists of images, such as those in `ImageSets` of Pascal VOC."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple
from unicodedata import normalize

from mal_client.formats.boxes import BAD_FILE, RowError
from mal_client.formats.label_files import ImageNames, unreadable
from mal_client.images.image_files import is_image_name
from mal_train.core.errors import ConfigError
from mal_train.core.input_files import open_text

ABSENT: Final = "-1"
"""Flag of an image without the class, in the list of a class."""
_FLAGGED: Final = re.compile(r"(.*\S)\s+(-1|0|1)")


class _Line(NamedTuple):
    """A line of a list.

    Attributes:
        number: of the line, from 1.
        text: without the spaces around it.
        names: what it may name: its text, the name before a flag, and both without the suffix of an image.
        flag: the last word, if that may be a flag; else empty.
    """

    number: int
    text: str
    names: tuple[str, ...]
    flag: str


class ImageSet:
    """Images of a list, by name without suffix.

    A line is a name, which may have spaces, or, as in `Main/cat_train.txt`, a name and 1 (the image has the class), 0
    (it has difficult ones only) or -1 (it has none): images with -1 are left out. A line is also the name of the file
    that has its complete text as name. Names may have the suffix of an image. Accents match in both normal forms.

    Args:
        path: the file.
        encoding: of text without a byte order mark.

    Raises:
        ConfigError: the file cannot be read, or no image is left.
    """

    def __init__(self, path: Path, encoding: str | None = None) -> None:
        self._path = path
        self._by_name: dict[str, list[_Line]] = {}
        """Lines by the names that they may have."""
        self._selected: dict[int, list[str]] = {}
        """Images by the number of their line."""
        self._taken: set[int] = set()
        try:
            with open_text(path, encoding or "utf-8") as file:
                self._lines = [
                    _parse(number, line.rstrip("\r\n")) for number, line in enumerate(file, 1) if line.strip()
                ]
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"--image-set {path}: {unreadable(error, encoding)}; expected a text file with one image per line"
            ) from None
        if all(line.flag == ABSENT for line in self._lines):
            raise ConfigError(f"--image-set {path}: lists no image")
        for line in self._lines:
            self._add(line, line.names)

    @property
    def left_out(self) -> int:
        """Number of lines with -1 that have no image in `select`."""
        return sum(line.flag == ABSENT and line.number not in self._selected for line in self._lines)

    def takes(self, name: str) -> bool:
        """Returns True if the list has a name, given with its folders and without suffix; remembers its lines."""
        found = self._find(PurePosixPath(name))
        self._taken.update(found)
        return bool(found)

    def select(self, images: ImageNames) -> ImageNames:
        """Returns the images of the list; remembers their lines.

        A line means the first of its names that an image has.
        """
        keys = {key for name in images.names for key in _keys(PurePosixPath(name).with_suffix(""))}
        self._by_name.clear()
        for line in self._lines:
            self._add(line, [name for name in line.names if name in keys][:1] or line.names)
        found = {name: self._find(PurePosixPath(name).with_suffix("")) for name in images.names}
        for name, numbers in found.items():
            for number in numbers:
                self._selected.setdefault(number, []).append(name)
        return ImageNames(name for name, numbers in found.items() if numbers)

    def missing(self) -> Iterator[RowError]:
        """Yields the error of each line that `takes` did not meet, except those with -1."""
        for line in self._lines:
            if line.flag != ABSENT and line.number not in self._taken:
                where = f"{self._path.name}:{line.number}"
                text = f"{line.text}: no such annotation file; give its folder with --labels, or remove the line"
                yield RowError(where, BAD_FILE, f"{where}: {text}", tuple(self._selected.get(line.number, ())))

    def _find(self, stem: PurePosixPath) -> list[int]:
        """Returns the numbers of the lines of a path without suffix, else of its last part."""
        keys = _keys(stem)
        return next(([line.number for line in self._by_name[key]] for key in keys if key in self._by_name), [])

    def _add(self, line: _Line, names: Iterable[str]) -> None:
        for name in names:
            self._by_name.setdefault(name, []).append(line)


def _keys(stem: PurePosixPath) -> tuple[str, str]:
    """Returns a path without suffix, and its last part, as they are compared."""
    return normalize("NFC", str(stem)), normalize("NFC", stem.name)


def _parse(number: int, line: str) -> _Line:
    line = normalize("NFC", line)
    text = line.strip()
    flagged = _FLAGGED.fullmatch(text)
    name, flag = (text, "") if flagged is None else flagged.groups()
    names = [line, text, *([] if flag == ABSENT else [name])]
    names += [str(PurePosixPath(name).with_suffix("")) for name in names if is_image_name(name)]
    return _Line(number, text, tuple(dict.fromkeys(names)), flag)
