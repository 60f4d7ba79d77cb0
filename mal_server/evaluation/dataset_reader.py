"""A COCO file and its images below the server's data folders, as the images of an evaluation. Knows nothing of gRPC."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mal_server.errors import InvalidRequest, ResumeTokenStale
from mal_server.evaluation.resume_tokens import GroundTruth, ItemFailure
from mal_server.evaluation.run import REFUSED
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.inference.image_store import FileImage
from mal_server.inference.pipeline import LabelRequest
from mal_train.core.coco.annotations import Annotation, CocoFile, ImageInfo, JsonId, by_image, read_coco
from mal_train.core.errors import BadDataset
from mal_train.core.masks.geometry import Box

MAX_FILE_BYTES = 512 * 1024 * 1024
"""Of an annotation file; it is held in memory while its evaluation runs."""

MEMORY_OF_A_BYTE = 13
"""Memory that a file's rows take while it is read, for each byte of it: 6.1 with run lengths, 7.4 with polygons,
11.5 with triangles of small integers and no spaces."""

MakeJob = Callable[[FileImage, tuple[int, int] | None, tuple[int, ...], tuple[Box, ...]], LabelRequest]
"""(picture, width and height, ids, boxes) → what labels them."""


@dataclass(frozen=True)
class Dataset:
    """A COCO file that was read.

    Attributes:
        coco: its content.
        folder: name of the data folder of its images.
        below: the images' folder below that, "" = itself.
    """

    coco: CocoFile
    folder: str
    below: str

    @property
    def category_names(self) -> Mapping[JsonId, str]:
        """By the ids that the answer has: the file's own where all are integers, else places from 1."""
        ids = self._category_ids()
        return {ids[key]: name for key, name in self.coco.category_names.items()}

    def check_records(self, records: Mapping[str, bytes]) -> None:
        """Raises TokenStale where records are of images that the data set has not, or has no more."""
        unknown = set(records) - {image.file_name for image, _ in by_image(self.coco)}
        if unknown:
            raise ResumeTokenStale(
                f"the evaluation cannot go on: {len(unknown)} of {len(records)} records are of images that the data "
                f"set on the server does not have with objects, such as {min(unknown)!r}; begin anew, without records"
            )

    def truths(self, make_job: MakeJob, max_boxes: int, records: Mapping[str, bytes]) -> Iterator[GroundTruth]:
        """The images that have objects, in the order of the file; `records` by file name."""
        category_ids = self._category_ids()
        own_ids = all(isinstance(row.id, int) for row in self.coco.annotations)
        places = {id(row): row.id if own_ids else at for at, row in enumerate(self.coco.annotations)}
        for place, (image, rows) in enumerate(by_image(self.coco)):
            named = tuple(
                replace(
                    row,
                    id=places[id(row)],
                    image_id=place,
                    category_id=None if row.category_id is None else category_ids.get(row.category_id, row.category_id),
                )
                for row in rows
            )
            yield self._truth(image, named, make_job, max_boxes, records.get(image.file_name, b""))

    def _truth(
        self, image: ImageInfo, rows: tuple[Annotation, ...], make_job: MakeJob, max_boxes: int, record: bytes
    ) -> GroundTruth:
        asked = {row.id: row for row in rows if _is_measured(row)}
        if len(asked) > max_boxes:
            message = f"{len(asked)} boxes; the limit max_boxes is {max_boxes}"
            return GroundTruth(image.file_name, rows, None, ItemFailure(REFUSED, message))
        picture = FileImage(
            self.folder, str(PurePosixPath(self.below) / image.file_name) if self.below else image.file_name
        )
        ids = tuple(key for key in asked if isinstance(key, int))
        job = make_job(picture, image.size_wh, ids, tuple(row.box_xywh for row in asked.values()))
        return GroundTruth(image.file_name, rows, job, None, record)

    def _category_ids(self) -> dict[JsonId, JsonId]:
        ids = list(self.coco.category_names)
        if all(isinstance(value, int) for value in ids):
            return {value: value for value in ids}
        return {value: place for place, value in enumerate(ids, start=1)}


def memory_of(folders: AllowedDirs, annotations: str) -> int:
    """Bytes that a data set will take when it is read; for threads.

    Raises:
        RequestRefused: a path that is none, or a file that is too large.
        NoSuchFile: nothing is there.
    """
    return MEMORY_OF_A_BYTE * _size_of(_annotations_path(folders, annotations))


def read_dataset(folders: AllowedDirs, annotations: str, images: str) -> Dataset:
    """Reads the COCO file; for threads.

    Args:
        folders: the server's data folders.
        annotations: FOLDER/PATH of the file.
        images: FOLDER/PATH or FOLDER of its images.

    Raises:
        RequestRefused: a path that is none, or a file that cannot be used as a whole.
        NoSuchFile: nothing is there.
    """
    path = _annotations_path(folders, annotations)
    image_folder, _, image_below = images.partition("/")
    folders.path(image_folder, image_below, "options.dataset.images")
    _size_of(path)
    try:
        coco = read_coco(path)
    except BadDataset as error:
        # The caller knows the file by its name here, not by where the folder lies.
        text = str(error).replace(str(path), annotations)
        raise InvalidRequest([("options.dataset.annotations", text)]) from None
    return Dataset(coco, image_folder, image_below)


def _annotations_path(folders: AllowedDirs, annotations: str) -> Path:
    folder, _, below = annotations.partition("/")
    return folders.path(folder, below, "options.dataset.annotations")


def _size_of(path: Path) -> int:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise InvalidRequest([("options.dataset.annotations", f"{size} bytes; at most {MAX_FILE_BYTES}")])
    return size


def _is_measured(row: Annotation) -> bool:
    return row.problem is None and not row.iscrowd and bool(row.raw.get("segmentation"))
