"""The command `mal-client evaluate`: prints metrics, and writes them as JSON and as a page with the worst masks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mal_client.cli.common import (
    EXIT_SOME_FAILED,
    Commands,
    add_command,
    add_connection_options,
    add_dataset_options,
    add_label_options,
    make_client,
    make_image_files,
    make_label_options,
    print_line,
    refuse_outputs_over_inputs,
)
from mal_client.client import Client
from mal_client.dataset.progress import ProgressDisplay
from mal_client.types import Evaluation, LabelOptions
from mal_train.core.atomic_io import check_writable
from mal_train.core.errors import ConfigError

MAX_WORST = 10_000
"""Largest number of worst instances that a server returns."""


def add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    evaluate = add_command(commands, "evaluate", "compare the server's masks with the masks of a COCO file")
    evaluate.set_defaults(run=_evaluate, can_resume=lambda arguments: arguments.resume is not None)
    add_connection_options(evaluate)
    add_dataset_options(evaluate, "COCO file with the true masks")
    evaluate.add_argument(
        "--on-server",
        action="store_true",
        help="read the dataset on the server: IN.json and DIR are FOLDER/PATH in its data_folders, and no image is "
        "sent (default: send the images)",
    )
    evaluate.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="save the progress to FILE, and continue from it if it exists (default: start from the beginning)",
    )
    evaluate.add_argument(
        "--output", type=Path, metavar="METRICS.json", help="also write the metrics as JSON (default: not written)"
    )
    evaluate.add_argument(
        "--report",
        type=Path,
        metavar="PAGE.html",
        help="also write an HTML page with the worst masks (default: not written)",
    )
    evaluate.add_argument(
        "--worst",
        type=_count,
        default=24,
        metavar="N",
        help="number of masks on the page of --report; 0 or more (default: %(default)d)",
    )
    add_label_options(evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    options = make_label_options(arguments)
    if arguments.on_server and arguments.report is not None:
        raise ConfigError("--report: needs the images, which --on-server leaves on the server; omit one of them")
    if not arguments.on_server:
        refuse_outputs_over_inputs([arguments.annotations], [arguments.output, arguments.report])
    for path in filter(None, (arguments.output, arguments.report)):
        check_writable(path)
    with make_client(arguments) as client:
        with ProgressDisplay("evaluate") as display:
            evaluation = _run(client, arguments, options, display)
        if arguments.report is not None:
            _write_report(client, arguments, evaluation, options)
    for line in evaluation.table().split("\n"):
        print_line(line)
    if arguments.output is not None:
        # Imported here, as below: the other commands do not need it and start faster without it.
        from mal_train.core.coco.output import write_json_atomic  # noqa: PLC0415

        write_json_atomic(arguments.output, evaluation.to_dict())
        print_line(f"metrics: {arguments.output}")
    return EXIT_SOME_FAILED if evaluation.failed_count else 0


def _run(client: Client, arguments: argparse.Namespace, options: LabelOptions, display: ProgressDisplay) -> Evaluation:
    shared: dict[str, Any] = {
        "worst_count": MAX_WORST,
        "on_progress": display,
        "on_notice": display.notice,
        "resume": arguments.resume,
    }
    if arguments.on_server:
        return client.evaluate_on_server(str(arguments.annotations), str(arguments.images), options, **shared)
    return client.evaluate(arguments.annotations, make_image_files(arguments), options, **shared)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}; expected an integer, 0 or more")
    return int(text)


def _write_report(client: Client, arguments: argparse.Namespace, evaluation: Evaluation, options: LabelOptions) -> None:
    from mal_client.evaluation.report_page import evaluation_sections  # noqa: PLC0415
    from mal_client.review.pages import worst_cards  # noqa: PLC0415
    from mal_train.core.atomic_io import write_text  # noqa: PLC0415
    from mal_train.core.coco.annotations import read_coco  # noqa: PLC0415
    from mal_train.core.report.page import build_report  # noqa: PLC0415

    cards = worst_cards(
        client,
        evaluation,
        read_coco(arguments.annotations),
        make_image_files(arguments),
        options,
        count=arguments.worst,
    )
    subtitle = f"{arguments.annotations.name} on {arguments.server}"
    page = build_report("Evaluation", evaluation_sections(evaluation, cards), subtitle)
    write_text(arguments.report, page)
    print_line(f"report: {arguments.report}")
