"""The command `mal-client check`: reports the problems of a dataset without contacting a server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.cli.common import (
    EXIT_SOME_FAILED,
    Commands,
    add_command,
    add_dataset_options,
    make_image_files,
    print_line,
    refuse_outputs_over_inputs,
)
from mal_client.dataset.progress import ProgressDisplay
from mal_client.types import Progress
from mal_train.core.errors import InputError

if TYPE_CHECKING:
    from mal_client.dataset_check.report import CheckReport


def add_check(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    check = add_command(commands, "check", "report the problems of a dataset; needs no server")
    check.set_defaults(run=_check)
    add_dataset_options(check)
    check.add_argument(
        "--output", type=Path, metavar="REPORT.json", help="also write the issues as JSON (default: not written)"
    )
    check.add_argument(
        "--report",
        type=Path,
        metavar="PAGE.html",
        help="also write an HTML page with the issues and histograms (default: not written)",
    )
    check.add_argument(
        "--headers-only",
        action="store_true",
        help="read only the headers of the images: much faster, but truncated files pass (default: decode all pixels)",
    )


def _check(arguments: argparse.Namespace) -> int:
    # Imported here: the other commands do not need these modules and start faster without them.
    from mal_client.dataset_check.check import check_dataset  # noqa: PLC0415
    from mal_client.dataset_check.report import Severity  # noqa: PLC0415

    refuse_outputs_over_inputs([arguments.annotations], [arguments.output, arguments.report])
    with ProgressDisplay("check", counts_boxes=False) as display:
        report = check_dataset(
            arguments.annotations,
            make_image_files(arguments),
            decode=not arguments.headers_only,
            on_image=lambda done, total: display(Progress(done, total, 0, 0)),
        )
    for line in report.lines():
        print_line(line)
    _write(report, arguments)
    if report.count(Severity.FATAL):
        return InputError.exit_code
    return EXIT_SOME_FAILED if report.count(Severity.ERROR) else 0


def _write(report: CheckReport, arguments: argparse.Namespace) -> None:
    from mal_train.core.atomic_io import write_text  # noqa: PLC0415
    from mal_train.core.coco.output import write_json_atomic  # noqa: PLC0415
    from mal_train.core.report.page import build_report  # noqa: PLC0415

    if arguments.output is not None:
        write_json_atomic(arguments.output, report.to_dict())
        print_line(f"issues: {arguments.output}")
    if arguments.report is not None:
        write_text(arguments.report, build_report("Dataset", report.sections(), str(arguments.annotations)))
        print_line(f"report: {arguments.report}")
