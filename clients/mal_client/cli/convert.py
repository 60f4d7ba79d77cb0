"""`mal-client convert` and `export`: boxes of other formats into a COCO file, masks of a labeled file out of it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.cli.common import SOME_FAILED, Commands, add_data, add_verb, listed_in
from mal_train.core.errors import ConfigError

if TYPE_CHECKING:
    from mal_client.formats.boxes import ConversionResult, RowError

LISTED = 5


def add_convert(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    convert = add_verb(commands, "convert", "make a COCO file of a folder of images and boxes in CSV, YOLO or VOC")
    convert.set_defaults(run=_convert)
    convert.add_argument(
        "--from", dest="form", choices=["csv", "yolo", "voc"], required=True, help="what the boxes are"
    )
    convert.add_argument(
        "--labels", type=Path, required=True, metavar="PATH", help="the CSV file, or the folder of text or XML files"
    )
    convert.add_argument("--images", type=Path, required=True, metavar="DIR", help="the pictures")
    convert.add_argument("--output", type=Path, required=True, metavar="OUT.json", help="the COCO file")
    convert.add_argument(
        "--columns", default="", metavar="A,B,...", help="names of the columns of a CSV file without a header"
    )
    convert.add_argument("--names", type=Path, metavar="FILE", help="YOLO: class names, one a line, or a data.yaml")
    convert.add_argument(
        "--zero-based", action="store_true", help="VOC: corners are coordinates from 0, not pixels counted from 1"
    )


def add_export(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    export = add_verb(commands, "export", "write the masks of a labeled COCO file for labelme, YOLO or FiftyOne")
    export.set_defaults(run=_export)
    export.add_argument("--to", choices=["labelme", "yolo-seg", "fiftyone"], required=True, help="the format")
    add_data(export, "COCO file with masks")
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the files go")
    export.add_argument(
        "--polygon-tolerance",
        type=float,
        default=0.0,
        metavar="PX",
        help="how far polygons may run beside the mask's edge, to have fewer points (default: exact)",
    )
    export.add_argument(
        "--shape",
        choices=["polygon", "mask"],
        default="polygon",
        help="labelme: lines to be edited, or the pixels (default %(default)s)",
    )


def _convert(arguments: argparse.Namespace) -> int:
    from mal_client.formats.boxes import write_converted  # noqa: PLC0415 - brings OpenCV, for which others need not wait

    converted = _converted(arguments)
    listed = write_converted(converted, arguments.output)
    images, classes = len(converted.coco["images"]), len(converted.coco["categories"])
    print(f"{arguments.output}: {converted.boxes} boxes of {classes} classes on {images} images")
    if listed is None:
        return 0
    _print_faults(converted.faults)
    print(listed_in(len(converted.faults), listed), file=sys.stderr)
    return SOME_FAILED


def _converted(arguments: argparse.Namespace) -> ConversionResult:
    from mal_client.formats import (  # noqa: PLC0415 - as above
        boxes,
        csv_boxes,
        pascal_voc,
        yolo_boxes,
    )

    _refuse_foreign_options(arguments)
    images: Path = arguments.images
    if not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder; give the one with the pictures")
    if arguments.form == "csv":
        columns = [name for name in arguments.columns.split(",") if name]
        return boxes.to_coco(csv_boxes.read_csv(arguments.labels, columns), images)
    pictures = boxes.picture_names(images)
    if arguments.form == "voc":
        rows = pascal_voc.read_voc(arguments.labels, pictures, zero_based=arguments.zero_based)
        return boxes.to_coco(rows, images, pictures=pictures)
    if arguments.names is None:
        raise ConfigError("--names: YOLO files hold numbers for classes; give their names")
    names = yolo_boxes.read_names(arguments.names)
    rows = yolo_boxes.read_yolo(arguments.labels, pictures, names, arguments.names)
    return boxes.to_coco(rows, images, names, pictures)


def _refuse_foreign_options(arguments: argparse.Namespace) -> None:
    meant_for = {"--columns": "csv", "--names": "yolo", "--zero-based": "voc"}
    for option, form in meant_for.items():
        if getattr(arguments, option[2:].replace("-", "_")) and form != arguments.form:
            raise ConfigError(f"{option}: has no meaning for --from {arguments.form}, it is for {form}; leave it out")


def _export(arguments: argparse.Namespace) -> int:
    from mal_client.formats.fiftyone_coco import write_fiftyone  # noqa: PLC0415 - as above
    from mal_client.formats.labelme import Shape, write_labelme  # noqa: PLC0415
    from mal_client.formats.masks import MaskFile  # noqa: PLC0415
    from mal_client.formats.yolo_seg import write_yolo  # noqa: PLC0415
    from mal_client.images.image_files import ImageFiles  # noqa: PLC0415

    if not arguments.polygon_tolerance >= 0:
        raise ConfigError(f"--polygon-tolerance {arguments.polygon_tolerance}: it must be 0 px or more")
    pictures = ImageFiles(arguments.images)
    if arguments.to != "labelme" and not pictures.is_folder:
        raise ConfigError(f"--image-glob: {arguments.to} finds pictures by their folder; give that with --images")
    masks = MaskFile(arguments.annotations, arguments.polygon_tolerance)
    if arguments.to == "labelme":
        write_labelme(masks, pictures, arguments.output, Shape(arguments.shape))
    elif arguments.to == "fiftyone":
        write_fiftyone(masks, arguments.output)
    else:
        write_yolo(masks, Path(arguments.images), arguments.output)
    export = masks.export
    crowds = f", {export.crowds} crowd regions left out" if export.crowds else ""
    print(f"{arguments.output}: {export.written} masks{crowds}, {len(export.faults)} failed")
    _print_faults(export.faults)
    return SOME_FAILED if export.faults else 0


def _print_faults(faults: Sequence[RowError]) -> None:
    for reason, count in Counter(fault.reason for fault in faults).most_common():
        print(f"mal-client: {count} not taken over: {reason}", file=sys.stderr)
    for fault in faults[:LISTED]:
        print(f"  {fault.message}", file=sys.stderr)
