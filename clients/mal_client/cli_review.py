"""`mal-client review`: the masks of a labelled file to look at first, as text, page, JSON and COCO file."""

from __future__ import annotations

import argparse
from pathlib import Path

from mal_client.arguments import Commands, add_data, add_verb

WORST = 100


def add_review(commands: Commands[argparse.ArgumentParser]) -> None:
    """The verb and its arguments."""
    review = add_verb(commands, "review", "put the masks of a labelled file in the order to look at; needs no server")
    review.set_defaults(run=_review)
    add_data(review)
    review.add_argument("--by", choices=["score", "agreement"], default="score", help="the order (default: score)")
    review.add_argument("--ground-truth", type=Path, metavar="TRUE.json", help="measure the order against true masks")
    review.add_argument(
        "--worst", type=int, default=WORST, metavar="N", help="how many to show and export (default %(default)d)"
    )
    review.add_argument("--report", type=Path, metavar="PAGE.html", help="a page with pictures of the worst")
    review.add_argument("--export", type=Path, metavar="WORST.json", help="the worst as a COCO file, in their order")
    review.add_argument("--output", type=Path, metavar="QUEUE.json", help="the worst and the figures as JSON")


def _review(arguments: argparse.Namespace) -> int:
    # Imported here, as below: what only this verb needs, the others do not wait for.
    from mal_client.review_queue import By, review_queue, write_worst  # noqa: PLC0415
    from mal_train.labeling.coco_output import write_json_atomic  # noqa: PLC0415

    count = max(0, arguments.worst)
    queue = review_queue(arguments.annotations, by=By(arguments.by), count=count, truth=arguments.ground_truth)
    print("\n".join(queue.lines()))
    if arguments.output is not None:
        write_json_atomic(arguments.output, queue.to_dict())
        print(f"queue: {arguments.output}")
    if arguments.export is not None:
        write_worst(queue, arguments.annotations, arguments.export)
        print(f"the worst {len(queue.worst)}: {arguments.export}")
    if arguments.report is not None:
        from mal_client.review import queue_cards, queue_sections  # noqa: PLC0415
        from mal_train.atomic import write_text  # noqa: PLC0415
        from mal_train.report.page import build_report  # noqa: PLC0415

        cards = queue_cards(queue.worst, arguments.images)
        write_text(arguments.report, build_report("Review", queue_sections(queue, cards), str(arguments.annotations)))
        print(f"report: {arguments.report}")
    return 0
