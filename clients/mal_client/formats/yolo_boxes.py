"""Boxes from YOLO's text files: one file a picture, one row an object, all numbers shares of width and height."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mal_client.formats.boxes import BAD_ROW, BoxRecord, RowError, annotation_files, numbers
from mal_train.core.errors import ConfigError

BOX_NUMBERS = 4


def read_yolo(
    labels_dir: Path, pictures: Sequence[str], names: Sequence[str], names_file: Path
) -> Iterator[BoxRecord | RowError]:
    """Boxes of all text files below a folder, file by file.

    A row is `class cx cy w h`, with a confidence behind it or not (kept as `score`), or `class x0 y0 x1 y1 …`, an
    outline, whose extent is the box and which stays as `segmentation`. A picture without a file has no box, as YOLO
    means it; a file without a picture is a fault.

    Args:
        labels_dir: the text files, named and foldered as the pictures are.
        pictures: file names of the pictures.
        names: of the classes, by their numbers.
        names_file: where those stand, for messages.
    """
    by_stem: dict[str, list[str]] = {}
    for name in pictures:
        by_stem.setdefault(str(Path(name).with_suffix("")), []).append(name)
    for path in annotation_files(labels_dir, ".txt"):
        relative = path.relative_to(labels_dir)
        if relative.name in {"classes.txt", "names.txt"}:
            continue
        found = by_stem.get(str(relative.with_suffix("")), [])
        if len(found) != 1:
            text = f"several pictures have its name: {', '.join(found)}" if found else "no picture has its name"
            yield RowError(str(relative), "BAD_IMAGE", f"{relative}: {text}")
            continue
        yield from _read_file(path, str(relative), found[0], names, names_file)


def read_names(path: Path) -> list[str]:
    """Class names by number: of a text file with one name a line, or of a data.yaml.

    Raises:
        ConfigError: it cannot be read, or holds no names.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--names {path}: cannot be read ({error})") from None
    names = _yaml_names(text, path) if path.suffix.lower() in {".yaml", ".yml"} else text.splitlines()
    found = [name.strip() for name in names]
    while found and not found[-1]:
        found.pop()
    if not found or not all(found) or len(set(found)) != len(found):
        raise ConfigError(f"--names {path}: a name for each class is needed, each a different one, without gaps")
    return found


def _yaml_names(text: str, path: Path) -> list[str]:
    try:
        import yaml  # noqa: PLC0415 - not part of the base installation
    except ModuleNotFoundError:
        raise ConfigError(
            f"--names {path}: needs PyYAML (pip install PyYAML), or give a file with one name a line"
        ) from None
    try:
        data: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--names {path}: no YAML ({error})") from None
    names = data.get("names") if isinstance(data, Mapping) else None
    if isinstance(names, Mapping) and sorted(names) == list(range(len(names))):
        return [str(names[at]) for at in range(len(names))]
    if isinstance(names, list):
        return [str(name) for name in names]
    raise ConfigError(f"--names {path}: has no 'names', a list or numbers 0, 1, … with their names")


def _read_file(
    path: Path, relative: str, picture: str, names: Sequence[str], names_file: Path
) -> Iterator[BoxRecord | RowError]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield RowError(relative, "BAD_FILE", f"{relative}: cannot be read ({error})")
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where, cells = f"{relative}:{number}", line.split()
            if not cells[0].isdecimal() or int(cells[0]) >= len(names):
                upto = f"a number from 0 to {len(names) - 1} is needed, for {names_file} names {len(names)}"
                yield RowError(where, BAD_ROW, f"{where}: class {cells[0]!r}; {upto}")
                continue
            yield _read_row(cells, where, picture, names[int(cells[0])])


def _read_row(cells: list[str], where: str, picture: str, category: str) -> BoxRecord | RowError:
    found = numbers(cells[1:], (f"number {at}" for at in range(1, len(cells))), where)
    if isinstance(found, RowError):
        return found
    if len(found) in (BOX_NUMBERS, BOX_NUMBERS + 1):
        cx, cy, w, h = found[:BOX_NUMBERS]
        extra = {"score": found[BOX_NUMBERS]} if len(found) > BOX_NUMBERS else {}
        xyxy = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        return BoxRecord(where, picture, category, xyxy, is_share=True, extra=extra)
    if len(found) < 6 or len(found) % 2:
        text = "class cx cy w h, or class x0 y0 x1 y1 x2 y2 … is needed"
        return RowError(where, BAD_ROW, f"{where}: {len(found)} numbers behind the class; {text}")
    xs, ys = found[0::2], found[1::2]
    return BoxRecord(where, picture, category, (min(xs), min(ys), max(xs), max(ys)), is_share=True, polygon=found)
