"""The command `mal-client evaluate`: prints metrics, and writes them as JSON and as a page with the worst masks."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mal_client.cli.common import (
    EXIT_SOME_FAILED,
    Commands,
    add_command,
    add_connection_options,
    add_dataset_options,
    add_label_options,
    add_row_rules,
    local_path,
    location,
    make_client,
    make_image_files,
    make_label_options,
    print_error,
    print_line,
    print_outputs,
    refuse_outputs_over_inputs,
    row_rules,
)
from mal_client.client import Client
from mal_client.dataset.progress import ProgressDisplay
from mal_client.images.image_files import ImageFiles
from mal_client.types import Evaluation, LabelOptions
from mal_train.core.atomic_io import write_text
from mal_train.core.coco.members import annotation_file
from mal_train.core.errors import ConfigError
from mal_train.core.metrics.report import CROWD
from mal_train.core.storage.addresses import Location, base_name, is_remote
from mal_train.core.storage.writing import staged_outputs

MAX_WORST = 10_000
"""Largest number of worst instances that a server returns."""


@dataclass(frozen=True)
class _LocalDataset:
    """Annotations and images that this command reads itself."""

    annotations: Location
    images: ImageFiles


def add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    evaluate = add_command(commands, "evaluate", "compare the server's masks with the masks of a COCO file")
    evaluate.set_defaults(run=_evaluate, can_resume=lambda arguments: arguments.resume is not None)
    add_connection_options(evaluate)
    add_dataset_options(evaluate, "COCO file with the true masks")
    add_row_rules(evaluate)
    evaluate.add_argument(
        "--on-server",
        action="store_true",
        help="read the dataset on the server: IN.json and DIR are FOLDER/PATH in its data_folders, and no image is "
        "sent (default: send the images)",
    )
    evaluate.add_argument(
        "--resume",
        type=local_path,
        metavar="FILE",
        help="save the progress to FILE, and continue from it if it exists (default: start from the beginning)",
    )
    evaluate.add_argument(
        "--output", type=location, metavar="METRICS.json", help="also write the metrics as JSON (default: not written)"
    )
    evaluate.add_argument(
        "--report",
        type=location,
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
    elif is_remote(arguments.annotations) or arguments.images is None or is_remote(arguments.images):
        raise ConfigError("--on-server: needs FOLDER/PATH in the server's data_folders; the server fetches no address")
    with ExitStack() as stack:
        (page,) = stack.enter_context(staged_outputs(arguments.report))
        # Left before the page is made, whose failure must not take the metrics with it.
        with staged_outputs(arguments.output) as (metrics,):
            client = stack.enter_context(make_client(arguments))
            local = None if arguments.on_server else _open_dataset(arguments, stack)
            # The server states the objects that it does not measure only with the result.
            with ProgressDisplay("evaluate", failed="not sent") as display:
                evaluation = _run(client, arguments, local, options, display)
            if metrics is not None:
                # Imported here, as below: the other commands do not need it and start faster without it.
                from mal_train.core.coco.output import write_json_atomic  # noqa: PLC0415

                write_json_atomic(metrics, evaluation.to_dict())
        for line in evaluation.table().split("\n"):
            print_line(line)
        _print_skipped(evaluation)
        if page is not None and local is not None:
            write_text(page, _build_report(client, arguments, local, evaluation, options))
    print_outputs({"report": arguments.report, "metrics": arguments.output})
    return EXIT_SOME_FAILED if evaluation.failed_count or not evaluation.measured else 0


def _print_skipped(evaluation: Evaluation) -> None:
    """Prints why objects were not measured: the first of those that were not sent, and one of each reason."""
    from mal_train.core.metrics.evaluator import not_measured  # noqa: PLC0415 - as above

    rows = not_measured(evaluation.skipped_rows)
    for reason, message in evaluation.skipped_messages.items():
        if reason != CROWD:
            rows.add(reason, message)
    for text in rows.examples():
        print_error(f"  {text}")
    if not evaluation.measured and evaluation.skipped.get(CROWD):
        print_error(
            "mal-client: crowd regions (iscrowd 1) are not measured; if each is one object, as in files of CVAT, give "
            "--crowd-as-objects"
        )


def _open_dataset(arguments: argparse.Namespace, stack: ExitStack) -> _LocalDataset:
    """Opens the annotations, until `stack` closes, and finds their images."""
    annotations = stack.enter_context(annotation_file(arguments.annotations))
    return _LocalDataset(annotations, make_image_files(arguments, annotations))


def _run(
    client: Client,
    arguments: argparse.Namespace,
    local: _LocalDataset | None,
    options: LabelOptions,
    display: ProgressDisplay,
) -> Evaluation:
    """Evaluates on a local dataset, or on that of the server."""
    shared: dict[str, Any] = {
        "worst_count": MAX_WORST,
        "on_progress": display,
        "on_notice": display.notice,
        "resume": arguments.resume,
        "rules": row_rules(arguments),
    }
    if local is None:
        return client.evaluate_on_server(str(arguments.annotations), str(arguments.images), options, **shared)
    return client.evaluate(local.annotations, local.images, options, **shared)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}; expected an integer, 0 or more")
    return int(text)


def _build_report(
    client: Client,
    arguments: argparse.Namespace,
    local: _LocalDataset,
    evaluation: Evaluation,
    options: LabelOptions,
) -> str:
    """Builds the HTML page with the worst masks."""
    from mal_client.evaluation.report_page import evaluation_sections  # noqa: PLC0415
    from mal_client.review.pages import worst_cards  # noqa: PLC0415
    from mal_train.core.coco.annotations import read_coco  # noqa: PLC0415
    from mal_train.core.report.page import build_report  # noqa: PLC0415

    truth = read_coco(local.annotations, row_rules(arguments))
    cards = worst_cards(client, evaluation, truth, local.images, options, count=arguments.worst)
    subtitle = f"{base_name(arguments.annotations)} on {arguments.server}"
    omitted = len(evaluation.worst[: arguments.worst]) - len(cards)
    return build_report("Evaluation", evaluation_sections(evaluation, cards, omitted), subtitle)
