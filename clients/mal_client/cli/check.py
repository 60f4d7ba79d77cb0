"""The command `mal-client check`: reports the problems of a dataset without contacting a server."""

from __future__ import annotations

import argparse

from mal_client.cli.common import (
    EXIT_SOME_FAILED,
    Commands,
    add_command,
    add_dataset_options,
    add_row_rules,
    location,
    make_image_files,
    print_line,
    print_outputs,
    refuse_outputs_over_inputs,
    row_rules,
)
from mal_client.dataset.progress import ProgressDisplay
from mal_client.types import Progress
from mal_train.core.coco.members import annotation_file
from mal_train.core.errors import InputError
from mal_train.core.storage.addresses import redact
from mal_train.core.storage.writing import staged_outputs


def add_check(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    check = add_command(commands, "check", "report the problems of a dataset; needs no server")
    check.set_defaults(run=_check)
    add_dataset_options(check)
    add_row_rules(check)
    check.add_argument(
        "--output", type=location, metavar="REPORT.json", help="also write the issues as JSON (default: not written)"
    )
    check.add_argument(
        "--report",
        type=location,
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
    from mal_train.core.atomic_io import write_text  # noqa: PLC0415
    from mal_train.core.coco.output import write_json_atomic  # noqa: PLC0415
    from mal_train.core.report.page import build_report  # noqa: PLC0415

    refuse_outputs_over_inputs([arguments.annotations], [arguments.output, arguments.report])
    with staged_outputs(arguments.report) as (page,):
        # Left before the page is made, whose failure must not take the issues with it.
        with (
            staged_outputs(arguments.output) as (output,),
            annotation_file(arguments.annotations) as annotations,
            ProgressDisplay("check", counts_boxes=False) as display,
        ):
            report = check_dataset(
                annotations,
                make_image_files(arguments, annotations),
                decode=not arguments.headers_only,
                rules=row_rules(arguments),
                on_image=lambda done, total: display(Progress(done, total, 0, 0)),
            )
            report.file = arguments.annotations
            if output is not None:
                write_json_atomic(output, report.to_dict())
        for line in report.lines():
            print_line(line)
        if page is not None:
            write_text(page, build_report("Dataset", report.sections(), redact(arguments.annotations)))
    print_outputs({"issues": arguments.output, "report": arguments.report})
    if report.count(Severity.FATAL):
        return InputError.exit_code
    return EXIT_SOME_FAILED if report.count(Severity.ERROR) else 0
