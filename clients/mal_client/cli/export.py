"""The command `mal-client export`: the masks of a labeled COCO file, in the formats of other tools."""

from __future__ import annotations

import argparse
from pathlib import Path

from mal_client.cli.common import (
    EXIT_SOME_FAILED,
    Commands,
    add_command,
    add_dataset_options,
    add_polygon_tolerance,
    location,
    make_image_files,
    print_error,
    print_errors,
    print_line,
)
from mal_train.core.coco.members import annotation_file
from mal_train.core.errors import ConfigError
from mal_train.core.numbers import counted
from mal_train.core.storage.addresses import is_remote, redact
from mal_train.core.storage.writing import staged_folder


def add_export(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    export = add_command(commands, "export", "write the masks of a labeled COCO file for labelme, YOLO or FiftyOne")
    export.set_defaults(run=_export)
    export.add_argument("--to", choices=["labelme", "yolo-seg", "fiftyone"], required=True, help="format of the output")
    add_dataset_options(export, "COCO file with masks")
    export.add_argument("--output", type=location, required=True, metavar="DIR", help="folder to write the files to")
    add_polygon_tolerance(export)
    export.add_argument(
        "--shape",
        choices=["polygon", "mask"],
        default="polygon",
        help="labelme: polygon, editable outlines; mask, the pixels (default: %(default)s)",
    )


def _export(arguments: argparse.Namespace) -> int:
    from mal_client.formats.fiftyone_coco import write_fiftyone  # noqa: PLC0415 - imports OpenCV, which other commands do not need
    from mal_client.formats.labelme import Shape, write_labelme  # noqa: PLC0415
    from mal_client.formats.masks import MaskFile  # noqa: PLC0415
    from mal_client.formats.yolo_seg import write_yolo  # noqa: PLC0415

    if not arguments.polygon_tolerance >= 0:
        raise ConfigError(f"--polygon-tolerance {arguments.polygon_tolerance}: expected 0 px or more")
    with annotation_file(arguments.annotations) as annotations, staged_folder(arguments.output) as folder:
        files = make_image_files(arguments, annotations)
        if arguments.to != "labelme" and not files.is_folder:
            option = "--images" if files.is_remote else "--image-glob"
            raise ConfigError(f"{option}: {arguments.to} finds images in a local folder; give it with --images")
        masks = MaskFile(annotations, files, arguments.polygon_tolerance)
        if arguments.to == "labelme":
            relative = not is_remote(arguments.output)
            write_labelme(masks, files, folder, Shape(arguments.shape), relative_to_folder=relative)
        elif arguments.to == "fiftyone":
            write_fiftyone(masks, folder)
        else:
            write_yolo(masks, Path(arguments.images), folder)
    summary = masks.summary
    crowds = f", {counted(summary.crowds, 'crowd region')} omitted" if summary.crowds else ""
    print_line(f"{redact(arguments.output)}: {counted(summary.written, 'mask')}{crowds}, {len(summary.errors)} failed")
    print_errors(summary.errors)
    if arguments.to == "yolo-seg" and not is_remote(arguments.output):
        _print_place_of_labels(Path(arguments.images), Path(arguments.output) / "labels")
    if not summary.written and not summary.errors:
        cause = "the file has no annotations; label boxes first"
        if summary.crowds:
            cause = "all are CROWD (iscrowd 1); if each is one object, convert the file first, with convert --from cvat"
        print_error(f"mal-client: no mask was written: {cause}")
    return EXIT_SOME_FAILED if summary.errors or not summary.written else 0


def _print_place_of_labels(images_dir: Path, written: Path) -> None:
    """Prints what to do unless Ultralytics looks for the labels where they were written."""
    from mal_client.formats.yolo_seg import label_folder  # noqa: PLC0415 - as above

    expected = label_folder(images_dir)
    if expected is None:
        print_error(
            f"mal-client: {images_dir}: Ultralytics finds labels for images in a folder named images only; put them in "
            f"{written.parent / 'images'}, and change train and val of data.yaml"
        )
    elif expected != written.resolve():
        print_error(f"mal-client: Ultralytics looks for the labels of {images_dir} in {expected}; move {written} there")
