"""The command `mal-client convert`: other box formats and forms to COCO."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mal_client.cli.common import (
    EXIT_SOME_FAILED,
    Commands,
    add_command,
    add_outside_option,
    failures_message,
    local_path,
    location,
    make_image_files,
    print_error,
    print_errors,
    print_line,
    refuse_outputs_over_inputs,
)
from mal_client.formats.row_forms import Corners, Units, YoloRows
from mal_train.core.coco.json_file import errors_path
from mal_train.core.coco.members import annotation_file
from mal_train.core.coco.parquet_reader import ParquetDataset, refuse_hidden_parts
from mal_train.core.coco.parquet_schema import is_parquet
from mal_train.core.coco.parquet_writer import ROW_GROUP_BOXES
from mal_train.core.console import LINE_EVERY_S, Console
from mal_train.core.errors import BadDataset, ConfigError
from mal_train.core.numbers import counted
from mal_train.core.settings import BoxForm, RotatedBoxes
from mal_train.core.storage.addresses import Location, base_name, is_remote, redact, sibling
from mal_train.core.storage.listing import local_folder
from mal_train.core.storage.reading import local_copy
from mal_train.core.storage.writing import staged_output

ROWS_PER_LOOK: Final = 4096
"""Rows between two looks at the clock."""

_OPTIONS: Final[dict[str, tuple[tuple[str, ...], dict[str, Any]]]] = {
    "--row-group-boxes": (
        ("coco",),
        {
            "type": int,
            "metavar": "N",
            "help": "for parquet, boxes after which a row group ends; label --shard splits a file by row groups "
            "(default: 65536)",
        },
    ),
    "--box-form": (
        ("coco",),
        {
            "choices": [str(form) for form in BoxForm],
            "help": "what bbox holds: xywh, x, y, width, height in px; corners, x_min, y_min, x_max, y_max in px; "
            "shares, x, y, width, height as shares of the image (default: xywh)",
        },
    ),
    "--columns": (
        ("csv",),
        {
            "default": "",
            "metavar": "A,B,...",
            "help": "names of the columns of a file without a header (default: the first row is the header)",
        },
    ),
    "--names": (
        ("yolo", "csv"),
        {
            "type": local_path,
            "metavar": "FILE",
            "help": "names of classes that are numbers, one per line or in a data.yaml (default of yolo: data.yaml, or "
            "classes.txt, in the folder of the labels or above); csv: or Open Images' class-descriptions CSV",
        },
    ),
    "--units": (
        ("csv",),
        {
            "choices": [str(unit) for unit in Units],
            "default": str(Units.AUTO),
            "help": "unit of the numbers; auto, as Open Images' header or the first row with a share or a number "
            "above 1 shows (default: %(default)s)",
        },
    ),
    "--rows": (
        ("yolo",),
        {
            "choices": [str(rows) for rows in YoloRows],
            "default": str(YoloRows.AUTO),
            "help": "kind of the rows; auto, key points if the data.yaml has kpt_shape, else boxes and outlines by the "
            "count of numbers (default: %(default)s)",
        },
    ),
    "--rotated-boxes": (
        ("yolo", "voc", "dota", "cvat"),
        {
            "choices": [str(choice) for choice in RotatedBoxes],
            "default": str(RotatedBoxes.REFUSE),
            "help": "list rotated boxes as errors, or take the upright box around each (default: %(default)s)",
        },
    ),
    "--corners": (
        ("voc",),
        {
            "choices": [str(corners) for corners in Corners],
            "help": "what the corners are: indices, of pixels from 1, both inclusive; from-0, coordinates in px, as "
            "CVAT writes them; from-1, coordinates plus 1, as Roboflow writes them (default: indices, and a line that "
            "says so)",
        },
    ),
    "--image-set": (
        ("voc",),
        {
            "type": local_path,
            "metavar": "FILE",
            "help": "convert only the images that a file of ImageSets lists",
        },
    ),
    "--encoding": (
        ("csv", "yolo", "voc", "dota", "labelme"),
        {
            "metavar": "NAME",
            "help": "encoding of text without a byte order mark (default: UTF-8; voc: as declared)",
        },
    ),
}
"""Formats to which an option applies, and its arguments for the parser."""

_SUFFIXES: Final = {"voc": ".xml", "yolo": ".txt", "dota": ".txt", "labelme": ".json"}
"""Suffix of the annotation files of the formats that have one for each image."""

_OF_IMAGES: Final = ("BAD_IMAGE", "IMAGE_SIZE_MISMATCH")
"""Reasons of errors that another folder of images may remove."""

if TYPE_CHECKING:
    from mal_client.formats.boxes import ConversionResult, Row, RowError
    from mal_client.formats.class_names import ClassNames
    from mal_client.formats.label_files import ImageNames
    from mal_client.images.image_files import ImageFiles


def add_convert(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    convert = add_command(
        commands,
        "convert",
        "write a COCO file, in JSON or parquet, from another form, from boxes in CSV, YOLO, Pascal VOC or DOTA, or "
        "from masks and boxes of labelme, Label Studio or CVAT",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument(
        "--from",
        dest="source_format",
        choices=["csv", "yolo", "voc", "dota", "labelme", "label-studio", "cvat", "coco"],
        required=True,
        help="format of the boxes",
    )
    convert.add_argument(
        "--labels",
        type=location,
        required=True,
        metavar="PATH",
        help="csv: the file; yolo, dota, voc, labelme: folder of the text, XML or JSON files; label-studio: the JSON "
        "export; cvat: the export CVAT for images 1.1 (XML) or COCO 1.0 (JSON); coco: the JSON or parquet file, or the "
        "folder of the parquet parts; or the address of one of them (s3://…)",
    )
    convert.add_argument(
        "--images",
        type=location,
        metavar="DIR",
        help="required, except for coco: folder of the images, or its address (s3://…)",
    )
    add_outside_option(convert, takes_patterns=False)
    convert.add_argument(
        "--output",
        type=location,
        required=True,
        metavar="OUT",
        help="COCO file to write: parquet if its name ends in .parquet, else JSON",
    )
    for option, (formats, given) in _OPTIONS.items():
        convert.add_argument(option, **{**given, "help": f"{', '.join(formats)}: {given['help']}"})


def _convert(arguments: argparse.Namespace) -> int:
    from mal_client.formats.boxes import write_result  # noqa: PLC0415 - imports OpenCV, which other commands do not need

    _refuse_options_of_other_formats(arguments)
    refuse_outputs_over_inputs([arguments.labels, arguments.names, arguments.image_set], [arguments.output])
    if arguments.source_format == "coco":
        return _convert_coco(arguments)
    errors_name = errors_path(Path(base_name(arguments.output))).name
    with staged_output(arguments.output, [errors_name]) as output:
        refuse_hidden_parts(arguments.output)
        result = _read_boxes(arguments)
        write_result(result, output)
    images, classes = counted(len(result.coco["images"]), "image"), counted(len(result.coco["categories"]), "class")
    print_line(f"{redact(arguments.output)}: {counted(result.boxes, 'box')} of {classes} on {images}")
    return _print_failures(result.errors, arguments.output, errors_name, arguments.images)


def _print_failures(
    errors: Sequence[RowError], output: Location, errors_name: str, images: Location | None = None
) -> int:
    """Prints the first errors, their folder of images if it may be the cause, and where all are; returns the code."""
    if not errors:
        return 0
    print_errors(errors)
    if images is not None and any(error.reason in _OF_IMAGES for error in errors):
        _print_notice(f"images were looked for in {redact(images)}; --images gives another folder")
    print_error(failures_message(len(errors), sibling(output, errors_name)))
    return EXIT_SOME_FAILED


def _read_boxes(arguments: argparse.Namespace) -> ConversionResult:
    """Reads boxes of another format. Raises BadDataset if there are none, and no errors either."""
    from mal_client.formats.boxes import image_names, to_coco  # noqa: PLC0415 - as above
    from mal_client.formats.label_files import MAX_LABEL_BYTES, ImageNames, suffixes  # noqa: PLC0415

    if arguments.images is None:
        raise ConfigError(f"--images: missing; --from {arguments.source_format} reads the sizes of the images")
    if not is_remote(arguments.images) and not Path(arguments.images).is_dir():
        raise ConfigError(f"--images {arguments.images}: no such folder; give the folder of the images")
    files = make_image_files(arguments)
    if arguments.source_format == "csv":
        result = _read_table(arguments, files)
    elif arguments.source_format in ("label-studio", "cvat"):
        with local_copy(arguments.labels) as export:
            rows = _read_export(arguments, export, ImageNames(image_names(files)))
            result = to_coco(rows, files, rotated=RotatedBoxes(arguments.rotated_boxes))
    else:
        suffix = _SUFFIXES[arguments.source_format]
        with local_folder(arguments.labels, suffixes(suffix), MAX_LABEL_BYTES) as folder:
            rows, images, categories = _read_files(arguments, folder, ImageNames(image_names(files)))
            result = to_coco(rows, files, categories, images.names, RotatedBoxes(arguments.rotated_boxes))
    if (note := files.respelling_note()) is not None:
        _print_notice(note)
    if not result.boxes and not result.errors:
        empty = counted(len(result.coco["images"]), "image")
        raise BadDataset(f"{redact(arguments.labels)}: contains no box ({empty} without annotations)")
    if result.undescribed:
        count, suffix = counted(len(result.undescribed), "image"), _SUFFIXES[arguments.source_format]
        _print_notice(
            f"{count} without a {suffix} file converted as without boxes, first {result.undescribed[0]!r}; if they "
            "show objects, add the files or remove the images"
        )
    return result


def _read_files(
    arguments: argparse.Namespace, folder: Path, images: ImageNames
) -> tuple[Iterator[Row], ImageNames, Sequence[str]]:
    """Returns the rows of the annotation files of a folder, the images that belong to it, and the known classes."""
    from mal_client.formats import dota, image_sets, labelme_shapes, pascal_voc, yolo_boxes  # noqa: PLC0415 - as above

    encoding = arguments.encoding
    if arguments.source_format == "dota":
        return dota.read_dota(folder, images, encoding), images, ()
    if arguments.source_format == "labelme":
        return labelme_shapes.read_labelme(folder, images, encoding), images, ()
    if arguments.source_format == "yolo":
        classes = _class_names(arguments) or _found_class_names(arguments)
        if not classes.names:
            raise ConfigError(f"--names {classes.path}: names identifiers; YOLO files number the classes")
        rows = yolo_boxes.read_yolo(folder, images, classes, YoloRows(arguments.rows), encoding)
        return rows, images, classes.names
    listed = None if arguments.image_set is None else image_sets.ImageSet(arguments.image_set, encoding)
    if listed is not None:
        images = listed.select(images)
        flagged = f", {listed.left_out} left out by the flag -1" if listed.left_out else ""
        print_line(f"{arguments.image_set}: {counted(len(images.names), 'image')}{flagged}")
    corners = None if arguments.corners is None else Corners(arguments.corners)
    rows = pascal_voc.read_voc(
        folder, images, corners=corners, image_set=listed, encoding=encoding, on_notice=_print_notice
    )
    return rows, images, ()


def _read_export(arguments: argparse.Namespace, export: Path, images: ImageNames) -> Iterator[Row]:
    from mal_client.formats import cvat, label_studio  # noqa: PLC0415 - as above

    if arguments.source_format == "cvat":
        return cvat.read_cvat(export, images, RotatedBoxes(arguments.rotated_boxes), base_name(arguments.labels))
    return label_studio.read_label_studio(export, images, base_name(arguments.labels))


def _read_table(arguments: argparse.Namespace, files: ImageFiles) -> ConversionResult:
    from mal_client.formats.boxes import to_coco  # noqa: PLC0415 - as above
    from mal_client.formats.csv_boxes import CsvTable  # noqa: PLC0415
    from mal_client.formats.label_files import ImageNames  # noqa: PLC0415

    classes = _class_names(arguments)
    images = cache(lambda: ImageNames(files.names()))  # listed only for a table of names without suffix
    with local_copy(arguments.labels) as path:
        table = CsvTable(
            path,
            [name for name in arguments.columns.split(",") if name],
            classes,
            Units(arguments.units),
            arguments.encoding,
            find_image=lambda name: images().find(name),
            on_notice=_print_notice,
        )
        return to_coco(table.rows(), files, [] if classes is None else classes.names)


def _class_names(arguments: argparse.Namespace) -> ClassNames | None:
    from mal_client.formats.class_names import read_class_names  # noqa: PLC0415 - as above

    return None if arguments.names is None else read_class_names(arguments.names, arguments.encoding)


def _found_class_names(arguments: argparse.Namespace) -> ClassNames:
    """Returns the class names that lie beside the labels. Raises ConfigError if there are none."""
    from mal_client.formats.class_names import NAMES_FILES, find_names_file, read_class_names  # noqa: PLC0415 - as above

    found = None if is_remote(arguments.labels) else find_names_file(Path(arguments.labels))
    if found is None:
        raise ConfigError(
            "--names: YOLO files number the classes; give the list of their names "
            f"(no {' or '.join(NAMES_FILES)} in {redact(arguments.labels)} or above)"
        )
    _print_notice(f"class names are those of {found}; --names gives others")
    return read_class_names(found, arguments.encoding)


def _print_notice(text: str) -> None:
    print_error(f"mal-client: {text}")


def _convert_coco(arguments: argparse.Namespace) -> int:
    from mal_client.formats.boxes import write_errors  # noqa: PLC0415 - as above
    from mal_train.core.coco.stream import copy_coco  # noqa: PLC0415

    if arguments.images is not None:
        raise ConfigError("--images: --from coco reads no images; omit it")
    if arguments.row_group_boxes is not None and not is_parquet(arguments.output):
        raise ConfigError(f"--row-group-boxes: {redact(arguments.output)} is not parquet; omit it")
    progress = _RowProgress()
    form = BoxForm(arguments.box_form or BoxForm.XYWH)
    errors: list[RowError] = []
    errors_name = errors_path(Path(base_name(arguments.output))).name
    with annotation_file(arguments.labels) as labels, staged_output(arguments.output, [errors_name]) as output:
        refuse_hidden_parts(arguments.output)
        name = base_name(arguments.labels)
        copy_coco(
            labels,
            output,
            change=None if form is BoxForm.XYWH else _box_converter(labels, name, form, errors),
            row_group_boxes=ROW_GROUP_BOXES if arguments.row_group_boxes is None else arguments.row_group_boxes,
            on_rows=progress.read,
            on_written=progress.written,
        )
        write_errors(errors, output)
        groups = f", {counted(len(ParquetDataset(output).row_groups), 'row group')}" if is_parquet(output) else ""
    print_line(f"{redact(arguments.output)}: {progress.text}{groups}")
    return _print_failures(errors, arguments.output, errors_name)


def _box_converter(
    labels: Location, name: str, form: BoxForm, errors: list[RowError]
) -> Callable[[int, Any], dict[str, Any] | None]:
    """Returns the function that gives a row of a file its box in COCO's form; a row of another form is an error."""
    from mal_client.formats.boxes import RowError  # noqa: PLC0415 - as above
    from mal_train.core.coco.box_form import Misfit, to_xywh  # noqa: PLC0415
    from mal_train.core.coco.stream import scan_coco  # noqa: PLC0415

    images = scan_coco(labels, lambda _index, _row: None, allow_repeated_ids=True).images

    def convert(index: int, row: Any) -> dict[str, Any] | None:
        converted = to_xywh(row, index, form, images)
        if not isinstance(converted, Misfit):
            return converted
        where = f"{name}:{converted.name}"
        errors.append(RowError(where, str(converted.reason), f"{where}: {converted.problem}"))
        return None

    return convert


class _RowProgress:
    """Prints how many rows were read and written, every few seconds. A JSON file does not state how many it has."""

    def __init__(self) -> None:
        self._images = self._annotations = 0
        self._console = Console()
        self._printed_at = time.monotonic()

    @property
    def text(self) -> str:
        """The numbers of images and annotations that were read."""
        return f"{counted(self._images, 'image')}, {counted(self._annotations, 'annotation')}"

    def read(self, images: int, annotations: int) -> None:
        """Receives the numbers of images and of annotations that were read."""
        self._images, self._annotations = images, annotations
        if (images + annotations) % ROWS_PER_LOOK == 0:
            self._print(f"{self.text} read")

    def written(self, annotations: int) -> None:
        """Receives the number of annotations that were written after all were read."""
        self._print(f"{self.text} read, {counted(annotations, 'annotation')} written")

    def _print(self, text: str) -> None:
        if time.monotonic() - self._printed_at >= LINE_EVERY_S:
            self._printed_at = time.monotonic()
            self._console.print(f"convert: {text}")


def _refuse_options_of_other_formats(arguments: argparse.Namespace) -> None:
    for option, (formats, given) in _OPTIONS.items():
        value = getattr(arguments, option[2:].replace("-", "_"))
        if value not in (None, given.get("default")) and arguments.source_format not in formats:
            of = " or ".join(formats)
            raise ConfigError(f"{option}: applies to --from {of}, not {arguments.source_format}; omit it")
    if arguments.encoding is not None:
        try:
            "a".encode(arguments.encoding).decode(arguments.encoding)
        except (LookupError, UnicodeError):
            raise ConfigError(f"--encoding {arguments.encoding}: no such encoding; give one such as gbk") from None
