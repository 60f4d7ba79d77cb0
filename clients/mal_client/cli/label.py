"""`mal-client label` and `merge`: a COCO file through the servers, whole or in parts, with a display of progress."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from mal_client.cli.common import (
    SOME_FAILED,
    Commands,
    add_connection,
    add_data,
    add_options,
    add_verb,
    clients_of,
    listed_in,
    options_of,
)
from mal_client.dataset.progress import JsonLog, ProgressDisplay
from mal_client.dataset.shards import Shard
from mal_client.types import DatasetOptions, DatasetResult, RowFilter
from mal_train.core.errors import ConfigError
from mal_train.core.settings import MaskFormat

LISTED = 5


def add_label(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    label = add_verb(commands, "label", "give every box of a COCO file its mask")
    label.set_defaults(run=_label, goes_on=lambda _: True)
    add_connection(label, several=True)
    add_data(label)
    label.add_argument("--output", type=Path, required=True, metavar="OUT.json", help="the COCO file with masks")
    _add_selection(label)
    label.add_argument(
        "--restart",
        action="store_true",
        help="throw away the answers of an unfinished run; by default it goes on where it ended",
    )
    _add_form(label)
    label.add_argument(
        "--shard",
        metavar="PART/PARTS",
        help="label this part of the images alone (0/16 to 15/16) into a ledger beside OUT.json, which all processes "
        "see; mal-client merge writes the file when all parts are done",
    )
    label.add_argument("--log", choices=["text", "json"], default="text", help="progress as text or as JSON lines")
    add_options(label)


def add_merge(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    merge = add_verb(
        commands, "merge", "join the parts that label --shard has labeled; needs neither server nor images"
    )
    merge.set_defaults(run=_merge)
    merge.add_argument("--annotations", type=Path, required=True, metavar="IN.json", help="as the parts were given it")
    merge.add_argument("--output", type=Path, required=True, metavar="OUT.json", help="as the parts were given it")
    merge.add_argument("--shards", type=int, required=True, metavar="PARTS", help="how many parts there are")
    _add_selection(merge)
    _add_form(merge)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        choices=[str(only) for only in RowFilter if only is not RowFilter.ALL],
        help="label only annotations without a mask, those that were flagged, or those of --ids, and copy the others; "
        "by default all masks are made anew, and the old ones stay in the input file alone",
    )
    parser.add_argument(
        "--ids", type=Path, metavar="FILE", help='annotation ids, one a line as JSON (7 or "7"), for --only ids'
    )


def _add_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--update-bbox", action="store_true", help="set each box to the tight box of its mask")
    parser.add_argument(
        "--format",
        choices=[str(name) for name in MaskFormat],
        default=str(MaskFormat.RLE),
        help="rle: run lengths as pycocotools writes them; uncompressed: as lists of numbers; polygons: COCO polygons, "
        "holes joined to their outline by bridges of no width; png: rle, and a picture of each mask in OUT.masks "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--polygon-tolerance",
        type=float,
        default=0.0,
        metavar="PX",
        help="how far polygons may run beside the mask's edge, to have fewer points (default: exact)",
    )


def _label(arguments: argparse.Namespace) -> int:
    from mal_client.dataset.run import label_dataset  # noqa: PLC0415 - brings OpenCV, which `info` need not wait for

    how = _how(arguments)
    shard = None if arguments.shard is None else Shard.parse(arguments.shard)
    if shard is not None and how != replace(DatasetOptions(how.only, how.ids), restart=how.restart):
        raise ConfigError("--format, --polygon-tolerance and --update-bbox: give them to mal-client merge")
    display = JsonLog() if arguments.log == "json" else ProgressDisplay("label")
    with clients_of(arguments) as clients, display:
        result = label_dataset(
            clients,
            arguments.annotations,
            arguments.images,
            arguments.output,
            options_of(arguments),
            dataset_options=how,
            shard=shard,
            on_progress=display,
            on_notice=display.notice,
        )
    if isinstance(display, JsonLog):
        display.result(result)
    elif shard is not None:
        print(f"part {shard}: {result.labeled} annotations labeled, {result.failed_count} failed")
        _print_unfinished(result)
    else:
        _print_result(result)
    return SOME_FAILED if result.failed_count else 0


def _merge(arguments: argparse.Namespace) -> int:
    from mal_client.dataset.merge import merge_shards  # noqa: PLC0415 - as above

    if arguments.shards < 1:
        raise ConfigError(f"--shards {arguments.shards}: a number of parts is needed")
    result = merge_shards(arguments.annotations, arguments.output, arguments.shards, _how(arguments))
    _print_result(result)
    return SOME_FAILED if result.failed_count else 0


def _how(arguments: argparse.Namespace) -> DatasetOptions:
    only = RowFilter.ALL if arguments.only is None else RowFilter(arguments.only)
    if (only is RowFilter.IDS) != (arguments.ids is not None):
        raise ConfigError("--only ids and --ids FILE belong together; give both or neither")
    ids = frozenset() if arguments.ids is None else _read_ids(arguments.ids)
    return DatasetOptions(
        only,
        ids,
        update_bbox=arguments.update_bbox,
        restart=getattr(arguments, "restart", False),
        mask_format=MaskFormat(arguments.format),
        polygon_tolerance_px=arguments.polygon_tolerance,
    )


def _read_ids(path: Path) -> frozenset[int | float | str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ids {path}: cannot be read ({error}); a file with an id on each line is needed") from None
    ids = frozenset(_read_id(path, line.strip()) for line in lines if line.strip())
    if not ids:
        raise ConfigError(f"--ids {path}: holds no id; one on each line is needed")
    return ids


def _read_id(path: Path, line: str) -> int | float | str:
    try:
        value = json.loads(line)
    except ValueError:
        # A bare word can only be meant as a string.
        return line
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f'--ids {path}: {line} is no annotation id; a number or a string, for example 7 or "7"')
    return value


def _print_result(result: DatasetResult) -> None:
    copied = f", {result.copied} copied" if result.copied else ""
    print(f"{result.output}: {result.labeled} annotations labeled{copied}, {result.failed_count} failed")
    for row in result.failed[:LISTED]:
        print(f"  {row.error}", file=sys.stderr)
    if result.errors_file is not None:
        print(listed_in(result.failed_count, result.errors_file), file=sys.stderr)
    if result.masks_dir is not None:
        print(f"masks: {result.masks_dir}")
    _print_unfinished(result)


def _print_unfinished(result: DatasetResult) -> None:
    if not result.is_final:
        print("mal-client: run the same command again to label what is missing", file=sys.stderr)
