"""Finds the file of a folder that a file name means, where annotations spell it in another way than the folder.

Annotations come from other machines than their images: paths of Windows, paths below another root, percent-encoded
names, other letter case, another normal form of accents. Such a name leads to a file if it can mean only that one.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Final
from urllib.parse import unquote

MAX_ENTRIES: Final = 1 << 20
"""Entries of the largest folder that is looked at; in a larger one, names must be exact."""
MAX_NAME_CHARS: Final = 4096
MAX_PARTS: Final = 32
"""Last parts of a name that are compared."""

_DRIVE = re.compile(r"[A-Za-z]:$")
_LISTED = 3
_SUBFOLDERS = 16
"""Folders of the folder in which a missing file is looked for, to be named."""


class AmbiguousName(ValueError):
    """A file name that can mean several files, or whose file another name can mean, too; the argument says which."""


@dataclass(frozen=True)
class RepeatedNames:
    """The names of the annotations that end in the same file name as another one. Safe in threads.

    A pickled object holds those names, not `names`.

    >>> names = RepeatedNames(lambda: ["a/x.jpg", "b/X.JPG", "c/y.jpg"])
    >>> names.listed, names.ending_in(["x.jpg"]), names.ending_in(["b", "x.jpg"])
    (('a/x.jpg', 'b/X.JPG'), ('a/x.jpg', 'b/X.JPG'), ('b/X.JPG',))

    Args:
        names: returns the names of all annotations; called for the first name that no file has.
    """

    names: Callable[[], Iterable[str]] = tuple
    _indices: dict[int, dict[str, tuple[str, ...]]] = field(default_factory=dict, repr=False, compare=False)
    """By a number of last parts: some of the names that end in them."""

    def __reduce__(self) -> tuple[type[RepeatedNames], tuple[Callable[[], Iterable[str]]]]:
        """Returns how the object is pickled."""
        return RepeatedNames, (partial(tuple, self.listed),)

    @cached_property
    def listed(self) -> tuple[str, ...]:
        """The names, in their order."""
        first: dict[str, str] = {}
        repeated: dict[str, None] = {}
        for name in self.names():
            for key in _ends(name, 1):
                other = first.setdefault(key, name)
                if other != name:
                    repeated |= dict.fromkeys((other, name))
        return tuple(repeated)

    def ending_in(self, tail: Sequence[str]) -> tuple[str, ...]:
        """Returns the names that end in these parts in some spelling; a few, if they are many."""
        count = len(tail)
        index = self._indices.get(count)
        if index is None:
            index = {}
            for name in self.listed:
                for key in _ends(name, count):
                    known = index.get(key, ())
                    if len(known) <= _LISTED and name not in known:
                        index[key] = (*known, name)
            self._indices[count] = index
        return index.get(_key(tail), ())


def _ends(name: str, count: int) -> Iterator[str]:
    """Yields the key of the last `count` parts of each reading of a name that has them."""
    return (_key(parts[-count:]) for parts in readings(name) if len(parts) >= count)


def _key(parts: Sequence[str]) -> str:
    return "/".join(map(folded, parts))


@dataclass(frozen=True)
class FolderNames:
    r"""Files of a local folder by the names in annotations. Safe in threads.

    A name that no file has is compared with those of the folder, after `\\` became `/`, percent escapes were decoded
    and differences of letter case and of the normal form of Unicode were ignored. Leading folders of the name that are
    not in the folder are left out: first all that fit are kept, then fewer.

    Args:
        folder: the folder.
        names: the names of the annotations, none of which may lead to the file of another one.
        max_entries: entries of the largest folder that is looked at; each takes some 250 bytes of memory.
    """

    folder: Path
    names: RepeatedNames = field(default_factory=RepeatedNames, compare=False)
    max_entries: int = MAX_ENTRIES
    _entries: dict[str, dict[str, list[str]]] = field(default_factory=dict, repr=False, compare=False)
    """Entries of the folders that were looked at, by their path and by what is equal in all spellings."""

    def find(self, name: str) -> Path | None:
        """Returns the file that a name means; None if there is none.

        Raises:
            AmbiguousName: there are several, or another name of the annotations can mean the same.
        """
        for parts in readings(name):
            for start in range(len(parts)):
                found = self._walk(parts[start:])
                if found is None:
                    continue
                check_only_name(name, parts[start:], found, self.names)
                return found
        return None

    def name_in_folder(self, name: str) -> str:
        """Returns the name of a file relative to the folder, in the spelling of the folder if only one can be meant."""
        if os.path.lexists(os.path.join(self.folder, name)):
            return name
        try:
            found = self.find(name)
        except AmbiguousName:
            return name
        return name if found is None else found.relative_to(self.folder).as_posix()

    def similar(self, name: str) -> str | None:
        """Returns a file that is not the one of a name but may be meant; None if there is none.

        It has this name and another suffix, or this name in a folder of the folder: CVAT writes images/default/NAME.
        """
        parts = next(readings(name), [])
        if not parts:
            return None
        last = folded(parts[-1])
        stem = os.path.splitext(last)[0]
        entries = self._of(self.folder)
        renamed = next((names[0] for key, names in entries.items() if os.path.splitext(key)[0] == stem), None)
        if renamed is not None:
            return renamed
        for folder in self._subfolders:
            if below := self._of(self.folder / folder).get(last):
                return f"{folder}/{below[0]}"
        return None

    @cached_property
    def _subfolders(self) -> list[str]:
        """The first folders of the folder; links are left out, since they may lead out of it."""
        try:
            with os.scandir(self.folder) as entries:
                names = (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
                return sorted(islice(names, _SUBFOLDERS))
        except OSError:
            return []

    def _walk(self, parts: list[str]) -> Path | None:
        path = self.folder
        for part in parts:
            matches = self._of(path).get(folded(part), [])
            if part in matches:
                matches = [part]
            if len(matches) > 1:
                listed = ", ".join(str(path / match) for match in matches[:_LISTED])
                raise AmbiguousName(f"may mean {listed}; rename one, or give the exact name")
            if not matches:
                return None
            path /= matches[0]
        return path if path.is_file() else None

    def _of(self, path: Path) -> dict[str, list[str]]:
        key = str(path)
        known = self._entries.get(key)
        if known is None:
            known = {}
            for name in _listed(path, self.max_entries):
                known.setdefault(folded(name), []).append(name)
            self._entries[key] = known
        return known


def check_only_name(name: str, tail: Sequence[str], found: object, names: RepeatedNames) -> None:
    """Raises AmbiguousName if another one of the names than `name` ends in the same parts."""
    rivals = [other for other in names.ending_in(tail) if other != name]
    if rivals:
        raise AmbiguousName(
            f"may mean {found}, and so may {', '.join(rivals[:_LISTED])}; give the folder that all these names are "
            "relative to"
        )


def _listed(path: Path, limit: int) -> list[str]:
    """Returns the sorted names in a folder; none if it cannot be read or has more than `limit`."""
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry in islice(entries, limit + 1)]
    except OSError:
        return []
    return sorted(names) if len(names) <= limit else []


def readings(name: str) -> Iterator[list[str]]:
    """Yields the parts of a name as it may be meant: as it stands, then percent-decoded; without `..` and drives."""
    if len(name) > MAX_NAME_CHARS:
        return
    texts = [name.replace("\\", "/")]
    decoded = unquote(name).replace("\\", "/")
    if decoded != texts[0] and "\0" not in decoded:
        texts.append(decoded)
    for text in texts:
        parts = [part for part in text.split("/") if part not in ("", ".") and not _DRIVE.match(part)]
        after_parent = max((index for index, part in enumerate(parts, 1) if part == ".."), default=0)
        yield parts[after_parent:][-MAX_PARTS:]


def ends_in(parts: Sequence[str], tail: Sequence[str]) -> bool:
    """Returns True if a path ends in parts that are `folded`."""
    return list(map(folded, parts[-len(tail) :])) == list(tail)


def shown(name: str, other: str) -> str:
    r"""Returns a name for a message beside another one, with escapes where the two would look the same.

    >>> print(shown("e\u0301.jpg", "\xe9.jpg"), shown("a.jpg", "A.jpg"))
    e\u0301.jpg a.jpg
    """
    is_alike = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", other)
    return ascii(name)[1:-1] if is_alike else name


def folded(name: str) -> str:
    """Returns what is equal in all spellings of a name."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
