"""`mal-client check`: what a data set is like, before any server sees it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.cli.common import SOME_FAILED, Commands, add_data, add_verb
from mal_client.dataset.progress import ProgressDisplay
from mal_client.types import Progress

if TYPE_CHECKING:
    from mal_client.dataset_check.report import CheckReport

REFUSED = 2


def add_check(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    check = add_verb(commands, "check", "look for faults of a data set; needs no server")
    check.set_defaults(run=_check)
    add_data(check)
    check.add_argument("--output", type=Path, metavar="REPORT.json", help="also write the findings as JSON")
    check.add_argument("--report", type=Path, metavar="PAGE.html", help="also write one page with histograms")
    check.add_argument(
        "--headers-only", action="store_true", help="do not decode pixels: much faster, misses files that are cut off"
    )


def _check(arguments: argparse.Namespace) -> int:
    # Imported here, as below: what only this verb needs, the others do not wait for.
    from mal_client.dataset_check.check import check_dataset  # noqa: PLC0415
    from mal_client.dataset_check.report import Severity  # noqa: PLC0415

    with ProgressDisplay("check", counts_boxes=False) as display:
        report = check_dataset(
            arguments.annotations,
            arguments.images,
            decode=not arguments.headers_only,
            on_image=lambda done, total: display(Progress(done, total, 0, 0)),
        )
    print("\n".join(report.lines()))
    _write(report, arguments)
    if report.count(Severity.FATAL):
        return REFUSED
    return SOME_FAILED if report.count(Severity.ERROR) else 0


def _write(report: CheckReport, arguments: argparse.Namespace) -> None:
    from mal_train.core.atomic_io import write_text  # noqa: PLC0415
    from mal_train.core.coco.output import write_json_atomic  # noqa: PLC0415
    from mal_train.core.report.page import build_report  # noqa: PLC0415

    if arguments.output is not None:
        write_json_atomic(arguments.output, report.to_dict())
        print(f"findings: {arguments.output}")
    if arguments.report is not None:
        write_text(arguments.report, build_report("Data set", report.sections(), str(arguments.annotations)))
        print(f"report: {arguments.report}")
