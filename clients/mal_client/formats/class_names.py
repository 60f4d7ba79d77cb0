"""Reads the names of classes: by number, from a list or a data.yaml, or by identifier, from Open Images' table."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mal_client.formats.label_files import unreadable
from mal_train.core.errors import ConfigError
from mal_train.core.input_files import read_text, split_lines, without_gzip

MAX_UNNAMED: Final = 10_000
"""Classes of a data.yaml that states their count and no names."""

MAX_NAMES_BYTES: Final = 64 * 1024 * 1024
"""Size limit of a file of class names."""

NAMES_FILES: Final = ("data.yaml", "data.yml", "classes.txt", "obj.names", "names.txt")
"""Names of files of class names that exporters of YOLO write, the first found first."""
_LEVELS_ABOVE: Final = 2
"""Folders that exporters put between their file of class names and the labels, such as labels/train."""


@dataclass(frozen=True)
class ClassNames:
    """Names of classes.

    Attributes:
        path: their file.
        names: in the order of their numbers.
        by_id: by number as text or by identifier, and by themselves.
        keypoints: key points of an object and numbers of each, 2 or 3, by `kpt_shape`; None if there are none.
    """

    path: Path
    names: list[str]
    by_id: Mapping[str, str] = field(default_factory=dict)
    keypoints: tuple[int, int] | None = None

    def find(self, text: str) -> str | None:
        """Returns the name of a class that a table gives by number, identifier or name; None if there is none."""
        found = self.by_id.get(text)
        if found is None and text.endswith(".0"):  # a number that a table holds as a float
            found = self.by_id.get(text.removesuffix(".0"))
        return found


def find_names_file(labels_dir: Path) -> Path | None:
    """Returns the file of class names of a folder of YOLO labels: in it, or in the nearest of two folders above."""
    folder = labels_dir.resolve()
    for place in (folder, *folder.parents[:_LEVELS_ABOVE]):
        found = next((place / name for name in NAMES_FILES if (place / name).is_file()), None)
        if found is not None:
            return found
    return None


def read_class_names(path: Path, encoding: str | None = None) -> ClassNames:
    """Reads class names: a text file with one name per line, a data.yaml, or a CSV file of identifiers and names.

    Args:
        path: the file; its suffix tells .yaml, .yml and .csv.
        encoding: of text without a byte order mark; None is UTF-8.

    Raises:
        ConfigError: the file cannot be read, or its names are missing, empty or not unique.
    """
    try:
        text = read_text(path, MAX_NAMES_BYTES, encoding or "utf-8")
    except (OSError, UnicodeError) as error:
        rule = "expected one name per line, a data.yaml, or a CSV of identifiers"
        raise ConfigError(f"--names {path}: {unreadable(error, encoding)}; {rule}") from None
    suffix = Path(without_gzip(path.name)).suffix.lower()
    if suffix == ".csv":
        return _descriptions(text, path)
    # Quotation marks keep the spaces around a name in YAML.
    is_yaml = suffix in {".yaml", ".yml"}
    names, keypoints = _of_yaml(text, path) if is_yaml else ([name.strip() for name in split_lines(text)], None)
    while names and not names[-1]:
        names.pop()
    if not names or not all(name.strip() for name in names) or len(set(names)) != len(names):
        raise ConfigError(f"--names {path}: expected one unique name per class, without empty lines")
    numbers = {str(number): name for number, name in enumerate(names)}
    return ClassNames(path, names, {**{name: name for name in names}, **numbers}, keypoints)


def _descriptions(text: str, path: Path) -> ClassNames:
    """Returns the names of a table such as Open Images' class-descriptions.csv, by identifier."""
    by_id: dict[str, str] = {}
    for number, row in enumerate(_table(text, path), start=1):
        if not row or [cell.lower() for cell in row] == ["labelname", "displayname"]:
            continue
        if len(row) != 2 or not all(cell.strip() for cell in row):
            raise ConfigError(f"--names {path}: line {number}: expected an identifier and a name")
        key, name = (cell.strip() for cell in row)
        if by_id.setdefault(key, name) != name:
            raise ConfigError(f"--names {path}: line {number}: {key[:100]} is given twice")
    if not by_id:
        raise ConfigError(f"--names {path}: contains no class")
    return ClassNames(path, [], {**{name: name for name in by_id.values()}, **by_id})


def _table(text: str, path: Path) -> list[list[str]]:
    table = csv.reader(split_lines(text))
    try:
        return list(table)
    except csv.Error as error:
        raise ConfigError(
            f"--names {path}: line {table.line_num}: {error}; check for a missing quotation mark"
        ) from None


def _of_yaml(text: str, path: Path) -> tuple[list[str], tuple[int, int] | None]:
    try:
        import yaml  # noqa: PLC0415 - not part of the base installation

        from mal_train.core.yaml_text import parse_yaml  # noqa: PLC0415 - needs it
    except ModuleNotFoundError:
        raise ConfigError(
            f"--names {path}: PyYAML is not installed; run: pip install PyYAML, or give a file with one name per line"
        ) from None
    try:
        data: Any = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--names {path}: not valid YAML ({error})") from None
    data = data if isinstance(data, Mapping) else {}
    names, count = data.get("names"), data.get("nc")
    if names is None and type(count) is int and 0 < count <= MAX_UNNAMED:
        names = [f"class_{number}" for number in range(count)]  # as Ultralytics names them
    if isinstance(names, Mapping):
        names = _by_number(names)
    if not isinstance(names, list):
        raise ConfigError(f"--names {path}: expected 'names', a list or a mapping of 0, 1, … to names")
    for number, name in enumerate(names):
        # `no` and `010` are other values in YAML than they show.
        if not isinstance(name, str):
            raise ConfigError(f"--names {path}: name {number} is {str(name)[:40]}; write it in quotation marks")
    if count is not None and count != len(names):
        raise ConfigError(f"--names {path}: nc {str(count)[:40]}, but {len(names)} names; correct one of them")
    return [str(name) for name in names], _keypoints(data.get("kpt_shape"), path)


def _by_number(names: Mapping[Any, Any]) -> list[Any] | None:
    """Returns the names of a mapping of 0, 1, … in this order; None if its keys are others."""
    by_number = {str(key): name for key, name in names.items()}
    numbers = list(map(str, range(len(names))))
    return [by_number[number] for number in numbers] if by_number.keys() == set(numbers) else None


def _keypoints(shape: Any, path: Path) -> tuple[int, int] | None:
    if shape is None:
        return None
    if isinstance(shape, list) and len(shape) == 2 and all(type(value) is int for value in shape):
        count, numbers = shape
        if count > 0 and numbers in (2, 3):
            return count, numbers
    raise ConfigError(f"--names {path}: kpt_shape {str(shape)[:40]}; expected [key points, 2 or 3]")
