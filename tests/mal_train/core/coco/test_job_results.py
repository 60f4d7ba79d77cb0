"""Results of a job on a dataset: of an earlier run, of this one, and of none."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.coco.annotations import Annotation, JsonId, read_coco
from mal_train.core.coco.job_results import NOT_LABELED, JobResults
from mal_train.core.coco.journal import Journal, RowFailure, RowResult, failed
from mal_train.core.coco.labeled_output import RowOutcome, WrittenRows, write_labeled_file
from mal_train.core.coco.output import error_fields, label_fields, labeled_file, write_json_atomic
from mal_train.core.coco.plan import read_plan
from tests.mal_train.core.coco.coco_rows import dataset, row

LABEL: RowResult = {"label": label_fields({"size": [48, 64], "counts": "x"}, 5, 0.5, ["BOX_CLIPPED"])}
FAILURE = RowFailure("", "IMAGE_NOT_FOUND", "gone")
OTHER = RowFailure("", "DEVICE_FAILED", "lost")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "in.json"
    path.write_text(json.dumps(dataset(*map(row, range(4)), row(4, iscrowd=1), row(5, bbox=None), "junk")))
    return path


@contextmanager
def opened(path: Path, *, complete_images: bool = False) -> Iterator[JobResults]:
    plan = read_plan(path)
    with Journal(path.with_name("out.json.ledger"), plan.head.count, {}) as journal:
        yield JobResults(plan, journal, complete_images=complete_images)


def test_the_next_run_tries_failures_again_and_knows_nothing_of_unavailable_rows(path: Path) -> None:
    with opened(path) as results:
        assert results.resume_message() is None
        results.add({0: LABEL, 1: failed(FAILURE)})
        results.unavailable[2] = OTHER
        expected = [LABEL, failed(FAILURE), failed(OTHER), failed(NOT_LABELED)]
        assert [results.result(index) for index in range(4)] == expected
        assert results.result(3, FAILURE) == failed(FAILURE)
    with opened(path) as results:
        assert results.pending.indices.tolist() == [1, 2, 3]
        assert (results.label_count, results.retried, results.unavailable) == (1, 1, {})
        assert "1 of 4 boxes" in (results.resume_message() or "")
    with opened(path, complete_images=True) as results:
        assert results.pending.indices.tolist() == [0, 1, 2, 3]


def test_the_file_has_the_bytes_of_one_that_is_made_in_memory(path: Path) -> None:
    failures: list[tuple[object, RowFailure]] = []
    outcomes: list[RowOutcome] = []

    def on_failure(annotation: Annotation, failure: RowFailure) -> RowFailure:
        failures.append((annotation.id, failure))
        return failure

    def finish(_index: int, written: object, _annotation: Annotation, outcome: RowOutcome) -> object:
        outcomes.append(outcome)
        return written

    output = path.with_name("out.json")
    with opened(path) as results:
        results.add({0: LABEL, 1: failed(FAILURE), 3: LABEL})
        counts = write_labeled_file(
            read_plan(path), results.result, output, {"by": "test"}, finish=finish, on_failure=on_failure
        )
    fields: dict[JsonId, Any] = {
        **{number: LABEL["label"] for number in (0, 3)},
        **{1: error_fields(*FAILURE[1:]), 2: error_fields(*NOT_LABELED[1:])},
    }
    write_json_atomic(path.with_name("expected.json"), labeled_file(read_coco(path), fields, {"by": "test"}))
    assert output.read_bytes() == path.with_name("expected.json").read_bytes()
    assert counts == WrittenRows(labeled=2, flags=Counter(LABEL["label"]["flags"] * 2), crowds=1)
    assert [(number, failure.reason) for number, failure in failures] == [
        *((1, "IMAGE_NOT_FOUND"), (2, "NOT_ANSWERED"), (5, "BAD_BOX"), (None, "NOT_AN_OBJECT")),
    ]
    labeled_row, failed_row = RowOutcome.LABELED, RowOutcome.FAILED
    assert outcomes == [labeled_row, failed_row, failed_row, labeled_row, RowOutcome.COPIED, failed_row, failed_row]
