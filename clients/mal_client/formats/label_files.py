"""Finds and reads the annotation files of a folder, one per image, and matches them with the images."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Final

from mal_client.formats.boxes import BAD_IMAGE, RowError
from mal_train.core.errors import BadDataset
from mal_train.core.input_files import cause_of, decode_text, read_unzipped

MAX_LABEL_BYTES: Final = 64 * 1024 * 1024
"""Size limit of a file with the annotations of one image, decompressed."""

GZIP_SUFFIX: Final = ".gz"

FOLDERS_OF_KIND: Final = frozenset({"annotations", "jpegimages", "images", "labels", "labeltxt", "img", "xml"})
"""Lower-case names of folders by which exporters divide images and annotations."""


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
    path = PurePosixPath(name)
    if path.suffix.lower() == GZIP_SUFFIX:
        path = path.with_suffix("")
    return str(path.with_suffix("")) if path.name else name


def read_label_file(path: Path) -> bytes:
    """Returns the bytes of the annotations of one image, decompressed.

    Raises:
        OSError: the file cannot be read, or has more than MAX_LABEL_BYTES.
    """
    return read_unzipped(path, MAX_LABEL_BYTES)


def read_label_lines(path: Path, name: str, encoding: str | None) -> list[str] | RowError:
    """Returns the lines of the annotations of one image, without their ends, or the error of the file."""
    try:
        text = decode_text(read_label_file(path), encoding or "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return RowError(name, "BAD_FILE", f"{name}: cannot be read ({cause_of(error)})")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


class ImageNames:
    """File names of images, found by path, by name or without their suffix.

    Accents match in both normal forms, and backslashes separate folders.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._by_path: dict[str, list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        for name in self.names:
            key = _key(name)
            for path in {key, str(PurePosixPath(key).with_suffix(""))} if key else ():
                self._by_path.setdefault(path, []).append(name)
            base = PurePosixPath(key)
            for short in {base.name, base.stem}:
                self._by_name.setdefault(short, []).append(name)

    def at(self, path: str) -> list[str]:
        """Returns the images at a path, which may lack the suffix."""
        return self._by_path.get(_key(path), [])

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
        found = self._by_name.get(PurePosixPath(_key(name)).name, [])
        place = _place(str(PurePosixPath(_key(folder)) / "x"))
        places = {match: _place(_key(match)) for match in found}
        common = {match: _common_end(places[match], place) for match in found}
        best = max(common.values(), default=0)
        if best or len(found) > 1:
            return [match for match in found if common[match] == best]
        return [match for match in found if not place or not places[match]]


class Matches:
    """Matches annotation files with images, at most one each."""

    def __init__(self) -> None:
        self._file_of: dict[str, str] = {}

    def take(self, labels_file: str, stated: str, found: list[str]) -> str | RowError:
        """Returns the only image found for a file, or an error: none, several, or one that has a file already."""
        if len(found) != 1:
            problem = f"matches several images: {', '.join(found)}" if found else "no such image"
            return RowError(labels_file, BAD_IMAGE, f"{labels_file}: image {stated!r}: {problem}")
        first = self._file_of.setdefault(found[0], labels_file)
        if first != labels_file:
            text = f"{labels_file}: image {found[0]!r} has the annotations of {first} already; remove one of the files"
            return RowError(labels_file, BAD_IMAGE, text)
        return found[0]


def match_stated(stated: str, name: str, images: ImageNames, matches: Matches) -> str | RowError:
    """Returns the image of an annotation file that may state one: at its own path or of its own name, or as stated.

    Args:
        stated: name or path of the image in the file; empty if there is none.
        name: path of the file below the folder of the annotations.
        images: the images.
        matches: of the files before.
    """
    stem, folder, stated = without_suffix(name), str(PurePosixPath(name).parent), stated.strip()
    by_stem = images.find(PurePosixPath(stem).name, folder)
    by_stated = images.find(stated, folder) if stated else []
    if len(by_stem) == len(by_stated) == 1 and by_stem != by_stated:
        text = f"states the image {by_stated[0]!r}, its own name {by_stem[0]!r}; correct one of them"
        return RowError(name, BAD_IMAGE, f"{name}: {text}")
    best = min((by_stated, by_stem), key=lambda found: abs(len(found) - 1) or not found)
    return matches.take(name, stated or stem, best)


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
