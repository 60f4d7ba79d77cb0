"""Finds and reads the annotation files of a folder, one per image, and matches them with the images."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from mal_client.formats.boxes import BAD_FILE, BAD_IMAGE, EmptyImage, Row, RowError
from mal_train.core.errors import BadDataset
from mal_train.core.input_files import GZIP_SUFFIX, cause_of, decode_text, read_unzipped, split_lines, without_gzip

MAX_LABEL_BYTES: Final = 64 * 1024 * 1024
"""Size limit of a file with the annotations of one image, decompressed."""

BLANK: Final = b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n"
"""Bytes before the first character of a text: byte order marks, spaces, and the zeros of UTF-16 and UTF-32."""

FOLDERS_OF_KIND: Final = frozenset({"annotations", "jpegimages", "images", "labels", "labeltxt", "img", "xml"})
"""Lower-case names of folders by which exporters divide images and annotations."""

_LISTED: Final = 3


def suffixes(suffix: str) -> tuple[str, str]:
    """Returns the lower-case ends of the names of annotation files: with and without gzip."""
    return suffix, suffix + GZIP_SUFFIX


def annotation_files(folder: Path, suffix: str) -> Iterator[tuple[Path, str]]:
    """Yields path and name, relative and with "/", of the files with a suffix (in any case, or gzip) below a folder.

    Raises:
        BadDataset: there is no such folder, it has none, or a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise BadDataset(f"{error.filename}: cannot be listed ({error.strerror})")

    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise BadDataset(f"{folder}: {problem}; give the folder of the annotations with --labels")
    paths = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if name.lower().endswith(suffixes(suffix))
    ]
    if not paths:
        raise BadDataset(f"{folder}: contains no {suffix} file; give the folder of the annotations with --labels")
    for path in sorted(paths):
        yield path, path.relative_to(folder).as_posix()


def without_suffix(name: str) -> str:
    """Returns a name without its suffix and without that of gzip.

    >>> without_suffix("cam0/frame.1.xml.gz")
    'cam0/frame.1'
    """
    path = PurePosixPath(without_gzip(name))
    return str(path.with_suffix("")) if path.name else name


def read_label_file(path: Path) -> bytes:
    """Returns the bytes of the annotations of one image, decompressed.

    Raises:
        OSError: the file cannot be read, or has more than MAX_LABEL_BYTES.
    """
    return read_unzipped(path, MAX_LABEL_BYTES)


def unreadable(error: Exception, encoding: str | None) -> str:
    """Returns why a text file cannot be read, and the remedy if its encoding is the cause."""
    text = f"cannot be read ({cause_of(error)})"
    if not isinstance(error, UnicodeError):
        return text
    used = error.encoding if isinstance(error, UnicodeDecodeError) else encoding or "utf-8"
    return f"{text}; it is not in {used}: give its encoding, such as --encoding latin-1 or gbk"


def read_label_lines(path: Path, name: str, encoding: str | None) -> list[str] | RowError:
    """Returns the lines of the annotations of one image, without their ends, or the error of the file."""
    try:
        text = decode_text(read_label_file(path), encoding or "utf-8")
    except (OSError, UnicodeError) as error:
        return RowError(name, BAD_FILE, f"{name}: {unreadable(error, encoding)}")
    return split_lines(text)


class ImageNames:
    """File names of images, found by path, by name or without their suffix.

    Accents match in both normal forms, and backslashes separate folders; `only_image` chooses between two forms.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._exact: dict[str, list[str]] = {}
        self._by_path: dict[str, list[str]] = {}
        """By their path without the suffix."""
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        for name in self.names:
            key = _key(name)
            self._exact.setdefault(key, []).append(name)
            self._by_path.setdefault(str(PurePosixPath(key).with_suffix("")) if key else "", []).append(name)
            base = PurePosixPath(key)
            self._by_name.setdefault(base.name, []).append(name)
            self._by_stem.setdefault(base.stem, []).append(name)

    def at(self, path: str) -> list[str]:
        """Returns the images at a path: of this name, else those that have it without their suffix."""
        key = _key(path)
        return self._exact.get(key) or self._by_path.get(key, [])

    def find(self, name: str, folder: str = "") -> list[str]:
        """Returns the images that a name refers to.

        Args:
            name: name or path, with or without suffix, also an absolute one of another machine.
            folder: folder of the file that states the name. Folders such as `Annotations` and `images` say nothing of
                the place; of the images of this name elsewhere, those remain whose folders end in the most names of
                `folder`, and one that shares none only if either lies at the top.
        """
        found = self.at(f"{folder}/{name}") or self.at(name)
        if found:
            return found
        base = PurePosixPath(_key(name)).name
        found = self._by_name.get(base) or self._by_stem.get(base, [])
        place = _place(str(PurePosixPath(_key(folder)) / "x"))
        places = {match: _place(_key(match)) for match in found}
        common = {match: _common_end(places[match], place) for match in found}
        best = max(common.values(), default=0)
        if best or len(found) > 1:
            return [match for match in found if common[match] == best]
        return [match for match in found if not place or not places[match]]


class ImageRows(NamedTuple):
    """Rows for one image.

    Attributes:
        where: their place, for messages.
        stated: name by which they mean the image, or that of their own file.
        file_name: the image that this name leads to.
        is_exact: it is the name of the image; of the name of an annotation file, apart from its suffix.
        rows: the objects and errors.
    """

    where: str
    stated: str
    file_name: str
    is_exact: bool
    rows: list[Row]


def stated_rows(where: str, stated: str, file_name: str, rows: list[Row]) -> ImageRows:
    """Returns the rows for an image that a tool names."""
    return ImageRows(where, stated, file_name, _key(stated) == _key(file_name), rows)


def file_rows(name: str, file_name: str, rows: list[Row]) -> ImageRows:
    """Returns the rows of an annotation file of one image, which has its name with another suffix."""
    is_exact = _key(without_suffix(name)) == _key(without_suffix(file_name))
    return ImageRows(name, name, file_name, is_exact, rows)


def only_image(where: str, stated: str, found: Sequence[str]) -> str | RowError:
    """Returns the only image that a stated name leads to, or the error: none, or several.

    Of names that are equal but for their normal form, the one that is stated in its form is meant.
    """
    if len(found) > 1 and len(set(map(_key, found))) == 1:
        base = PurePosixPath(stated.replace("\\", "/")).name
        found = [name for name in found if base in (PurePosixPath(name).name, PurePosixPath(name).stem)] or found
    if len(found) == 1:
        return found[0]
    problem = f"matches several images: {', '.join(map(repr, found))}" if found else "no such image"
    return RowError(where, BAD_IMAGE, f"{where}: image {stated!r}: {problem}", tuple(found))


def without_rivals(images: Iterable[ImageRows | RowError], *, may_repeat: bool = False) -> Iterator[Row]:
    """Yields the rows of the images that one item alone means; all rows are held until the last was read.

    Several names that lead to one image may mean several images of which the others are missing. So each is an error,
    except the image's exact name. An item without rows states an image without boxes.

    Args:
        images: the items.
        may_repeat: items of one name describe the same image, and none is an error; else each of them is one.
    """
    held = list(images)
    by_image: dict[str, list[ImageRows]] = {}
    for image in held:
        if isinstance(image, ImageRows):
            by_image.setdefault(image.file_name, []).append(image)
    rivals = {name: _Rivals(items, may_repeat) for name, items in by_image.items()}
    for image in held:
        if isinstance(image, RowError):
            yield image
            continue
        names = rivals[image.file_name].of(image)
        if not names:
            yield from _rows_of(image)
            continue
        text = f"{image.stated!r} may mean image {image.file_name!r}, and so may {', '.join(map(repr, names))}"
        if names == [image.stated]:
            text = f"image {image.stated!r} is described several times"
        remedy = "give the folder that all names are relative to, or remove one"
        yield RowError(image.where, BAD_IMAGE, f"{image.where}: {text}; {remedy}", (image.file_name,))


def _rows_of(image: ImageRows) -> Iterator[Row]:
    """Yields the rows for an image, with its name in their errors; without rows, that it has no boxes."""
    for row in image.rows or [EmptyImage(image.where, image.file_name)]:
        yield replace(row, images=(image.file_name,)) if isinstance(row, RowError) else row


class _Rivals:
    """The names by which items mean one image."""

    def __init__(self, items: Sequence[ImageRows], may_repeat: bool) -> None:
        self._counts = Counter(item.stated for item in items)
        self._exact = list(dict.fromkeys(item.stated for item in items if item.is_exact))
        self._may_repeat = may_repeat

    def of(self, item: ImageRows) -> list[str]:
        """Returns the first names of other items that keep this one from its image; none if it has it alone."""
        names = self._exact if item.is_exact else self._counts
        is_repeated = self._counts[item.stated] > 1 and not self._may_repeat
        rivals = (name for name in names if name != item.stated or is_repeated)
        return list(islice(rivals, _LISTED))


def match_stated(stated: str, name: str, images: ImageNames) -> str | RowError:
    """Returns the image of an annotation file that may state one: at its own path or of its own name, or as stated.

    Args:
        stated: name or path of the image in the file; empty if there is none.
        name: path of the file below the folder of the annotations.
        images: the images.
    """
    stem, folder, bare = without_suffix(name), str(PurePosixPath(name).parent), stated.strip()
    by_stem = images.find(PurePosixPath(stem).name, folder)
    by_stated = (images.find(stated, folder) or images.find(bare, folder)) if bare else []
    if len(by_stem) == len(by_stated) == 1 and by_stem != by_stated:
        text = f"states the image {by_stated[0]!r}, its own name {by_stem[0]!r}; correct one of them"
        return RowError(name, BAD_IMAGE, f"{name}: {text}", (by_stated[0], by_stem[0]))
    best = min((by_stated, by_stem), key=lambda found: (len(found) != 1, not found))
    return only_image(name, stated if bare else stem, best)


def broken_file(error: RowError, images: ImageNames) -> RowError:
    """Returns the error of an annotation file that cannot be read, with the image that its own name leads to."""
    image = match_stated("", error.where, images)
    return replace(error, images=image.images if isinstance(image, RowError) else (image,))


def _key(name: str) -> str:
    return str(PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/"))) if name else ""


def _place(key: str) -> tuple[str, ...]:
    """Returns the folders of a path, without those that only name a kind of files."""
    return tuple(part for part in PurePosixPath(key).parent.parts if part.lower() not in FOLDERS_OF_KIND)


def _common_end(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Returns how many last folders two paths share."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


FindImage = Callable[[str], list[str]]
"""Returns the images that a name refers to."""
