"""Reads lists of images, such as those in `ImageSets` of Pascal VOC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from mal_client.formats.boxes import RowError
from mal_client.formats.label_files import ImageNames
from mal_train.core.errors import ConfigError
from mal_train.core.input_files import cause_of, open_text

ABSENT: Final = "-1"
"""Flag of an image without the class, in the list of a class."""
FLAGS: Final = (ABSENT, "0", "1")


class ImageSet:
    """Images of a list, by name without suffix.

    A line is a name, or, as in `Main/cat_train.txt`, a name and 1 (the image has the class), 0 (it has difficult ones
    only) or -1 (it has none): images with -1 are left out.

    Args:
        path: the file.
        encoding: of text without a byte order mark.

    Attributes:
        left_out: number of images with -1.

    Raises:
        ConfigError: the file cannot be read, a line is none of these, or no image is left.
    """

    def __init__(self, path: Path, encoding: str | None = None) -> None:
        self.left_out = 0
        self._path = path
        self._line_of: dict[str, int] = {}
        self._taken: set[str] = set()
        try:
            with open_text(path, encoding or "utf-8") as file:
                for number, line in enumerate(file, start=1):
                    self._add(number, line.split())
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"--image-set {path}: cannot be read ({cause_of(error)}); give a text file with one image per line"
            ) from None
        if not self._line_of:
            raise ConfigError(f"--image-set {path}: lists no image")

    def takes(self, name: str) -> bool:
        """Returns True if the list has a name, given with its folders and without suffix; remembers it."""
        listed = next((listed for listed in (name, PurePosixPath(name).name) if listed in self._line_of), None)
        if listed is not None:
            self._taken.add(listed)
        return listed is not None

    def select(self, images: ImageNames) -> ImageNames:
        """Returns the images of the list."""
        names = {name: PurePosixPath(name).with_suffix("") for name in images.names}
        return ImageNames(
            name for name, stem in names.items() if not self._line_of.keys().isdisjoint((str(stem), stem.name))
        )

    def missing(self, what: str) -> Iterator[RowError]:
        """Yields the error of each name that `takes` did not meet."""
        for name, number in self._line_of.items():
            if name not in self._taken:
                where = f"{self._path.name}:{number}"
                yield RowError(where, "BAD_FILE", f"{where}: {name}: no such {what}")

    def _add(self, number: int, cells: list[str]) -> None:
        if not cells:
            return
        if len(cells) > 2 or (len(cells) == 2 and cells[1] not in FLAGS):
            rule = "expected a name, or a name and 1, 0 or -1"
            raise ConfigError(f"--image-set {self._path}: line {number}: {' '.join(cells)[:100]!r}; {rule}")
        if cells[-1] == ABSENT and len(cells) == 2:
            self.left_out += 1
        else:
            self._line_of.setdefault(cells[0], number)
