"""The commands `mal-client label` (masks for a COCO file or one shard of it) and `merge` (joins the shards)."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Final

from mal_client.cli.common import (
    EXIT_SOME_FAILED,
    LISTED,
    Commands,
    add_command,
    add_connection_options,
    add_dataset_options,
    add_label_options,
    add_polygon_tolerance,
    add_row_rules,
    failures_message,
    local_path,
    location,
    make_clients,
    make_image_files,
    make_label_options,
    print_error,
    print_line,
    refuse_outputs_over_inputs,
    row_rules,
)
from mal_client.dataset.progress import JsonLog, ProgressDisplay
from mal_client.dataset.shards import Shard
from mal_client.types import DatasetOptions, DatasetResult, RowFilter
from mal_train.core.atomic_io import remedy_of
from mal_train.core.coco.members import annotation_file
from mal_train.core.coco.parquet_reader import refuse_hidden_parts
from mal_train.core.coco.parquet_schema import is_parquet
from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.input_files import cause_of, open_text
from mal_train.core.numbers import counted
from mal_train.core.settings import MaskFormat
from mal_train.core.storage.addresses import Location, base_name, is_remote, join, redact
from mal_train.core.storage.writing import StagedOutput, check_writable, refuse_same_location

RESUME_HINT: Final = "run the same command again to label the missing annotations"


def add_label(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    label = add_command(commands, "label", "add a mask to every box of a COCO file")
    label.set_defaults(run=_label, can_resume=lambda _: True)
    add_connection_options(label, allow_several=True)
    add_dataset_options(label)
    _add_output(label, "COCO file with masks to write, or its address (s3://…)")
    _add_selection(label)
    label.add_argument(
        "--restart",
        action="store_true",
        help="discard the results of an unfinished run (default: resume it)",
    )
    _add_format(label)
    label.add_argument(
        "--shard",
        metavar="INDEX/COUNT",
        help="label only this shard of the images (0/16 to 15/16 for 16 shards) into a journal beside OUT.json, on a "
        "file system that all processes share; mal-client merge then writes OUT.json. From parquet to parquet, label "
        "only these row groups, and write them to a part in the folder OUT.parquet (default: all images)",
    )
    label.add_argument(
        "--log",
        choices=["text", "json"],
        default="text",
        help="format of the progress on stderr (default: %(default)s)",
    )
    add_label_options(label)


def add_merge(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    merge = add_command(commands, "merge", "join the shards of label --shard; needs neither server nor images")
    merge.set_defaults(run=_merge)
    merge.add_argument(
        "--annotations", type=location, required=True, metavar="IN.json", help="COCO file with boxes, as for the shards"
    )
    _add_output(merge, "COCO file with masks to write, as for the shards")
    merge.add_argument("--shards", type=int, required=True, metavar="COUNT", help="number of shards, 1 or more")
    _add_selection(merge)
    _add_format(merge)


def _add_output(parser: argparse.ArgumentParser, content: str) -> None:
    parser.add_argument("--output", type=location, required=True, metavar="OUT.json", help=content)
    parser.add_argument(
        "--work-dir",
        type=local_path,
        metavar="DIR",
        help="local folder for the journal and the files of a remote --output until they are uploaded, created if "
        "missing; required with it, and the same when the command is run again (default: the folder of OUT.json)",
    )


def _staged_output(arguments: argparse.Namespace) -> StagedOutput:
    """Returns the output, and the local place in which it is prepared."""
    output, work_dir = arguments.output, arguments.work_dir
    if not is_remote(output):
        if work_dir is not None:
            raise ConfigError("--work-dir: for a remote --output only; the journal of a local one lies beside it")
        return StagedOutput(output, output)
    if work_dir is None:
        raise ConfigError(
            f"--output {redact(output)}: needs --work-dir DIR, a local folder for the journal, from which an "
            "interrupted run resumes"
        )
    from mal_client.dataset.output import masks_dir  # noqa: PLC0415 - as above
    from mal_train.core.coco.json_file import errors_path  # noqa: PLC0415 - as above

    path = work_dir / base_name(output)
    sides = [errors_path(path).name, *([masks_dir(path).name] if arguments.format == MaskFormat.PNG else [])]
    refuse_same_location(arguments.annotations, output)
    check_writable(output)
    refuse_hidden_parts(output)
    _make_folder(work_dir, "--work-dir")
    return StagedOutput(output, path, sides)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        choices=[str(only) for only in RowFilter if only is not RowFilter.ALL],
        help="label only annotations without a mask (missing), with a flag (flagged) or listed by --ids (ids), and "
        "copy the others; failed annotations count as missing and as flagged (default: label all and copy no mask)",
    )
    parser.add_argument(
        "--ids",
        type=Path,
        metavar="FILE",
        help='for --only ids: annotation IDs, one per line as JSON (7 or "7")',
    )
    parser.add_argument(
        "--boxes",
        type=local_path,
        metavar="RESULTS.json",
        help="COCO results list of a detector, [{image_id, category_id, bbox, score}], whose boxes take the place of "
        "the annotations; their score stays, and that of the mask is mask_score (default: the annotations)",
    )
    add_row_rules(parser)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--update-bbox",
        action="store_true",
        help="replace each box by the tight box of its mask (default: keep the boxes)",
    )
    parser.add_argument(
        "--format",
        choices=[str(name) for name in MaskFormat],
        default=str(MaskFormat.RLE),
        help="rle: compressed run lengths as in pycocotools; uncompressed: run lengths as a list; polygons: COCO "
        "polygons, with each hole joined to its outline by a bridge of zero width; png: rle, and an image file of each "
        "mask in the folder OUT.masks (default: %(default)s)",
    )
    add_polygon_tolerance(parser)


def _label(arguments: argparse.Namespace) -> int:
    from mal_client.dataset.run import label_dataset  # noqa: PLC0415 - imports OpenCV, which `info` does not need

    options = _dataset_options(arguments)
    shard = None if arguments.shard is None else Shard.parse(arguments.shard)
    is_share = is_parquet(arguments.annotations) and is_parquet(arguments.output) and options.boxes is None
    writes_part = shard is not None and is_share
    if shard is not None and writes_part:
        arguments.output = _part(arguments, shard)
    elif shard is not None and _is_written_otherwise(options):
        raise ConfigError("--format, --polygon-tolerance, --update-bbox: not for shards; give them to mal-client merge")
    refuse_outputs_over_inputs([options.boxes], [arguments.output])
    output = _staged_output(arguments)
    display = JsonLog() if arguments.log == "json" else ProgressDisplay("label")
    with annotation_file(arguments.annotations) as annotations, make_clients(arguments) as clients, display:
        result = label_dataset(
            clients,
            annotations,
            make_image_files(arguments, annotations),
            output.path,
            make_label_options(arguments),
            dataset_options=options,
            shard=shard,
            publish=output.publish,
            published=output.address,
            on_progress=display,
            on_notice=display.notice,
        )
    if isinstance(display, JsonLog):
        display.result(result, output.shown)
    elif shard is not None and not writes_part:
        print_line(f"shard {shard}: {counted(result.labeled, 'annotation')} labeled, {result.failed_count} failed")
        _print_unfinished(result)
    else:
        _print_result(result, output, options.only)
    return _exit_code(result, is_shard=shard is not None)


def _is_written_otherwise(options: DatasetOptions) -> bool:
    """Returns True for options that change how the masks of a job are written, and not which."""
    selection = replace(DatasetOptions(options.only, options.ids), restart=options.restart, rules=options.rules)
    return options != replace(selection, boxes=options.boxes)


def _part(arguments: argparse.Namespace, shard: Shard) -> Location:
    """Returns the part of a shard in the folder of --output, which is created, or below its prefix."""
    folder: Location = arguments.output
    refuse_outputs_over_inputs([arguments.annotations], [folder])
    if isinstance(folder, Path):
        _make_folder(folder, "--output")
    return join(folder, shard.part_name)


def _make_folder(folder: Path, option: str) -> None:
    """Creates the folder of an option unless it exists. Raises OutputError if it cannot be made."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{option} {folder}: cannot be made a folder ({error.strerror}); {remedy_of(error)}"
        ) from error


def _merge(arguments: argparse.Namespace) -> int:
    from mal_client.dataset.merge import merge_shards  # noqa: PLC0415 - as above

    if is_parquet(arguments.annotations) and is_parquet(arguments.output):
        raise ConfigError(
            f"merge: shards from parquet to parquet need no merge; the parts in {redact(arguments.output)} are one file"
        )
    if arguments.shards < 1:
        raise ConfigError(f"--shards {arguments.shards}: expected 1 or more")
    output = _staged_output(arguments)
    options = _dataset_options(arguments)
    with annotation_file(arguments.annotations) as annotations:
        result = merge_shards(annotations, output.path, arguments.shards, options, publish=output.publish)
    _print_result(result, output, options.only)
    return _exit_code(result)


def _dataset_options(arguments: argparse.Namespace) -> DatasetOptions:
    only = RowFilter.ALL if arguments.only is None else RowFilter(arguments.only)
    if (only is RowFilter.IDS) != (arguments.ids is not None):
        raise ConfigError("--only ids, --ids FILE: one needs the other; give both or neither")
    ids = frozenset() if arguments.ids is None else _read_ids(arguments.ids)
    return DatasetOptions(
        only,
        ids,
        update_bbox=arguments.update_bbox,
        restart=getattr(arguments, "restart", False),
        mask_format=MaskFormat(arguments.format),
        polygon_tolerance_px=arguments.polygon_tolerance,
        rules=row_rules(arguments),
        boxes=arguments.boxes,
    )


def _read_ids(path: Path) -> frozenset[int | float | str]:
    try:
        with open_text(path) as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--ids {path}: cannot be read ({cause_of(error)}); give a file with one ID per line"
        ) from None
    ids = frozenset(_read_id(path, line) for line in lines if line)
    if not ids:
        raise ConfigError(f"--ids {path}: contains no ID; give one per line")
    return ids


def _read_id(path: Path, line: str) -> int | float | str:
    try:
        value = json.loads(line)
    except ValueError:
        # A line that is not JSON can only be a string without its quotation marks.
        return line
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f'--ids {path}: {line}; expected a number or a string, for example 7 or "7"')
    return value


_UNSELECTED: Final = {
    RowFilter.MISSING: "none lacks a mask; omit --only to label all again",
    RowFilter.FLAGGED: "none has a flag or failed before; --only missing labels those without a mask",
}
"""Reason for which a filter selects no annotation of a file, and the remedy."""


def _exit_code(result: DatasetResult, *, is_shard: bool = False) -> int:
    """Returns the exit code; a shard, unlike a file, may have nothing to label."""
    has_no_work = result.labels_nothing_but_crowds or (result.is_empty and not is_shard)
    return EXIT_SOME_FAILED if result.failed_count or has_no_work else 0


def _print_result(result: DatasetResult, output: StagedOutput, only: RowFilter) -> None:
    crowds = f" ({result.crowds} CROWD)" if result.crowds else ""
    copied = f", {result.copied} copied{crowds}" if result.copied else ""
    print_line(
        f"{output.shown(result.output)}: {counted(result.labeled, 'annotation')} labeled{copied}, "
        f"{result.failed_count} failed"
    )
    if result.flags:
        print_line("flags: " + ", ".join(f"{count} {name}" for name, count in result.flags.items()))
    if result.is_empty:
        print_error(
            "mal-client: no annotation was labeled: there is none; give a file with boxes, or the results list of a "
            "detector: --boxes results.json"
        )
    if result.labels_nothing_but_crowds:
        print_error(
            f"mal-client: no annotation was labeled: all {result.crowds} are CROWD (iscrowd 1), which are "
            "copied; if each is one object, as in files of CVAT, give --crowd-as-objects"
        )
    elif result.is_final and only in _UNSELECTED and not (result.labeled or result.failed_count or result.is_empty):
        print_error(f"mal-client: no annotation was labeled: {_UNSELECTED[only]}")
    # All boxes of an unreadable image have the same message.
    for message in list(dict.fromkeys(str(row.error) for row in result.failed))[:LISTED]:
        print_error(f"  {message}")
    if result.errors_file is not None:
        print_error(failures_message(result.failed_count, output.shown(result.errors_file)))
    if result.masks_dir is not None:
        print_line(f"masks: {output.shown(result.masks_dir)}")
    _print_unfinished(result)


def _print_unfinished(result: DatasetResult) -> None:
    if not result.is_final:
        print_error(f"mal-client: {RESUME_HINT}")
