"""The command `mal-client review`: ranks the masks of a labeled file and exports the worst to other tools."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.cli.common import (
    Commands,
    add_command,
    add_dataset_options,
    make_image_files,
    print_line,
    refuse_outputs_over_inputs,
)
from mal_train.core.command_line import RenamedOption

if TYPE_CHECKING:
    from mal_client.review.queue import QueueItem

WORST = 100

LOCAL_FILES = "/data/local-files/?d="


def add_review(commands: Commands[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    review = add_command(commands, "review", "rank the masks of a labeled file, worst first; needs no server")
    review.set_defaults(run=_review)
    add_dataset_options(review, "COCO file with masks, as written by mal-client label")
    review.add_argument(
        "--sort-by",
        choices=["score", "agreement"],
        default="score",
        help="value that ranks the masks, lowest first; agreement needs a file labeled with --agreement "
        "(default: %(default)s)",
    )
    review.add_argument("--by", action=RenamedOption, new="--sort-by")  # former name
    review.add_argument(
        "--ground-truth",
        type=Path,
        metavar="TRUE.json",
        help="COCO file with the true masks; measures how well each order finds bad masks (default: not measured)",
    )
    review.add_argument(
        "--worst",
        type=int,
        default=WORST,
        metavar="N",
        help="number of masks to show and export; 0 or more (default: %(default)d)",
    )
    review.add_argument(
        "--report",
        type=Path,
        metavar="PAGE.html",
        help="write an HTML page with the worst masks (default: not written)",
    )
    review.add_argument(
        "--export",
        type=Path,
        metavar="WORST.json",
        help="write the worst annotations as a COCO file, in their order (default: not written)",
    )
    review.add_argument(
        "--label-studio",
        type=Path,
        metavar="TASKS.json",
        help="write the worst annotations as Label Studio tasks, and TASKS.config.xml beside them (default: not "
        "written)",
    )
    review.add_argument(
        "--image-prefix",
        default=LOCAL_FILES,
        metavar="TEXT",
        help="prefix of the file names in the Label Studio tasks (default: %(default)s, for its local files)",
    )
    review.add_argument("--picture-prefix", action=RenamedOption, new="--image-prefix")  # former name
    review.add_argument(
        "--cvat",
        type=Path,
        metavar="FOLDER",
        help="write the worst annotations as CVAT files into FOLDER (default: not written)",
    )
    review.add_argument(
        "--output",
        type=Path,
        metavar="QUEUE.json",
        help="write the ranking and its metrics as JSON (default: not written)",
    )


def _review(arguments: argparse.Namespace) -> int:
    # Imported here, as below: the other commands do not need these modules and start faster without them.
    from mal_client.review.queue import SortBy, review_queue, write_worst  # noqa: PLC0415
    from mal_train.core.coco.output import write_json_atomic  # noqa: PLC0415

    outputs = [arguments.output, arguments.export, arguments.label_studio, arguments.report]
    outputs += [] if arguments.cvat is None else [arguments.cvat / "labels.json"]
    refuse_outputs_over_inputs([arguments.annotations, arguments.ground_truth], outputs)
    queue = review_queue(
        arguments.annotations,
        sort_by=SortBy(arguments.sort_by),
        count=max(0, arguments.worst),
        truth=arguments.ground_truth,
    )
    for line in queue.lines():
        print_line(line)
    if arguments.output is not None:
        write_json_atomic(arguments.output, queue.to_dict())
        print_line(f"queue: {arguments.output}")
    if arguments.export is not None:
        write_worst(queue, arguments.annotations, arguments.export)
        print_line(f"worst {len(queue.worst)} annotations: {arguments.export}")
    _export_to_tools(queue.worst, arguments)
    if arguments.report is not None:
        from mal_client.review.pages import queue_cards, queue_sections  # noqa: PLC0415
        from mal_train.core.atomic_io import write_text  # noqa: PLC0415
        from mal_train.core.report.page import build_report  # noqa: PLC0415

        cards = queue_cards(queue.worst, make_image_files(arguments))
        write_text(arguments.report, build_report("Review", queue_sections(queue, cards), str(arguments.annotations)))
        print_line(f"report: {arguments.report}")
    return 0


def _export_to_tools(worst: Sequence[QueueItem], arguments: argparse.Namespace) -> None:
    from mal_client.review.queue import by_image, category_names  # noqa: PLC0415

    if arguments.label_studio is None and arguments.cvat is None:
        return
    names, files = category_names(arguments.annotations), make_image_files(arguments)
    items_by_image = by_image(worst)
    without_image = len(worst) - sum(len(items) for items in items_by_image.values())
    note = f"; {without_image} annotations omitted: the file does not list their images" if without_image else ""
    if arguments.label_studio is not None:
        from mal_client.integrations.label_studio.review_tasks import write_review_tasks  # noqa: PLC0415

        config = write_review_tasks(worst, names, files, arguments.image_prefix, arguments.label_studio)
        print_line(f"{len(items_by_image)} Label Studio tasks: {arguments.label_studio}, configuration {config}{note}")
    if arguments.cvat is not None:
        from mal_client.integrations.cvat.review_annotations import write_review_annotations  # noqa: PLC0415

        write_review_annotations(worst, names, files, arguments.cvat)
        print_line(f"{len(items_by_image)} CVAT images: {arguments.cvat}/annotations.xml{note}")
