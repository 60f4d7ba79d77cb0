"""Reads lists of images, such as those in `ImageSets` of Pascal VOC."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final
from unicodedata import normalize

from mal_client.formats.boxes import RowError
from mal_client.formats.label_files import ImageNames
from mal_train.core.errors import ConfigError
from mal_train.core.input_files import cause_of, open_text

ABSENT: Final = "-1"
"""Flag of an image without the class, in the list of a class."""
_FLAGGED: Final = re.compile(r"(.*\S)\s+(-1|0|1)")


class ImageSet:
    """Images of a list, by name without suffix.

    A line is a name, which may have spaces, or, as in `Main/cat_train.txt`, a name and 1 (the image has the class), 0
    (it has difficult ones only) or -1 (it has none): images with -1 are left out. A file that has the complete line as
    its name is meant by it. Accents match in both normal forms.

    Args:
        path: the file.
        encoding: of text without a byte order mark.

    Attributes:
        left_out: number of images with -1.

    Raises:
        ConfigError: the file cannot be read, or no image is left.
    """

    def __init__(self, path: Path, encoding: str | None = None) -> None:
        self.left_out = 0
        self._path = path
        self._line_of: dict[str, int] = {}
        """Number of the line of each name, without its flag."""
        self._listed: dict[str, str] = {}
        """Name without its flag by this name, and by the complete line."""
        self._taken: set[str] = set()
        try:
            with open_text(path, encoding or "utf-8") as file:
                for number, line in enumerate(file, start=1):
                    self._add(number, line)
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"--image-set {path}: cannot be read ({cause_of(error)}); give a text file with one image per line"
            ) from None
        if not self._line_of:
            raise ConfigError(f"--image-set {path}: lists no image")

    def takes(self, name: str) -> bool:
        """Returns True if the list has a name, given with its folders and without suffix; remembers it."""
        listed = self._find(PurePosixPath(name))
        if listed is not None:
            self._taken.add(listed)
        return listed is not None

    def select(self, images: ImageNames) -> ImageNames:
        """Returns the images of the list."""
        return ImageNames(name for name in images.names if self._find(PurePosixPath(name).with_suffix("")) is not None)

    def missing(self, what: str) -> Iterator[RowError]:
        """Yields the error of each name that `takes` did not meet."""
        for name, number in self._line_of.items():
            if name not in self._taken:
                where = f"{self._path.name}:{number}"
                yield RowError(where, "BAD_FILE", f"{where}: {name}: no such {what}")

    def _find(self, stem: PurePosixPath) -> str | None:
        """Returns the listed name of a path without suffix; None if the list has neither the path nor its last part."""
        keys = (normalize("NFC", text) for text in (str(stem), stem.name))
        return next((self._listed[key] for key in keys if key in self._listed), None)

    def _add(self, number: int, line: str) -> None:
        text = normalize("NFC", line.strip())
        if not text:
            return
        flagged = _FLAGGED.fullmatch(text)
        name, flag = (text, "") if flagged is None else flagged.groups()
        self._listed.setdefault(text, name)
        if flag == ABSENT:
            self.left_out += 1
            return
        self._listed.setdefault(name, name)
        self._line_of.setdefault(name, number)
