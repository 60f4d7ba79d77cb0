"""Reads boxes from YOLO text files: a file per image, a row per object, all numbers fractions of width and height."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mal_client.formats.boxes import (
    BAD_ROW,
    BoxRecord,
    RowError,
    annotation_files,
    match_error,
    parse_numbers,
    read_label_file,
)
from mal_train.core.errors import ConfigError

BOX_NUMBERS = 4

MAX_DIGITS = 18
"""Digits of a class; Python refuses to parse thousands."""


def read_yolo(
    labels_dir: Path, file_names: Sequence[str], names: Sequence[str], names_file: Path
) -> Iterator[BoxRecord | RowError]:
    """Yields the boxes of all text files below a folder, file by file.

    A row is `class cx cy w h`, optionally followed by a confidence (stored as `score`), or `class x0 y0 x1 y1 …`, an
    outline (stored as `segmentation`) whose extent is the box. An image without a text file has no boxes; a text file
    without an image is an error.

    Args:
        labels_dir: folder of the text files, with the names and subfolders of the images.
        file_names: file names of the images.
        names: class names by number.
        names_file: file of the class names, for messages.
    """
    by_stem: dict[str, list[str]] = {}
    for name in file_names:
        by_stem.setdefault(str(Path(name).with_suffix("")), []).append(name)
    for path in annotation_files(labels_dir, ".txt"):
        relative = path.relative_to(labels_dir)
        if relative.name in {"classes.txt", "names.txt"}:
            continue
        matches = by_stem.get(str(relative.with_suffix("")), [])
        if len(matches) != 1:
            yield match_error(str(relative), str(relative.with_suffix("")), matches)
            continue
        yield from _read_file(path, str(relative), matches[0], names, names_file)


def read_names(path: Path) -> list[str]:
    """Reads class names by number, from a text file with one name per line or from a data.yaml.

    Raises:
        ConfigError: the file cannot be read, or its names are missing, empty or not unique.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--names {path}: cannot be read ({error})") from None
    lines = _yaml_names(text, path) if path.suffix.lower() in {".yaml", ".yml"} else text.splitlines()
    names = [name.strip() for name in lines]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names) or len(set(names)) != len(names):
        raise ConfigError(f"--names {path}: expected one unique name per class, without empty lines")
    return names


def _yaml_names(text: str, path: Path) -> list[str]:
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
    names = data.get("names") if isinstance(data, Mapping) else None
    if isinstance(names, Mapping) and set(names) == set(range(len(names))):
        return [str(names[number]) for number in range(len(names))]
    if isinstance(names, list):
        return [str(name) for name in names]
    raise ConfigError(f"--names {path}: expected 'names', a list or a mapping of 0, 1, … to names")


def _read_file(
    path: Path, relative: str, file_name: str, names: Sequence[str], names_file: Path
) -> Iterator[BoxRecord | RowError]:
    try:
        lines = read_label_file(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield RowError(relative, "BAD_FILE", f"{relative}: cannot be read ({error})")
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where, cells = f"{relative}:{number}", line.split()
            if not cells[0].isdecimal() or len(cells[0]) > MAX_DIGITS or int(cells[0]) >= len(names):
                rule = f"expected 0 to {len(names) - 1}, the classes of {names_file}"
                yield RowError(where, BAD_ROW, f"{where}: class {cells[0][:100]!r}; {rule}")
                continue
            yield _read_row(cells, where, file_name, names[int(cells[0])])


def _read_row(cells: list[str], where: str, file_name: str, category: str) -> BoxRecord | RowError:
    values = parse_numbers(cells[1:], (f"number {number}" for number in range(1, len(cells))), where)
    if isinstance(values, RowError):
        return values
    if len(values) in (BOX_NUMBERS, BOX_NUMBERS + 1):
        cx, cy, w, h = values[:BOX_NUMBERS]
        extra = {"score": values[BOX_NUMBERS]} if len(values) > BOX_NUMBERS else {}
        xyxy = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        return BoxRecord(where, file_name, category, xyxy, is_normalized=True, extra=extra)
    if len(values) < 6 or len(values) % 2:
        rule = "expected class cx cy w h, or class x0 y0 x1 y1 x2 y2 …"
        return RowError(where, BAD_ROW, f"{where}: {len(values)} numbers after the class; {rule}")
    xs, ys = values[0::2], values[1::2]
    xyxy = (min(xs), min(ys), max(xs), max(ys))
    return BoxRecord(where, file_name, category, xyxy, is_normalized=True, polygon=values)
