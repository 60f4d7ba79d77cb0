"""Measures a served model on images with ground truth: the client streams them, or names a data set on the server.

A stream that breaks is started anew; what the server measured before is brought back in the next one.
"""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

from mal_client.bulk.dispatcher import OnNotice
from mal_client.dataset.run import OnProgress
from mal_client.evaluation.checkpoint import EvaluationRecords
from mal_client.evaluation.sources import LocalPass, ServerPass
from mal_client.evaluation.stream import EvaluationPass, RetryBudget
from mal_client.transport.base import Transport
from mal_client.types import Evaluation, LabelOptions
from mal_train.core.coco.annotations import read_coco


def evaluate(
    client: Transport,
    coco_json: Path,
    images_dir: Path | str,
    options: LabelOptions,
    *,
    worst_count: int = 100,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    resume: Path | None = None,
) -> Evaluation:
    """See `Client.evaluate`."""
    coco = read_coco(coco_json)
    limits = client.server_info().limits
    sha256 = hashlib.sha256(coco_json.read_bytes()).hexdigest()
    job = {"annotations_sha256": sha256, "images": str(images_dir), "options": repr(options)}
    with closing(EvaluationRecords(resume, job)) as records:
        run = LocalPass(coco, images_dir, options=options, worst_count=worst_count, limits=limits, records=records)
        return _finished(client, run, on_progress, on_notice)


def evaluate_on_server(
    client: Transport,
    annotations: str,
    images: str,
    options: LabelOptions,
    *,
    worst_count: int = 100,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
    resume: Path | None = None,
) -> Evaluation:
    """See `Client.evaluate_on_server`."""
    job = {"on_server": [annotations, images], "options": repr(options)}
    with closing(EvaluationRecords(resume, job)) as records:
        run = ServerPass(annotations, images, options, worst_count, records)
        return _finished(client, run, on_progress, on_notice)


def _finished(
    client: Transport, run: EvaluationPass, on_progress: OnProgress | None, on_notice: OnNotice | None
) -> Evaluation:
    """Streams until there is a result; what earlier streams measured is brought back in the next one."""
    if len(run.records) and on_notice is not None:
        measured = f"{len(run.records)} image{'s are' if len(run.records) > 1 else ' is'} measured"
        on_notice(f"{run.records.path}: going on with an unfinished evaluation; {measured}")
    patience = RetryBudget(client.timeout_s)
    while True:
        pause_s = run.stream(client, on_progress, on_notice, patience)
        if run.result is not None:
            found = run.evaluation(run.result)
            run.records.clear()
            return found
        client.pause(pause_s)
