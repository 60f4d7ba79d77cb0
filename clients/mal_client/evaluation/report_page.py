"""The sections of a page about an evaluation by a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mal_train.core.report import evaluation as core_page
from mal_train.core.report.page import Card, Html

if TYPE_CHECKING:
    from mal_client.types import Evaluation


def evaluation_sections(evaluation: Evaluation, cards: Sequence[Card] = (), omitted: int = 0) -> list[Html]:
    """Returns the sections of an evaluation.

    The plot shows the instances in `evaluation.worst`; request 10 000 of them (`worst_count`) to plot most data sets
    completely.

    Args:
        evaluation: the result.
        cards: images of the worst masks, lowest IoU first.
        omitted: number of the worst masks without a card.
    """
    model = evaluation.model
    weights = f"Checkpoint {model.checkpoint_sha256[:16]}…, {model.branch} network."
    return core_page.evaluation_sections(evaluation, weights, cards, omitted)
