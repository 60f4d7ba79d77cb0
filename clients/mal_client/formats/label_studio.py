"""Reads masks and boxes from Label Studio's export "JSON": brush, polygon and rectangle regions."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from mal_client.formats.boxes import BAD_IMAGE, BAD_ROW, EmptyImage, Row, RowError
from mal_client.formats.label_files import ImageNames, ImageRows, only_image, stated_rows, without_rivals
from mal_client.formats.shapes import Shape, to_records
from mal_client.images.image_files import is_image_name
from mal_client.integrations.label_studio.brush import decode_brush
from mal_client.integrations.label_studio.regions import (
    LOCAL_FILES,
    Frame,
    Json,
    is_rectangle,
    name_of,
    newest,
    read_frame,
    read_labels,
    read_polygon,
    read_rectangle,
    rectangle_id,
)
from mal_train.core.coco.json_reader import JsonMemberReader
from mal_train.core.coco.json_values import json_type
from mal_train.core.errors import BadBox, BadDataset

UPLOADS: Final = "/data/upload/"
EXPORT: Final = "the export that Label Studio calls JSON"
_KINDS: Final = {
    **dict.fromkeys(("rectanglelabels", "rectangle"), "rectangle"),
    **dict.fromkeys(("polygonlabels", "polygon"), "polygon"),
    **dict.fromkeys(("brushlabels", "brush"), "brush"),
}
_DROPPED: Final = re.compile(r"[^-\w.]")
_UPLOAD_PREFIX: Final = re.compile(r"^[0-9a-f]{8}-")
_PART: Final = re.compile(r"-box$|-mask(-[0-9]+)?$")
"""Ends of the IDs that this project gives to the regions of one object (`regions.mask_regions`, `review_tasks`)."""


def read_label_studio(path: Path, images: ImageNames, name: str | None = None) -> Iterator[Row]:
    """Yields the image of each task and the objects of its newest annotation, task by task.

    Tasks that were skipped or have no annotation, older annotations, and regions of other types are errors, so that
    nothing is lost in silence. Predictions are no annotations, and are ignored.

    Args:
        path: the export.
        images: file names of the images; a task's URL is matched by the end of its path. If several URLs lead to one
            image, each is an error, except the image's exact name. Tasks of one URL all describe its image.
        name: name of the file in rows and messages; None: that of the path.

    Raises:
        BadDataset: the file is not such an export.
    """
    yield from without_rivals(_read_tasks(path, images, path.name if name is None else name), may_repeat=True)


def _read_tasks(path: Path, images: ImageNames, name: str) -> Iterator[ImageRows | RowError]:
    uploads = _Uploads(images)
    reader = JsonMemberReader(path, instead=f"give {EXPORT}")
    for number, task in enumerate(reader.rows(f"a list of tasks; give {EXPORT}"), start=1):
        where = f"{name}:task {number}"
        if not isinstance(task, dict):
            yield RowError(where, BAD_ROW, f"{where}: {json_type(task)}; a task must be an object")
            continue
        if not isinstance(task.get("annotations"), list):
            yield RowError(where, BAD_ROW, f"{where}: no annotations; export the project as JSON, not JSON-MIN")
            continue
        yield from _read_task(task, f"{name}:task {name_of(task.get('id', number))}", uploads)


def _read_task(task: Json, where: str, images: _Uploads) -> Iterator[ImageRows | RowError]:
    usable = [row for row in task["annotations"] if isinstance(row, dict) and isinstance(row.get("result"), list)]
    kept = [row for row in usable if not row.get("was_cancelled")]
    for row in task["annotations"]:
        if not any(row is known for known in usable):
            yield RowError(where, BAD_ROW, f"{where}: an annotation without a list of results")
    if not kept:
        text = "skipped by its annotator" if usable else "not annotated"
        yield RowError(where, "NOT_ANNOTATED", f"{where}: {text}")
        return
    latest = newest(kept)
    for row in kept:
        if row is not latest:
            name = name_of(row.get("id"))
            yield RowError(where, "NOT_NEWEST", f"{where}: annotation {name}: a newer one of this task is taken")
    found = _image_of(task.get("data"), where, images)
    if isinstance(found, RowError):
        yield found
        return
    stated, file_name = found
    rows: list[Row] = [EmptyImage(where, file_name), *_rows(latest["result"], file_name, where)]
    yield stated_rows(where, stated, file_name, rows)


def _rows(results: Sequence[Any], file_name: str, where: str) -> Iterator[Row]:
    regions = _regions(results, where)
    by_size: dict[tuple[int, int], list[Shape]] = {}
    for region in regions:
        if isinstance(region, RowError):
            yield region
        else:
            size_wh, shape = region
            by_size.setdefault(size_wh, []).append(shape)
    for size_wh, shapes in by_size.items():  # one size, unless the export is damaged
        yield from to_records(shapes, file_name, size_wh)


def _image_of(data: Any, where: str, images: _Uploads) -> tuple[str, str] | RowError:
    """Returns the path and the image of a task: the only image that the values of its data name."""
    values = [value for value in data.values() if isinstance(value, str)] if isinstance(data, dict) else []
    named = [path for value in values if (path := _path_of(value)) is not None]
    if not named:
        fields = ", ".join(map(repr, data))[:200] if isinstance(data, dict) else ""
        text = f"no field of its data is the URL of an image; its fields are: {fields or 'none'}"
        return RowError(where, BAD_IMAGE, f"{where}: {text}")
    found = [(path, name) for path in named for name in images.find(path)]
    image = only_image(where, ", ".join(named), list(dict.fromkeys(name for _, name in found)))
    return image if isinstance(image, RowError) else found[0]


def _path_of(value: str) -> str | None:
    """Returns the path in the URL of an image; None for other text."""
    try:
        parts = urlsplit(value)
    except ValueError:
        return None
    if parts.path == LOCAL_FILES:
        return parse_qs(parts.query, errors="surrogateescape").get("d", [""])[0]
    # The key of an object is not encoded.
    is_object = parts.scheme not in ("", "http", "https")
    path = value.partition("://")[2].partition("/")[2] if is_object else unquote(parts.path, errors="surrogateescape")
    return path if is_image_name(path) else None


class _Uploads:
    """Images by the paths of Label Studio's URLs, also by the names that it gives to uploaded files."""

    def __init__(self, images: ImageNames) -> None:
        self._images = images
        self._by_upload: dict[str, list[str]] = {}
        for name in images.names:
            self._by_upload.setdefault(upload_name(PurePosixPath(name).name), []).append(name)

    def find(self, path: str) -> list[str]:
        """Returns the images that a path names: none, one or several."""
        folder, _, name = path.strip("/").rpartition("/")
        if not path.startswith(UPLOADS):
            return self._images.find(name, folder)
        return self._images.at(name) or self._by_upload.get(_UPLOAD_PREFIX.sub("", name, count=1), [])


def upload_name(file_name: str) -> str:
    """Returns the name under which Label Studio (Django) stores an uploaded file, without its prefix.

    >>> upload_name("a b+c (1).jpg")
    'a_bc_1.jpg'
    """
    return _DROPPED.sub("", file_name.strip().replace(" ", "_"))


def _regions(results: Sequence[Any], where: str) -> Iterator[tuple[tuple[int, int], Shape] | RowError]:
    """Yields the size of its image and the shape of each region."""
    labels = _labels_by_id(results)
    rectangles = {name_of(row.get("id")) for row in results if isinstance(row, dict) and is_rectangle(row)}
    for number, region in enumerate(results, start=1):
        if not isinstance(region, dict):
            yield RowError(where, BAD_ROW, f"{where}: result {number} is not an object")
            continue
        kind = str(region.get("type"))
        place = f"{where}:region {name_of(region.get('id'))}"
        if kind == "labels" and _is_named(region) and region["id"] in labels:
            continue  # the class of the region of this ID
        if is_rectangle(region) and rectangle_id(region) in rectangles:
            continue  # the tight box that the backend added to the mask of a rectangle
        if kind not in _KINDS:
            text = "expected rectangle, polygon or brush"
            yield RowError(place, BAD_ROW, f"{place}: type {kind[:100]!r} is not converted; {text}")
            continue
        try:
            frame = read_frame(region)
            yield frame.size_wh, _shape(region, _KINDS[kind], frame, place, labels)
        except (BadBox, BadDataset) as error:
            yield RowError(place, BAD_ROW, f"{where}: {error}")


def _labels_by_id(results: Sequence[Any]) -> dict[Hashable, tuple[str, ...]]:
    """Returns the classes of the results of type "labels", which are those of other results with the same ID."""
    found: dict[Hashable, tuple[str, ...]] = {}
    ids = {row["id"] for row in results if _is_named(row) and str(row.get("type")) in _KINDS}
    for row in results:
        if _is_named(row) and row.get("type") == "labels" and row["id"] in ids:
            names = row["value"].get("labels") if isinstance(row.get("value"), dict) else None
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                found[row["id"]] = tuple(names)
    return found


def _is_named(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("id"), str | int)


def _shape(region: Json, kind: str, frame: Frame, place: str, labels: Mapping[Hashable, tuple[str, ...]]) -> Shape:
    region_id = region.get("id")
    names = read_labels(region, frame) or (labels.get(region_id, ()) if _is_named(region) else ())
    if len(names) != 1:
        raise BadBox(f"{frame.name}: {len(names)} labels ({', '.join(names)[:200]}); an object has one class")
    key = _PART.sub("", region_id) if isinstance(region_id, str) else None
    if kind == "rectangle":
        return Shape(place, names[0], key, box=read_rectangle(region).box)
    if kind == "polygon":
        return Shape(place, names[0], key, polygon=read_polygon(frame))
    if frame.value.get("format", "rle") != "rle":
        raise BadBox(f"{frame.name}: format {str(frame.value.get('format'))[:100]!r}; expected rle")
    return Shape(place, names[0], key, rle=decode_brush(frame.value.get("rle"), frame.size_wh, frame.name))
