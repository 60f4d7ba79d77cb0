"""Reads a COCO file below the server's data folders as the images of an evaluation. Knows nothing of gRPC."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mal_server.errors import InvalidRequest, ResumeTokenStale
from mal_server.evaluation.resume_tokens import GroundTruth, ItemFailure
from mal_server.evaluation.run import REQUEST_REFUSED
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.inference.image_store import FileImage
from mal_server.inference.requests import LabelRequest
from mal_train.core.coco.annotations import Annotation, CocoFile, ImageInfo, JsonId, by_image, read_coco
from mal_train.core.errors import BadDataset
from mal_train.core.masks.geometry import Box

MAX_FILE_BYTES = 512 * 1024 * 1024
"""Largest annotation file; its rows stay in memory while the evaluation runs."""

MEMORY_OF_A_BYTE = 13
"""Bytes of memory for each byte of an annotation file, while it is read: 6.1 with run lengths, 7.4 with polygons, 11.5
with triangles of small integers and no spaces."""

MakeRequest = Callable[[FileImage, tuple[int, int] | None, tuple[int, ...], tuple[Box, ...]], LabelRequest]
"""(image, its width and height, ids, boxes) → the request that labels them."""


@dataclass(frozen=True)
class Dataset:
    """A COCO file and the folder of its images.

    Attributes:
        coco: the content of the file.
        folder: name of the data folder of its images.
        image_dir: path of the images below that folder; "" = the folder itself.
    """

    coco: CocoFile
    folder: str
    image_dir: str

    @property
    def category_names(self) -> Mapping[JsonId, str]:
        """Names by the ids of the report: those of the file if all are integers, else numbers from 1."""
        ids = self._category_ids()
        return {ids[key]: name for key, name in self.coco.category_names.items()}

    def check_records(self, records: Mapping[str, bytes]) -> None:
        """Raises ResumeTokenStale for records of images that are not in the data set."""
        unknown = set(records) - {image.file_name for image, _ in by_image(self.coco)}
        if unknown:
            raise ResumeTokenStale(
                f"{len(unknown)} of {len(records)} records belong to images that are not in the data set, for example "
                f"{min(unknown)!r}; start the evaluation again without records"
            )

    def ground_truths(
        self, make_request: MakeRequest, max_boxes: int, records: Mapping[str, bytes]
    ) -> Iterator[GroundTruth]:
        """Yields the images that have objects, in the order of the file.

        Args:
            make_request: makes the request that labels an image.
            max_boxes: limit of boxes of one image.
            records: sealed records by file name.
        """
        category_ids = self._category_ids()
        has_integer_ids = all(isinstance(row.id, int) for row in self.coco.annotations)
        ids = {id(row): row.id if has_integer_ids else index for index, row in enumerate(self.coco.annotations)}
        for image_index, (image, rows) in enumerate(by_image(self.coco)):
            numbered = tuple(
                replace(
                    row,
                    id=ids[id(row)],
                    image_id=image_index,
                    category_id=None if row.category_id is None else category_ids.get(row.category_id, row.category_id),
                )
                for row in rows
            )
            yield self._ground_truth(image, numbered, make_request, max_boxes, records.get(image.file_name, b""))

    def _ground_truth(
        self, image: ImageInfo, rows: tuple[Annotation, ...], make_request: MakeRequest, max_boxes: int, record: bytes
    ) -> GroundTruth:
        measured = {row.id: row for row in rows if _is_measured(row)}
        if len(measured) > max_boxes:
            message = f"{len(measured)} boxes; max_boxes is {max_boxes}"
            return GroundTruth(image.file_name, rows, None, ItemFailure(REQUEST_REFUSED, message))
        path = str(PurePosixPath(self.image_dir) / image.file_name) if self.image_dir else image.file_name
        ids = tuple(key for key in measured if isinstance(key, int))
        boxes = tuple(row.box_xywh for row in measured.values())
        request = make_request(FileImage(self.folder, path), image.size_wh, ids, boxes)
        return GroundTruth(image.file_name, rows, request, None, record)

    def _category_ids(self) -> dict[JsonId, JsonId]:
        ids = list(self.coco.category_names)
        if all(isinstance(value, int) for value in ids):
            return {value: value for value in ids}
        return {value: number for number, value in enumerate(ids, start=1)}


def memory_of(folders: AllowedDirs, annotations: str) -> int:
    """Estimates the bytes of memory that a data set takes while it is read. Blocks on the disk.

    Raises:
        InvalidRequest: a malformed path, or a file above MAX_FILE_BYTES.
        NoSuchFile: the folder or the file does not exist.
    """
    return MEMORY_OF_A_BYTE * _checked_size(_annotations_path(folders, annotations))


def read_dataset(folders: AllowedDirs, annotations: str, images: str) -> Dataset:
    """Reads a COCO file. Blocks for seconds on large files; call it in a thread.

    Args:
        folders: data folders of the server.
        annotations: FOLDER/PATH of the file.
        images: FOLDER/PATH or FOLDER of its images.

    Raises:
        InvalidRequest: a malformed path, or a file that is not a usable COCO file.
        NoSuchFile: a folder or file does not exist.
    """
    path = _annotations_path(folders, annotations)
    image_folder, _, image_dir = images.partition("/")
    folders.path(image_folder, image_dir, "options.dataset.images")
    _checked_size(path)
    try:
        coco = read_coco(path)
    except BadDataset as error:
        # Clients know the file by FOLDER/PATH and must not learn where the folder is.
        problem = str(error).replace(str(path), annotations)
        raise InvalidRequest([("options.dataset.annotations", problem)]) from None
    return Dataset(coco, image_folder, image_dir)


def _annotations_path(folders: AllowedDirs, annotations: str) -> Path:
    folder, _, relative_path = annotations.partition("/")
    return folders.path(folder, relative_path, "options.dataset.annotations")


def _checked_size(path: Path) -> int:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise InvalidRequest([("options.dataset.annotations", f"{size} bytes; at most {MAX_FILE_BYTES}")])
    return size


def _is_measured(row: Annotation) -> bool:
    return row.problem is None and not row.iscrowd and bool(row.raw.get("segmentation"))
