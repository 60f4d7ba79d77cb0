"""The commands `mal-client convert` (other box formats and forms to COCO) and `export` (masks to other formats)."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mal_client.cli.common import (
    EXIT_SOME_FAILED,
    LISTED,
    Commands,
    add_command,
    add_dataset_options,
    add_outside_option,
    add_polygon_tolerance,
    failures_message,
    make_image_files,
    print_error,
    print_line,
    refuse_outputs_over_inputs,
)
from mal_train.core.coco.parquet_schema import is_parquet
from mal_train.core.coco.parquet_writer import ROW_GROUP_BOXES
from mal_train.core.console import LINE_EVERY_S, Console
from mal_train.core.errors import ConfigError

ROWS_PER_LOOK: Final = 4096
"""Rows between two looks at the clock."""

if TYPE_CHECKING:
    from mal_client.formats.boxes import ConversionResult, RowError


def add_convert(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    convert = add_command(
        commands,
        "convert",
        "write a COCO file, in JSON or parquet, from another form or from boxes in CSV, YOLO or Pascal VOC",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument(
        "--from",
        dest="source_format",
        choices=["csv", "yolo", "voc", "coco"],
        required=True,
        help="format of the boxes",
    )
    convert.add_argument(
        "--labels",
        type=Path,
        required=True,
        metavar="PATH",
        help="csv: the file; yolo: folder of the text files; voc: folder of the XML files; coco: the JSON or parquet "
        "file, or the folder of the parquet parts",
    )
    convert.add_argument("--images", type=Path, metavar="DIR", help="csv, yolo and voc, required: folder of the images")
    add_outside_option(convert)
    convert.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="COCO file to write: parquet if its name ends in .parquet, else JSON",
    )
    convert.add_argument(
        "--row-group-boxes",
        type=int,
        metavar="N",
        help="coco to parquet: boxes after which a row group ends; label --shard splits a file by row groups (default: "
        "65536)",
    )
    convert.add_argument(
        "--columns",
        default="",
        metavar="A,B,...",
        help="csv: names of the columns of a file without a header (default: the first row is the header)",
    )
    convert.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="yolo, required: class names, one per line or in a data.yaml",
    )
    convert.add_argument(
        "--zero-based",
        action="store_true",
        help="voc: corners are coordinates that start at 0 (default: indices of pixels that start at 1)",
    )


def add_export(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    export = add_command(commands, "export", "write the masks of a labeled COCO file for labelme, YOLO or FiftyOne")
    export.set_defaults(run=_export)
    export.add_argument("--to", choices=["labelme", "yolo-seg", "fiftyone"], required=True, help="format of the output")
    add_dataset_options(export, "COCO file with masks")
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write the files to")
    add_polygon_tolerance(export)
    export.add_argument(
        "--shape",
        choices=["polygon", "mask"],
        default="polygon",
        help="labelme: polygon, editable outlines; mask, the pixels (default: %(default)s)",
    )


def _convert(arguments: argparse.Namespace) -> int:
    from mal_client.formats.boxes import write_result  # noqa: PLC0415 - imports OpenCV, which other commands do not need

    _refuse_options_of_other_formats(arguments)
    if arguments.source_format == "coco":
        return _convert_coco(arguments)
    result = _read_boxes(arguments)
    errors_file = write_result(result, arguments.output)
    images, classes = len(result.coco["images"]), len(result.coco["categories"])
    print_line(f"{arguments.output}: {result.boxes} boxes of {classes} classes on {images} images")
    if errors_file is None:
        return 0
    _print_errors(result.errors)
    print_error(failures_message(len(result.errors), errors_file))
    return EXIT_SOME_FAILED


def _read_boxes(arguments: argparse.Namespace) -> ConversionResult:
    from mal_client.formats import (  # noqa: PLC0415 - as above
        boxes,
        csv_boxes,
        pascal_voc,
        yolo_boxes,
    )

    refuse_outputs_over_inputs([arguments.labels, arguments.names], [arguments.output])
    if arguments.images is None:
        raise ConfigError(f"--images: missing; --from {arguments.source_format} reads the sizes of the images")
    images_dir: Path = arguments.images
    if not images_dir.is_dir():
        raise ConfigError(f"--images {images_dir}: no such folder; give the folder of the images")
    files = make_image_files(arguments)
    if arguments.source_format == "csv":
        columns = [name for name in arguments.columns.split(",") if name]
        return boxes.to_coco(csv_boxes.read_csv(arguments.labels, columns), files)
    file_names = boxes.image_names(images_dir)
    if arguments.source_format == "voc":
        rows = pascal_voc.read_voc(arguments.labels, file_names, zero_based=arguments.zero_based)
        return boxes.to_coco(rows, files, file_names=file_names)
    if arguments.names is None:
        raise ConfigError("--names: missing; YOLO files number the classes, so give the file with their names")
    names = yolo_boxes.read_names(arguments.names)
    rows = yolo_boxes.read_yolo(arguments.labels, file_names, names, arguments.names)
    return boxes.to_coco(rows, files, names, file_names)


def _convert_coco(arguments: argparse.Namespace) -> int:
    from mal_train.core.coco.stream import copy_coco  # noqa: PLC0415 - as above

    refuse_outputs_over_inputs([arguments.labels], [arguments.output])
    if arguments.images is not None:
        raise ConfigError("--images: --from coco reads no images; omit it")
    if arguments.row_group_boxes is not None and not is_parquet(arguments.output):
        raise ConfigError(f"--row-group-boxes: {arguments.output} is not parquet; omit it")
    progress = _RowProgress()
    copy_coco(
        arguments.labels,
        arguments.output,
        row_group_boxes=ROW_GROUP_BOXES if arguments.row_group_boxes is None else arguments.row_group_boxes,
        on_rows=progress,
    )
    print_line(f"{arguments.output}: {progress.rows} images and annotations")
    return 0


class _RowProgress:
    """Prints the number of rows that were read, every few seconds. A JSON file does not state how many it has."""

    def __init__(self) -> None:
        self.rows = 0
        self._console = Console()
        self._printed_at = time.monotonic()

    def __call__(self, rows: int) -> None:
        self.rows = rows
        if rows % ROWS_PER_LOOK == 0 and time.monotonic() - self._printed_at >= LINE_EVERY_S:
            self._printed_at = time.monotonic()
            self._console.print(f"convert: {rows} images and annotations read")


def _refuse_options_of_other_formats(arguments: argparse.Namespace) -> None:
    format_of = {"--columns": "csv", "--names": "yolo", "--zero-based": "voc", "--row-group-boxes": "coco"}
    for option, source_format in format_of.items():
        if getattr(arguments, option[2:].replace("-", "_")) and source_format != arguments.source_format:
            raise ConfigError(f"{option}: applies to --from {source_format}, not {arguments.source_format}; omit it")


def _export(arguments: argparse.Namespace) -> int:
    from mal_client.formats.fiftyone_coco import write_fiftyone  # noqa: PLC0415 - as above
    from mal_client.formats.labelme import Shape, write_labelme  # noqa: PLC0415
    from mal_client.formats.masks import MaskFile  # noqa: PLC0415
    from mal_client.formats.yolo_seg import write_yolo  # noqa: PLC0415

    if not arguments.polygon_tolerance >= 0:
        raise ConfigError(f"--polygon-tolerance {arguments.polygon_tolerance}: expected 0 px or more")
    files = make_image_files(arguments)
    if arguments.to != "labelme" and not files.is_folder:
        raise ConfigError(f"--image-glob: {arguments.to} locates images by folder; give the folder with --images")
    masks = MaskFile(arguments.annotations, arguments.polygon_tolerance)
    if arguments.to == "labelme":
        write_labelme(masks, files, arguments.output, Shape(arguments.shape))
    elif arguments.to == "fiftyone":
        write_fiftyone(masks, arguments.output)
    else:
        write_yolo(masks, Path(arguments.images), arguments.output)
    summary = masks.summary
    crowds = f", {summary.crowds} crowd regions omitted" if summary.crowds else ""
    print_line(f"{arguments.output}: {summary.written} masks{crowds}, {len(summary.errors)} failed")
    _print_errors(summary.errors)
    return EXIT_SOME_FAILED if summary.errors else 0


def _print_errors(errors: Sequence[RowError]) -> None:
    for reason, count in Counter(error.reason for error in errors).most_common():
        print_error(f"mal-client: {reason}: {count} omitted")
    for error in errors[:LISTED]:
        print_error(f"  {error.message}")
