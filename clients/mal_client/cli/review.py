"""The command `mal-client review`: ranks the masks of a labeled file and exports the worst to other tools."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.cli.common import (
    EXIT_SOME_FAILED,
    Commands,
    add_command,
    add_dataset_options,
    location,
    make_image_files,
    print_error,
    print_line,
    print_outputs,
    refuse_outputs_over_inputs,
)
from mal_client.images.image_files import ImageFiles
from mal_train.core.coco.members import annotation_file
from mal_train.core.command_line import RenamedOption
from mal_train.core.numbers import counted
from mal_train.core.storage.addresses import Location, base_name, join, redact, sibling
from mal_train.core.storage.writing import staged_folder, staged_output, staged_outputs

if TYPE_CHECKING:
    from mal_client.review.queue import QueueItem, ReviewQueue

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
        type=location,
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
        type=location,
        metavar="PAGE.html",
        help="write an HTML page with the worst masks (default: not written)",
    )
    review.add_argument(
        "--export",
        type=location,
        metavar="WORST.json",
        help="write the worst annotations as a COCO file, in their order (default: not written)",
    )
    review.add_argument(
        "--label-studio",
        type=location,
        metavar="TASKS.json",
        help="write the worst annotations as Label Studio tasks, and TASKS.config.xml beside them (default: not "
        "written)",
    )
    review.add_argument(
        "--image-prefix",
        default=LOCAL_FILES,
        metavar="TEXT",
        help="prefix of the percent-encoded file names in the Label Studio tasks (default: %(default)s, for its local "
        "files)",
    )
    review.add_argument("--picture-prefix", action=RenamedOption, new="--image-prefix")  # former name
    review.add_argument(
        "--cvat",
        type=location,
        metavar="FOLDER",
        help="write the worst annotations as CVAT files into FOLDER (default: not written)",
    )
    review.add_argument(
        "--tight-boxes",
        action="store_true",
        help="write the tight boxes of the masks for Label Studio and CVAT (default: the boxes of the file)",
    )
    review.add_argument(
        "--output",
        type=location,
        metavar="QUEUE.json",
        help="write the ranking and its metrics as JSON (default: not written)",
    )


def _review(arguments: argparse.Namespace) -> int:
    # Imported here, as below: the other commands do not need these modules and start faster without them.
    from mal_client.review.queue import SortBy, review_queue, write_worst  # noqa: PLC0415
    from mal_train.core.coco.output import write_json_atomic  # noqa: PLC0415

    outputs = [arguments.output, arguments.export, arguments.label_studio, arguments.report]
    labels = [] if arguments.cvat is None else [join(arguments.cvat, "labels.json")]
    refuse_outputs_over_inputs([arguments.annotations, arguments.ground_truth], [*outputs, *labels])
    with ExitStack() as stack:
        annotations = stack.enter_context(annotation_file(arguments.annotations))
        truth = arguments.ground_truth and stack.enter_context(annotation_file(arguments.ground_truth))
        queue = review_queue(annotations, sort_by=SortBy(arguments.sort_by), count=max(0, arguments.worst), truth=truth)
        (page,) = stack.enter_context(staged_outputs(arguments.report))
        # Left before the pages and files for other tools are made, whose failures must not take the ranking with them.
        with staged_outputs(arguments.output, arguments.export) as (output, export):
            if output is not None:
                write_json_atomic(output, queue.to_dict())
            if export is not None:
                write_worst(queue, annotations, export)
        for line in queue.lines():
            print_line(line)
        omitted: list[str] = []
        if any(output is not None for output in (page, arguments.label_studio, arguments.cvat)):
            files = make_image_files(arguments, annotations)
            omitted = _export_to_tools(queue.worst, arguments, annotations, files)
            if page is not None:
                _write_page(queue, arguments, files, page)
    worst = f"worst {counted(len(queue.worst), 'annotation')}"
    print_outputs({"queue": arguments.output, worst: arguments.export, "report": arguments.report})
    for message in omitted:
        print_error(f"  {message}")
    not_compared = [] if truth is None else queue.not_compared.lines(f"{redact(arguments.ground_truth)}: not compared")
    for line in not_compared:
        print_error(line)
    return EXIT_SOME_FAILED if omitted or not_compared else 0


def _write_page(queue: ReviewQueue, arguments: argparse.Namespace, files: ImageFiles, page: Path) -> None:
    from mal_client.review.pages import queue_cards, queue_sections  # noqa: PLC0415
    from mal_train.core.atomic_io import write_text  # noqa: PLC0415
    from mal_train.core.report.page import build_report  # noqa: PLC0415

    cards = queue_cards(queue.worst, files)
    subtitle = redact(arguments.annotations)
    write_text(page, build_report("Review", queue_sections(queue, cards), subtitle))


def _export_to_tools(
    worst: Sequence[QueueItem], arguments: argparse.Namespace, annotations: Location, files: ImageFiles
) -> list[str]:
    """Writes the files for other tools; returns a message for each image that one of them lacks."""
    from mal_client.review.queue import by_image, category_names  # noqa: PLC0415

    omitted: list[str] = []
    if arguments.label_studio is None and arguments.cvat is None:
        return omitted
    if arguments.tight_boxes:
        worst = [item.with_tight_box() for item in worst]
    names = category_names(annotations)
    items_by_image = by_image(worst)
    without_image = len(worst) - sum(len(items) for items in items_by_image.values())
    count = counted(without_image, "annotation")
    note = f"; {count} without an image in the file omitted" if without_image else ""
    if arguments.label_studio is not None:
        from mal_client.integrations.label_studio.review_tasks import config_path, write_review_tasks  # noqa: PLC0415

        config = config_path(Path(base_name(arguments.label_studio))).name
        with staged_output(arguments.label_studio, [config]) as tasks:
            write_review_tasks(worst, names, files, arguments.image_prefix, tasks)
        written = f"{redact(arguments.label_studio)}, configuration {redact(sibling(arguments.label_studio, config))}"
        print_line(f"{len(items_by_image)} Label Studio tasks: {written}{note}")
    if arguments.cvat is not None:
        from mal_client.integrations.cvat.review_annotations import write_review_annotations  # noqa: PLC0415

        with staged_folder(arguments.cvat) as folder:
            omitted = write_review_annotations(worst, names, files, folder)
        written = redact(join(arguments.cvat, "annotations.xml"))
        print_line(f"{len(items_by_image) - len(omitted)} CVAT images: {written}{note}")
    return omitted
