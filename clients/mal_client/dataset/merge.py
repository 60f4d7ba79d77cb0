"""Joins the parts of a job that was shared among processes: writes the file that a single run would have written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mal_client.dataset.journal import Answer
from mal_client.dataset.output import refuse_same_file, write_labeled
from mal_client.dataset.plan import read_work
from mal_client.dataset.run import job_fingerprint
from mal_client.dataset.shards import ShardLedgers
from mal_client.types import DEFAULT_DATASET_OPTIONS, DatasetOptions, DatasetResult, ModelRef
from mal_train.core.atomic_io import check_writable
from mal_train.core.errors import ConfigError
from mal_train.core.fingerprint import differences
from mal_train.core.settings import Branch


def merge_shards(
    coco_json: Path, output_json: Path, shards: int, how: DatasetOptions = DEFAULT_DATASET_OPTIONS
) -> DatasetResult:
    """Writes the labeled file from the ledgers of all parts, and deletes those. Needs neither server nor images.

    Args:
        coco_json: the annotations that were labeled.
        output_json: the output that the parts were given.
        shards: number of parts.
        how: which annotations, as the parts were given it; how masks are written is settled here.

    Raises:
        ConfigError: a part is missing, incomplete or of another job.
        BadDataset: the file is unusable as a whole.
        OutputError: the disk, or a part is still being labeled; an older output is intact.
    """
    check_writable(output_json)
    refuse_same_file(coco_json, output_json)
    work = read_work(coco_json, how)
    asked = job_fingerprint(work, how)
    with ShardLedgers(output_json, shards, work.head.count) as ledgers:
        different = differences({key: ledgers.manifest.get(key) for key in asked}, asked)
        if different:
            raise ConfigError(f"{output_json}: its parts are of another job: {'; '.join(different)}")
        ledgers.refuse_gaps(work.asked_places())
        made = {key: value for key, value in ledgers.manifest.items() if key not in asked and key != "images"}

        def answer_at(at: int) -> Answer:
            answer = ledgers.answer(at)
            if answer is None:
                raise LookupError(f"row {at} has no answer")
            return answer

        result = write_labeled(work, answer_at, output_json, made, how)
        ledgers.remove()
    model = ModelRef(made["model"], made["checkpoint_sha256"], Branch(made["branch"]))
    return replace(result, model=model)
