"""Reads a COCO file below the server's data folders as the images of an evaluation. Knows nothing of gRPC.

The file is read row by row: `json.loads` of a whole file would stop every other thread for seconds, and so would the
garbage collector on the objects of a million rows. Rows are kept as JSON text until their image is labeled.
"""

import json
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mal_server.config.limits import MAX_CATEGORIES, MAX_CATEGORY_CHARS
from mal_server.errors import InvalidRequest, ResumeTokenStale
from mal_server.evaluation.resume_tokens import GroundTruth
from mal_server.evaluation.run import UnreadImage, refused_image
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.inference.image_store import FileImage
from mal_server.inference.requests import LabelRequest
from mal_train.core.coco.annotations import (
    NO_CATEGORY,
    Annotation,
    ImageInfo,
    JsonId,
    Reason,
    id_order,
    without_points,
)
from mal_train.core.coco.fields import has_segmentation
from mal_train.core.coco.json_file import open_json, text_size
from mal_train.core.coco.left_out import LeftOut
from mal_train.core.coco.parquet_schema import is_parquet
from mal_train.core.coco.stream import CocoHead, scan_coco
from mal_train.core.errors import BadDataset
from mal_train.core.images.folder_names import FolderNames, RepeatedNames
from mal_train.core.masks.geometry import Box
from mal_train.core.metrics.lvis import Federation
from mal_train.core.settings import COCO_RULES, RowRules

MAX_FILE_BYTES = 512 * 1024 * 1024
"""Largest annotation file; its rows stay in memory while the evaluation runs."""

MAX_ROW_CHARS = 512 * 1024
"""Longest row of a file. Parsing one stops all other threads, for 20 ms at this length."""

MEMORY_OF_A_BYTE, MEMORY_OF_A_ROW = 2, 500
"""Bytes of memory for each byte and each object of an annotation file, while it is read. Measured: 1.3 for each byte
with polygons of COCO; 250 for each row of a few characters."""

WORK_S, PAUSE_S = 0.002, 0.0001
"""Time after which reading pauses, and the pause, in which the event loop takes over the interpreter at once; otherwise
it waits 5 ms each time that it needs it."""

_READ_BYTES = 1 << 20

MAX_FOLDER_ENTRIES = 1 << 16
"""Entries of the largest folder in which names of another spelling are found; its list takes 16 MB of memory."""

_PART = "\0"
"""Between the file name of an image with too many objects for one request and the number of a further part: the name of
no file has it."""

MAX_ID = 2**63
"""Ids of a report are integers of 64 bits; a file with others gets numbers instead."""

_WITHOUT_IMAGE = (Reason.NOT_AN_OBJECT, Reason.BAD_ID, Reason.IMAGE_UNKNOWN)
"""Reasons of rows that belong to no image, or have no id to tell them apart."""

MakeRequest = Callable[[FileImage, tuple[int, int] | None, tuple[int, ...], tuple[Box, ...]], LabelRequest]
"""(image, its width and height, ids, boxes) → the request that labels them."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A COCO file and the folder of its images.

    Attributes:
        head: images and categories.
        rows: each annotation of a known image as JSON text, see `_packed`, in file order.
        order: indices of `rows`, by image.
        ends: end of the rows of each image in `order`, in the order of `head.images`.
        has_integer_ids: the ids of all annotations are integers of a report; their numbers are used otherwise.
        category_names: names by the ids of the report: those of the file if all are integers, else numbers from 1.
        category_ids: ids of the report by those of the file; None is that of annotations without a category.
        folder: name of the data folder of its images.
        image_dir: path of the images below that folder; "" = the folder itself.
        image_names: the files in that place.
        left_out: rows that belong to no image.
    """

    head: CocoHead
    rows: list[bytes]
    order: NDArray[np.int64]
    ends: NDArray[np.int64]
    has_integer_ids: bool
    category_names: Mapping[JsonId, str]
    category_ids: Mapping[JsonId | None, JsonId]
    folder: str
    image_dir: str
    image_names: FolderNames
    left_out: LeftOut

    @property
    def federation(self) -> Federation | None:
        """Federation by the ids of the report; None unless the file is federated, as LVIS is."""
        if not self.head.is_federated:
            return None
        frequencies = self.head.category_frequencies
        return Federation({self.category_ids[key]: value for key, value in frequencies.items()})

    @property
    def memory(self) -> int:
        """Bytes of memory that the data set takes."""
        texts = sum(len(image.file_name) for image in self.head.images.values()) + sum(map(len, self.head.notes))
        images = MEMORY_OF_A_ROW * (len(self.head.images) + len(self.head.notes))
        return sum(map(len, self.rows)) + 64 * len(self.rows) + 4 * texts + images

    def check_records(self, records: Mapping[str, bytes]) -> None:
        """Raises ResumeTokenStale for records of images that are not in the data set."""
        names = {image.file_name for image in self.head.images.values()}
        unknown = [name for name in records if name.partition(_PART)[0] not in names]
        if unknown:
            raise ResumeTokenStale(
                f"{len(unknown)} of {len(records)} records belong to images that are not in the data set, for example "
                f"{min(unknown)!r}; start the evaluation again without records"
            )

    def images(
        self,
        make_request: MakeRequest,
        max_boxes: int,
        records: Mapping[str, bytes],
        *,
        complete_images: bool = False,
    ) -> Iterator[UnreadImage]:
        """Yields the images in the order of the file, with their objects counted but not read.

        An image with more objects than the limit comes in parts.

        Args:
            make_request: makes the request that labels an image.
            max_boxes: limit of objects of one request.
            records: sealed records by file name.
            complete_images: refuse images with more objects, which one request must hold.
        """
        # Equal scores count in the order of image ids, as in pycocotools.
        numbers = {image_id: number for number, image_id in enumerate(sorted(self.head.images, key=id_order))}
        start = 0
        for image, end in zip(self.head.images.values(), self.ends.tolist(), strict=True):
            rows, start = self.order[start:end], end
            if complete_images and len(rows) > max_boxes:
                rule = f"resolve_overlaps needs all of them in one request, and max_boxes is {max_boxes}"
                yield refused_image(image.file_name, len(rows), rule)
                continue
            for part, first in enumerate(range(0, max(len(rows), 1), max_boxes)):
                name = image.file_name + (f"{_PART}{part}" if part else "")
                rows_of_part = rows[first : first + max_boxes]
                size = sum(len(self.rows[row]) for row in rows_of_part.tolist())
                record = records.get(name, b"")
                read = partial(
                    self._read, image, rows_of_part, make_request, name=name, number=numbers[image.id], record=record
                )
                # As Python objects, numbers take several times the memory of their digits.
                yield UnreadImage(name, len(rows_of_part), 8 * size + len(record), read)

    def _read(
        self,
        image: ImageInfo,
        rows: NDArray[np.int64],
        make_request: MakeRequest,
        *,
        name: str,
        number: int,
        record: bytes,
    ) -> GroundTruth:
        annotations = tuple(self._annotation(row, number) for row in rows.tolist())
        measured = {row.id: row for row in annotations if _is_measured(row)}
        file_name = self.image_names.name_in_folder(image.file_name)
        path = str(PurePosixPath(self.image_dir) / file_name) if self.image_dir else file_name
        ids = tuple(key for key in measured if isinstance(key, int))
        boxes = tuple(row.box_xywh for row in measured.values())
        request = make_request(FileImage(self.folder, path), image.size_wh, ids, boxes)
        ids_of = self.category_ids
        not_exhaustive = (ids_of[one] for one in image.not_exhaustive_category_ids or () if one in ids_of)
        return GroundTruth(
            name,
            annotations,
            request,
            None,
            record,
            continues=name != image.file_name,
            not_exhaustive=frozenset(not_exhaustive),
        )

    def _annotation(self, row: int, image_number: int) -> Annotation:
        number, annotation_id, category_id, box, iscrowd, segmentation, reason = json.loads(self.rows[row])
        return Annotation(
            id=annotation_id if self.has_integer_ids else number,
            image_id=image_number,
            category_id=self.category_ids[category_id],
            box_xywh=tuple(box),
            iscrowd=iscrowd,
            raw={} if segmentation is None else {"segmentation": segmentation},
            problem=reason,
            reason=None if reason is None else Reason(reason),
        )


def memory_of(folders: AllowedDirs, annotations: str) -> int:
    """Estimates the bytes of memory that a data set takes while it is read. Reads the file, in a second or less.

    Raises:
        InvalidRequest: a malformed path, or a file above MAX_FILE_BYTES or that cannot be read.
        NoSuchFile: the folder or the file does not exist.
    """
    path = _annotations_path(folders, annotations)
    try:
        size = _checked_size(path)
        with open_json(path) as file:
            rows = sum(chunk.count(b"{") for chunk in iter(partial(file.read, _READ_BYTES), b""))
    except BadDataset as error:
        raise _unreadable(error, path, annotations) from None
    return MEMORY_OF_A_BYTE * size + MEMORY_OF_A_ROW * rows


def read_dataset(folders: AllowedDirs, annotations: str, images: str, rules: RowRules = COCO_RULES) -> Dataset:
    """Reads a COCO file. Takes seconds for large files; call it in a thread, which lets others run.

    Args:
        folders: data folders of the server.
        annotations: FOLDER/PATH of the file.
        images: FOLDER/PATH or FOLDER of its images.
        rules: how rows are read.

    Raises:
        InvalidRequest: a malformed path, or a file that is not a usable COCO file.
        NoSuchFile: a folder or file does not exist.
    """
    path = _annotations_path(folders, annotations)
    image_folder, _, image_dir = images.partition("/")
    image_path = folders.path(image_folder, image_dir, "options.dataset.images")
    rows = _RowCollector()
    try:
        _checked_size(path)
        head = scan_coco(path, rows.add, max_value_chars=MAX_ROW_CHARS, rules=rules)
    except BadDataset as error:
        raise _unreadable(error, path, annotations) from None
    names = dict[JsonId | None, str](head.category_names.items())
    for used in rows.category_ids:
        names.setdefault(used, NO_CATEGORY if used is None else str(used))
    longest = max(map(len, names.values()), default=0)
    if len(names) > MAX_CATEGORIES or longest > MAX_CATEGORY_CHARS:
        rule = f"at most {MAX_CATEGORIES}, with names of {MAX_CATEGORY_CHARS} characters"
        problem = f"{annotations}: {len(names)} categories, the longest name has {longest}; {rule}"
        raise InvalidRequest([("options.dataset.annotations", problem)])
    ids = _report_ids(names)
    order, ends = rows.by_image(head)
    return Dataset(
        head,
        rows.packed,
        order,
        ends,
        rows.has_integer_ids,
        {ids[key]: name for key, name in names.items()},
        ids,
        image_folder,
        image_dir,
        FolderNames(
            image_path, RepeatedNames(lambda: [one.file_name for one in head.images.values()]), MAX_FOLDER_ENTRIES
        ),
        rows.left_out,
    )


def _unreadable(error: BadDataset, path: Path, annotations: str) -> InvalidRequest:
    """Returns the error of a call; clients know the file by FOLDER/PATH and must not learn where the folder is."""
    return InvalidRequest([("options.dataset.annotations", str(error).replace(str(path), annotations))])


def _report_ids(names: Mapping[JsonId | None, str]) -> dict[JsonId | None, JsonId]:
    if all(map(_is_report_id, names)):
        return {value: value for value in names if value is not None}
    return {value: number for number, value in enumerate(names, start=1)}


def _annotations_path(folders: AllowedDirs, annotations: str) -> Path:
    if is_parquet(Path(annotations)):
        # Its memory could not be bounded by the size of the file.
        problem = f"{annotations}: the server reads JSON; convert the file with mal-client convert --from coco"
        raise InvalidRequest([("options.dataset.annotations", problem)])
    folder, _, relative_path = annotations.partition("/")
    return folders.path(folder, relative_path, "options.dataset.annotations")


def _checked_size(path: Path) -> int:
    """Returns the bytes of a file without compression. Raises InvalidRequest above MAX_FILE_BYTES, or BadDataset."""
    size = text_size(path, MAX_FILE_BYTES)
    if size > MAX_FILE_BYTES:
        raise InvalidRequest([("options.dataset.annotations", f"{size} bytes or more; at most {MAX_FILE_BYTES}")])
    return size


class _RowCollector:
    """Packs the annotations of a scan.

    Attributes:
        packed: annotations of images, in file order.
        has_integer_ids: the ids of all annotations so far are integers of a report.
        left_out: annotations that belong to no image; the others have an id, and an image of the file.
        category_ids: those that annotations so far name, at most one more than a data set may have.
    """

    def __init__(self) -> None:
        self.packed: list[bytes] = []
        self.has_integer_ids = True
        self.category_ids: dict[JsonId | None, None] = {}
        self.left_out = LeftOut()
        self._image_ids: list[JsonId] = []
        self._pause_at = time.monotonic() + WORK_S

    def add(self, index: int, annotation: Annotation) -> None:
        """Receives one annotation of `scan_coco`."""
        annotation = without_points(annotation)
        if annotation.reason in _WITHOUT_IMAGE:
            self.left_out.add(str(annotation.reason), annotation.problem or "", annotation.id)
        elif annotation.image_id is not None:
            self.has_integer_ids &= _is_report_id(annotation.id)
            self.packed.append(_packed(index, annotation))
            self._image_ids.append(annotation.image_id)
            if len(self.category_ids) <= MAX_CATEGORIES:
                self.category_ids.setdefault(annotation.category_id)
        if time.monotonic() >= self._pause_at:
            time.sleep(PAUSE_S)
            self._pause_at = time.monotonic() + WORK_S

    def by_image(self, head: CocoHead) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the indices of the annotations by image, and the end of each image in them."""
        indices = {image_id: index for index, image_id in enumerate(head.images)}
        image_of = np.frombuffer(array("q", (indices[one] for one in self._image_ids)), dtype=np.int64)
        counts = np.bincount(image_of, minlength=len(indices))
        return np.argsort(image_of, kind="stable"), np.cumsum(counts)


def _packed(index: int, row: Annotation) -> bytes:
    """Returns what an evaluation needs of an annotation as JSON: bytes are nothing to the garbage collector."""
    reason = None if row.reason is None else str(row.reason)
    values: list[Any] = [index, row.id, row.category_id, row.box_xywh, row.iscrowd, row.raw.get("segmentation")]
    return json.dumps([*values, reason], separators=(",", ":")).encode()


def _is_report_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -MAX_ID <= value < MAX_ID


def _is_measured(row: Annotation) -> bool:
    return row.problem is None and not row.iscrowd and has_segmentation(row.raw)
