"""`mal-client review`: the masks of a labeled file to look at first, as text, page, JSON, COCO file and tasks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.cli.common import Commands, add_data, add_verb

if TYPE_CHECKING:
    from mal_client.review.queue import QueueItem

WORST = 100

LOCAL_FILES = "/data/local-files/?d="


def add_review(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    review = add_verb(commands, "review", "put the masks of a labeled file in the order to look at; needs no server")
    review.set_defaults(run=_review)
    add_data(review, "COCO file with masks, as mal-client label writes it")
    review.add_argument("--by", choices=["score", "agreement"], default="score", help="the order (default: score)")
    review.add_argument("--ground-truth", type=Path, metavar="TRUE.json", help="measure the order against true masks")
    review.add_argument(
        "--worst", type=int, default=WORST, metavar="N", help="how many to show and export (default %(default)d)"
    )
    review.add_argument("--report", type=Path, metavar="PAGE.html", help="a page with pictures of the worst")
    review.add_argument("--export", type=Path, metavar="WORST.json", help="the worst as a COCO file, in their order")
    review.add_argument(
        "--label-studio", type=Path, metavar="TASKS.json", help="the worst as tasks to import into Label Studio"
    )
    review.add_argument(
        "--picture-prefix",
        default=LOCAL_FILES,
        metavar="TEXT",
        help="stands before file names in those tasks (default %(default)s, Label Studio's local files)",
    )
    review.add_argument("--cvat", type=Path, metavar="FOLDER", help="the worst as annotations to import into CVAT")
    review.add_argument("--output", type=Path, metavar="QUEUE.json", help="the worst and the figures as JSON")


def _review(arguments: argparse.Namespace) -> int:
    # Imported here, as below: what only this verb needs, the others do not wait for.
    from mal_client.review.queue import SortBy, review_queue, write_worst  # noqa: PLC0415
    from mal_train.core.coco.output import write_json_atomic  # noqa: PLC0415

    count = max(0, arguments.worst)
    queue = review_queue(arguments.annotations, by=SortBy(arguments.by), count=count, truth=arguments.ground_truth)
    print("\n".join(queue.lines()))
    if arguments.output is not None:
        write_json_atomic(arguments.output, queue.to_dict())
        print(f"queue: {arguments.output}")
    if arguments.export is not None:
        write_worst(queue, arguments.annotations, arguments.export)
        print(f"the worst {len(queue.worst)}: {arguments.export}")
    _export_to_tools(queue.worst, arguments)
    if arguments.report is not None:
        from mal_client.review.pages import queue_cards, queue_sections  # noqa: PLC0415
        from mal_train.core.atomic_io import write_text  # noqa: PLC0415
        from mal_train.core.report.page import build_report  # noqa: PLC0415

        cards = queue_cards(queue.worst, arguments.images)
        write_text(arguments.report, build_report("Review", queue_sections(queue, cards), str(arguments.annotations)))
        print(f"report: {arguments.report}")
    return 0


def _export_to_tools(worst: Sequence[QueueItem], arguments: argparse.Namespace) -> None:
    from mal_client.images.image_files import ImageFiles  # noqa: PLC0415
    from mal_client.review.queue import by_image, category_names  # noqa: PLC0415

    if arguments.label_studio is None and arguments.cvat is None:
        return
    names, files = category_names(arguments.annotations), ImageFiles(arguments.images)
    pictures = by_image(worst)
    without = len(worst) - sum(len(items) for items in pictures.values())
    left_out = f"; {without} annotations have no image in the file and are left out" if without else ""
    if arguments.label_studio is not None:
        from mal_client.integrations.label_studio.review_tasks import write_review_tasks  # noqa: PLC0415

        config = write_review_tasks(worst, names, files, arguments.picture_prefix, arguments.label_studio)
        print(f"{len(pictures)} Label Studio tasks: {arguments.label_studio}, configuration {config}{left_out}")
    if arguments.cvat is not None:
        from mal_client.integrations.cvat.review_annotations import write_review_annotations  # noqa: PLC0415

        write_review_annotations(worst, names, files, arguments.cvat)
        print(f"{len(pictures)} CVAT pictures: {arguments.cvat}/annotations.xml{left_out}")
