"""`mal-client evaluate`: figures to the terminal, to a JSON file, to a page with the worst masks."""

from __future__ import annotations

import argparse
from pathlib import Path

from mal_client.cli.common import (
    SOME_FAILED,
    Commands,
    add_connection,
    add_data,
    add_options,
    add_verb,
    client_of,
    options_of,
)
from mal_client.client import Client
from mal_client.dataset.progress import ProgressDisplay
from mal_client.types import Evaluation, LabelOptions
from mal_train.core.atomic_io import check_writable
from mal_train.core.errors import ConfigError

MAX_WORST = 10_000
"""Most instances that a server lists."""


def add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    evaluate = add_verb(commands, "evaluate", "measure the server's masks against those of a COCO file")
    evaluate.set_defaults(run=_evaluate, goes_on=lambda arguments: arguments.resume is not None)
    add_connection(evaluate)
    add_data(evaluate, "COCO file with the true masks")
    evaluate.add_argument(
        "--on-server",
        action="store_true",
        help="IN.json and DIR are FOLDER/PATH in the server's data_folders, and no image is sent",
    )
    evaluate.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep what was measured there and go on from it after a break"
    )
    evaluate.add_argument("--output", type=Path, metavar="FIGURES.json", help="also write the figures as JSON")
    evaluate.add_argument("--report", type=Path, metavar="PAGE.html", help="also write one page with the worst masks")
    evaluate.add_argument("--worst", type=_count, default=24, metavar="N", help="pictures in the report (default 24)")
    add_options(evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    options = options_of(arguments)
    if arguments.on_server and arguments.report is not None:
        raise ConfigError("--report: the pictures of a data set on the server are not here; leave it out")
    for path in filter(None, (arguments.output, arguments.report)):
        check_writable(path)
    with client_of(arguments) as client:
        with ProgressDisplay("evaluate") as display:
            evaluation = _measured(client, arguments, options, display)
        if arguments.report is not None:
            _write_report(client, arguments, evaluation, options)
    print(evaluation.table())
    if arguments.output is not None:
        # Imported here, as below: what only one command needs, the others do not wait for.
        from mal_train.core.coco.output import write_json_atomic  # noqa: PLC0415

        write_json_atomic(arguments.output, evaluation.to_dict())
        print(f"figures: {arguments.output}")
    return SOME_FAILED if evaluation.failed_count else 0


def _measured(
    client: Client, arguments: argparse.Namespace, options: LabelOptions, display: ProgressDisplay
) -> Evaluation:
    if arguments.on_server:
        return client.evaluate_on_server(
            str(arguments.annotations),
            str(arguments.images),
            options,
            worst_count=MAX_WORST,
            on_progress=display,
            on_notice=display.notice,
            resume=arguments.resume,
        )
    return client.evaluate(
        arguments.annotations,
        arguments.images,
        options,
        worst_count=MAX_WORST,
        on_progress=display,
        on_notice=display.notice,
        resume=arguments.resume,
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: a whole number, 0 or more, is needed")
    return int(text)


def _write_report(client: Client, arguments: argparse.Namespace, evaluation: Evaluation, options: LabelOptions) -> None:
    from mal_client.evaluation.report_page import evaluation_sections  # noqa: PLC0415
    from mal_client.review.pages import worst_cards  # noqa: PLC0415
    from mal_train.core.atomic_io import write_text  # noqa: PLC0415
    from mal_train.core.coco.annotations import read_coco  # noqa: PLC0415
    from mal_train.core.report.page import build_report  # noqa: PLC0415

    cards = worst_cards(
        client, evaluation, read_coco(arguments.annotations), arguments.images, options, count=arguments.worst
    )
    subtitle = f"{arguments.annotations.name} on {arguments.server}"
    page = build_report("Evaluation", evaluation_sections(evaluation, cards), subtitle)
    write_text(arguments.report, page)
    print(f"report: {arguments.report}")
