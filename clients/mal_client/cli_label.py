"""`mal-client label`: a COCO file through the servers, with a display of how far it is."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mal_client.arguments import (
    SOME_FAILED,
    Commands,
    add_connection,
    add_data,
    add_options,
    add_verb,
    clients_of,
    options_of,
)
from mal_client.progress import JsonLog, ProgressDisplay
from mal_client.types import DatasetOptions, DatasetResult, MaskFormat, Only
from mal_train.errors import ConfigError

LISTED = 5


def add_label(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    label = add_verb(commands, "label", "give every box of a COCO file its mask")
    label.set_defaults(run=_label)
    add_connection(label, several=True)
    add_data(label)
    label.add_argument("--output", type=Path, required=True, metavar="OUT.json", help="the COCO file with masks")
    label.add_argument(
        "--only",
        choices=[str(only) for only in Only if only is not Only.ALL],
        help="label only annotations without a mask, those that were flagged, or those of --ids, and copy the others; "
        "by default all masks are made anew, and the old ones stay in the input file alone",
    )
    label.add_argument(
        "--ids", type=Path, metavar="FILE", help='annotation ids, one a line as JSON (7 or "7"), for --only ids'
    )
    label.add_argument("--update-bbox", action="store_true", help="set each box to the tight box of its mask")
    label.add_argument(
        "--restart",
        action="store_true",
        help="throw away the answers of an unfinished run; by default it goes on where it ended",
    )
    label.add_argument(
        "--format",
        choices=[str(name) for name in MaskFormat],
        default=str(MaskFormat.RLE),
        help="run lengths compressed as pycocotools writes them, or as lists of numbers (default %(default)s)",
    )
    label.add_argument("--log", choices=["text", "json"], default="text", help="progress as text or as JSON lines")
    add_options(label)


def _label(arguments: argparse.Namespace) -> int:
    from mal_client.dataset import label_dataset  # noqa: PLC0415 - brings OpenCV, which `info` need not wait for

    how = _how(arguments)
    display = JsonLog() if arguments.log == "json" else ProgressDisplay("label")
    with clients_of(arguments) as clients, display:
        result = label_dataset(
            clients,
            arguments.annotations,
            arguments.images,
            arguments.output,
            options_of(arguments),
            how=how,
            on_progress=display,
            on_notice=display.notice,
        )
    if isinstance(display, JsonLog):
        display.result(result)
    else:
        _print_result(result)
    return SOME_FAILED if result.failed else 0


def _how(arguments: argparse.Namespace) -> DatasetOptions:
    only = Only.ALL if arguments.only is None else Only(arguments.only)
    if (only is Only.IDS) != (arguments.ids is not None):
        raise ConfigError("--only ids and --ids FILE belong together; give both or neither")
    ids = frozenset() if arguments.ids is None else _read_ids(arguments.ids)
    return DatasetOptions(
        only,
        ids,
        update_bbox=arguments.update_bbox,
        restart=arguments.restart,
        mask_format=MaskFormat(arguments.format),
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
    print(f"{result.output}: {result.labelled} annotations labelled{copied}, {result.failed_count} failed")
    for row in result.failed[:LISTED]:
        print(f"  {row.error}", file=sys.stderr)
    if result.errors_file is not None:
        print(f"mal-client: all {result.failed_count} failures are listed in {result.errors_file}", file=sys.stderr)
    if not result.is_final:
        print("mal-client: run the same command again to label what is missing", file=sys.stderr)
