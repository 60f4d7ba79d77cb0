"""The sections of a page on an evaluation by a server; mal_train.core.report makes and joins them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mal_train.core.report import evaluation as measured_page
from mal_train.core.report.page import Card, Html

if TYPE_CHECKING:
    from mal_client.types import Evaluation


def evaluation_sections(evaluation: Evaluation, cards: Sequence[Card] = ()) -> list[Html]:
    """The usual sections of an evaluation; `cards` show its worst masks, lowest IoU first.

    The plot shows what `evaluation.worst` lists, so ask for as many as there are (10 000 at most).
    """
    model = evaluation.model
    weights = f"Checkpoint {model.checkpoint_sha256[:16]}…, {model.branch} network."
    return measured_page.evaluation_sections(evaluation.measured(), weights, cards)
