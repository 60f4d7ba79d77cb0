"""The parquet form of a COCO file: one row an image, with its annotations. Columns, metadata and limits.

A typed column holds a value that fits its type exactly; any other value lies in the column `extra` of its record, as
JSON. `layout` holds the order of the keys and the JSON type of each value, so that the JSON value of a row can be
restored exactly. docs/parquet.md describes the form for users of other tools.

Needs pyarrow, which the extra `parquet` installs.
"""

import importlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mal_train.core.errors import BadDataset, ConfigError
from mal_train.core.storage.addresses import Location, base_name

VERSION: Final = 1
METADATA_KEY: Final = b"mal_coco"
"""Key of the form in the metadata of the file."""
NOTE_KEY: Final = b"mal_job"
"""Key of the note that a job leaves in the metadata of its part, as a JSON object."""

SUFFIX: Final = ".parquet"

MAX_HEAD_BYTES: Final = 64 << 20
"""Limit of the top-level members other than `images` and `annotations`, as JSON. Each part repeats them."""
MAX_FOOTER_BYTES: Final = 256 << 20
"""Limit of the metadata at the end of a file; about 2 kB for each row group."""
MAX_ROW_GROUPS: Final = 1 << 16
"""Limit of the row groups of a file that is written."""
MAX_ROW_BYTES: Final = 512 << 20
"""Limit of the text of one row: an image with its annotations."""
MAX_ROW_ANNOTATIONS: Final = 1 << 23
"""Limit of the annotations of one row."""
MAX_ROW_GROUP_BOXES: Final = 1 << 22
"""Limit of the boxes after which a row group ends."""
MAX_ROW_GROUP_BYTES: Final = 1 << 30
"""Limit of an uncompressed row group, and with it of the memory that reading one takes."""
MAX_ROW_GROUP_ROWS: Final = 1 << 24
"""Limit of the rows, and of the annotations, of a row group."""

IMAGES: Final = "images"
ANNOTATIONS: Final = "annotations"
ID_COLUMNS: Final = {IMAGES: "id", ANNOTATIONS: "annotations.list.element.id"}
"""Column of the ids in each list, whose statistics tell row groups apart."""


@dataclass(frozen=True)
class Head:
    """A COCO file without its images and annotations.

    Attributes:
        members: top-level members in file order; `images` and `annotations` are present with the value None.
        images: number of entries of `images` in the complete file.
        annotations: number of entries of `annotations` in the complete file.
    """

    members: dict[str, Any]
    images: int
    annotations: int

    def to_metadata(self, row_groups: Sequence[int], data_sha256: str) -> bytes:
        """Returns the value of `METADATA_KEY`.

        Args:
            row_groups: number of annotations in each row group of the file.
            data_sha256: SHA-256 of the bytes before the footer, so that the footer identifies the content.

        Raises:
            BadDataset: the members exceed `MAX_HEAD_BYTES`.
        """
        text = json.dumps(
            {
                "version": VERSION,
                "images": self.images,
                "annotations": self.annotations,
                "row_groups": row_groups,
                "data_sha256": data_sha256,
                "members": self.members,
            }
        ).encode("ascii")
        if len(text) > MAX_HEAD_BYTES:
            sizes = {name: len(json.dumps(value)) for name, value in self.members.items()}
            largest = max(sizes, key=lambda name: sizes[name])
            raise BadDataset(
                f"member {largest!r} takes {sizes[largest]} bytes; the members beside images and annotations may take "
                f"{MAX_HEAD_BYTES} bytes in parquet: remove it, or keep the JSON file"
            )
        return text


def is_parquet(path: Location) -> bool:
    """Returns True for the path or address of a file in parquet, or of a folder of such files."""
    return base_name(path).lower().endswith(SUFFIX)


def shard_part_name(index: int, count: int) -> str:
    """Returns the name of the part that a shard writes into the folder of its job.

    >>> shard_part_name(3, 16)
    'part-00003-of-00016.parquet'
    """
    return f"part-{index:05d}-of-{count:05d}{SUFFIX}"


def missing_shard_parts(names: Collection[str]) -> list[str]:
    """Returns the names of the parts that a folder lacks; none if its files are not parts of the shards of one job.

    >>> missing_shard_parts(["part-00000-of-00003.parquet", "part-00002-of-00003.parquet"])
    ['part-00001-of-00003.parquet']
    """
    matches = [re.fullmatch(rf"part-[0-9]+-of-([0-9]{{1,9}}){re.escape(SUFFIX)}", name) for name in names]
    counts = {int(match[1]) if match else 0 for match in matches}
    if len(counts) != 1 or max(counts) > MAX_ROW_GROUPS:
        return []
    return [name for name in (shard_part_name(index, max(counts)) for index in range(max(counts))) if name not in names]


def load_pyarrow() -> tuple[Any, Any]:
    """Returns the modules pyarrow and pyarrow.parquet. Raises ConfigError if pyarrow is not installed."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        raise ConfigError("pyarrow is not installed; run: pip install 'mask-auto-labeler[parquet]'") from None


def arrow_schema() -> Any:
    """Returns the pyarrow schema of the form, without metadata."""
    pa, _ = load_pyarrow()
    return pa.schema([*_image_fields(pa), pa.field(ANNOTATIONS, pa.list_(annotation_type()))])


def annotation_type() -> Any:
    """Returns the pyarrow type of one annotation."""
    pa, _ = load_pyarrow()
    return pa.struct(
        [
            pa.field("index", pa.int64()),
            pa.field("id", pa.int64()),
            pa.field("category_id", pa.int64()),
            pa.field("bbox", pa.list_(pa.float64())),
            pa.field("iscrowd", pa.int8()),
            pa.field("area", pa.float64()),
            pa.field("segmentation", pa.string()),
            pa.field("score", pa.float64()),
            pa.field("agreement", pa.float64()),
            pa.field("flags", pa.list_(pa.string())),
            pa.field("error", _error_type(pa)),
            pa.field("extra", pa.string()),
            pa.field("layout", pa.string()),
        ]
    )


def check_schema(actual: Any, name: str) -> None:
    """Raises BadDataset with the first difference between a file's schema and that of the form."""
    expected = arrow_schema()
    missing = [column for column in expected.names if column not in actual.names]
    if missing:
        raise _other_schema(name, f"has no column {missing[0]!r}")
    for column in expected:
        found = actual.field(column.name).type
        if found != column.type:
            raise _other_schema(name, f"column {column.name!r} is {str(found)[:200]}, not {column.type}")
    unknown = [column for column in actual.names if column not in expected.names]
    if unknown:
        raise _other_schema(name, f"has the unknown column {unknown[0]!r}")


def read_metadata(metadata: Mapping[bytes, bytes] | None, name: str) -> tuple[Head, list[int]]:
    """Returns the head in the metadata of a file, and the number of annotations in each row group.

    Raises:
        BadDataset: the file is not of this form, or of another version.
    """
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise _other_schema(name, f"has no {METADATA_KEY.decode()!r} in its metadata")
    try:
        content = json.loads(text)
        version = content["version"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise _other_schema(name, f"its metadata {METADATA_KEY.decode()!r} cannot be read") from None
    if version != VERSION:
        raise BadDataset(
            f"{name}: version {version!r:.20} of the parquet form; this release reads version {VERSION}: convert it to "
            "JSON with the release that wrote it"
        )
    match content:
        case {
            "members": {"images": None, "annotations": None} as members,
            "images": int(images),
            "annotations": int(annotations),
            "row_groups": list(row_groups),
        } if all(type(count) is int and count >= 0 for count in (images, annotations, *row_groups)):
            return Head(members, images, annotations), row_groups
    raise _other_schema(name, f"its metadata {METADATA_KEY.decode()!r} lacks fields")


def _other_schema(name: str, problem: str) -> BadDataset:
    return BadDataset(
        f"{name}: not a COCO file in parquet: {problem}; give a file that mal-client convert --from coco wrote"
    )


def _image_fields(pa: Any) -> list[Any]:
    return [
        pa.field("index", pa.int64()),
        pa.field("id", pa.int64()),
        pa.field("file_name", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("error", _error_type(pa)),
        pa.field("extra", pa.string()),
        pa.field("layout", pa.string()),
    ]


def _error_type(pa: Any) -> Any:
    return pa.struct([pa.field("reason", pa.string()), pa.field("message", pa.string())])
