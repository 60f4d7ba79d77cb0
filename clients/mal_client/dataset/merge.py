"""Merges the shards of a job: writes the file that a single run would have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mal_client.dataset.output import write_labeled
from mal_client.dataset.provenance import OPTIONAL_KEYS, job_fingerprint
from mal_client.dataset.run import plan_of
from mal_client.dataset.shards import ShardJournals
from mal_client.types import DEFAULT_DATASET_OPTIONS, DatasetOptions, DatasetResult, ModelRef
from mal_train.core.atomic_io import check_writable
from mal_train.core.errors import ConfigError
from mal_train.core.fingerprint import differences
from mal_train.core.settings import Branch
from mal_train.core.storage.addresses import Location
from mal_train.core.storage.writing import refuse_same_location


def merge_shards(
    coco_json: Location,
    output_json: Path,
    shards: int,
    options: DatasetOptions = DEFAULT_DATASET_OPTIONS,
    *,
    publish: Callable[[], None] | None = None,
) -> DatasetResult:
    """Writes the labeled file from the journals of all shards and deletes them. Needs neither server nor images.

    Args:
        coco_json: the annotations that were labeled.
        output_json: the output that was given for each shard.
        shards: number of shards.
        options: the row filter must be that of the shards; the mask format takes effect here.
        publish: as for `label_dataset`.

    Raises:
        ConfigError: a shard is missing or incomplete, or belongs to another job.
        BadDataset: the file as a whole is unusable.
        OutputError: the output cannot be written, or a shard is being labeled; an older output is intact.
    """
    refuse_same_location(coco_json, output_json)
    check_writable(output_json)
    plan = plan_of(coco_json, options)
    fingerprint = job_fingerprint(plan, options)
    with ShardJournals(output_json, shards, plan.head.count) as journals:
        keys = (*fingerprint, *(key for key in OPTIONAL_KEYS if key not in fingerprint))
        different = differences(*({key: one.get(key) for key in keys} for one in (journals.manifest, fingerprint)))
        if different:
            raise ConfigError(f"{output_json}: its shards belong to another job: {'; '.join(different)}")
        journals.refuse_gaps(plan.rows_to_label())
        provenance = {key: value for key, value in journals.manifest.items() if key not in keys and key != "images"}
        model = _model_of(provenance, output_json)
        result = write_labeled(plan, journals.result, output_json, provenance, options)
        if publish is not None:
            publish()
        journals.remove()
    return replace(result, model=model)


def _model_of(provenance: Mapping[str, Any], output_json: Path) -> ModelRef:
    match provenance:
        case {"model": str() as name, "checkpoint_sha256": str() as sha256, "branch": str() as branch} if (
            branch in tuple(Branch)
        ):
            return ModelRef(name, sha256, Branch(branch))
    raise ConfigError(f"{output_json}: its shards do not name the model that labeled them; label them again")
