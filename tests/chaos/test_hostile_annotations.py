"""Hostile annotation files by the thousand: each gives a result or one clear error, fast, with little memory."""

import json
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from mal_client.dataset_check.check import check_dataset
from mal_client.review.queue import SortBy, review_queue

from mal_server.errors import InvalidRequest
from mal_server.evaluation.dataset_reader import read_dataset
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_train.core.coco.annotations import Annotation, CocoFile, by_image, read_coco, read_json
from mal_train.core.coco.detections import read_detections
from mal_train.core.coco.output import error_fields, label_fields, labeled_file, write_json_atomic
from mal_train.core.coco.plan import RowAction, read_plan
from mal_train.core.coco.stream import copy_coco, scan_coco, write_transformed
from mal_train.core.errors import BadBox, BadDataset, ConfigError
from mal_train.core.masks import geometry, rle
from mal_train.core.metrics.evaluator import Evaluator, evaluate_labels
from mal_train.core.metrics.lvis import Federation
from mal_train.core.settings import RotatedBoxes, RowRules
from tests.form import FORM, Form
from tests.mal_train.core.coco.hostile_files import HEIGHT, WIDTH, detections, hostile_counts, hostile_file
from tests.mal_train.core.metrics.ground_truths import square

Record = Callable[..., None]

MAX_S = 10.0
"""CPU time of one case, a hundred times the usual one: a machine short of memory spends some on its pages."""
MAX_GROWTH_MIB = 256
PARTS = FORM.pick(1, 10)
"""Tests among which the cases are divided: one alone takes about ten minutes of CPU time."""
MASK = square(4, 4, 20, (HEIGHT, WIDTH))
FIELDS = label_fields(MASK.to_coco(), 400, 0.5)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def outcome(work: Callable[[], object]) -> str:
    """Returns "result", or the name of the error; any error but those of a bad file is a failure of the test."""
    try:
        work()
    except (BadDataset, ConfigError, InvalidRequest) as error:
        message = str(error)
        assert message.strip()
        assert len(message) < 20_000
        message.encode()  # can be printed
        return type(error).__name__
    return "result"


def evaluate(coco: CocoFile) -> None:
    """Compares every row with one mask, and reads all forms of the report."""
    evaluator = Evaluator(coco.category_names, Federation.of(coco))
    for _, rows in by_image(coco):
        for row in rows:
            try:
                geometry.check_box(row.box_xywh, (HEIGHT, WIDTH))
            except BadBox:
                assert str(row.box_xywh)
            evaluator.add(row, MASK, 0.5)
    report = evaluator.report()
    json.dumps(report.to_dict(), allow_nan=False)
    report.table().encode(errors="backslashreplace")


def compare(truth: CocoFile, labels: CocoFile) -> None:
    """Compares two files, and writes the report as JSON."""
    json.dumps(evaluate_labels(truth, labels).to_dict(), allow_nan=False)


def write(coco: CocoFile, path: Path, output: Path) -> None:
    """Writes labels and errors for all rows, in memory and row by row; no row is lost."""
    results = {row.id: FIELDS if n % 2 else error_fields("X", "x") for n, row in enumerate(coco.annotations) if row.id}
    write_json_atomic(output, labeled_file(coco, results, {}))
    assert len(read_json(output)["annotations"]) == len(coco.annotations)
    write_transformed(scan_coco(path, lambda *_: None), output, lambda _number, row, _annotation: row, {})
    assert len(read_json(output)["annotations"]) == len(coco.annotations)


def plan(path: Path) -> None:
    """Plans a job by other rules than COCO's; every row has an action."""
    rules = RowRules(crowd_as_objects=True, rotated_boxes=RotatedBoxes.UPRIGHT)
    found = read_plan(path, rules=rules)
    assert len(found.actions) == found.head.count
    assert RowAction.COPY_CROWD not in found.actions
    found.form_note()


def work_of(content: bytes, labels: bytes, boxes: bytes, folder: Path) -> Iterable[tuple[str, Callable[[], object]]]:
    """Yields the readers of an annotation file, by name."""
    path, other, results = folder / "a.json", folder / "b.json", folder / "c.json"
    path.write_bytes(content)
    other.write_bytes(labels)
    results.write_bytes(boxes)
    yield "stream", lambda: scan_coco(path, lambda _number, _row: None)
    yield "review", lambda: review_queue(path, sort_by=SortBy.SCORE, truth=path).lines()
    yield "rules", lambda: plan(path)
    yield "check", lambda: check_dataset(path, folder).lines()
    yield "memory", lambda: evaluate(read_coco(path))
    yield "output", lambda: write(read_coco(path), path, folder / "out.json")
    yield "labels", lambda: compare(read_coco(path), read_coco(other))
    folders = AllowedDirs({"data": folder}, "folders")
    yield "server", lambda: read_dataset(folders, "data/a.json", "data").category_names

    def detected() -> None:
        labeled_file(read_detections(results, read_coco(path)), {}, {})

    yield "detections", detected

    def round_trip() -> None:
        copy_coco(path, folder / "a.parquet", row_group_boxes=2)
        copy_coco(folder / "a.parquet", folder / "back.json")
        assert json.dumps(read_json(folder / "back.json")) == json.dumps(read_json(path))

    yield "parquet", round_trip


@pytest.mark.promise("files", "A hostile annotation file gives a result or one clear error, fast, with little memory")
@pytest.mark.parametrize("part", range(PARTS))
def test_hostile_annotation_files_give_a_result_or_one_clear_error(
    part: int, form: Form, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time of a small file
    count = form.pick(120, 20_000) // PARTS
    evaluate(CocoFile({}, {}, [], []))  # its imports do not count
    outcomes: Counter[str] = Counter()
    slowest, before = 0.0, peak_mib()
    for number in range(part * count, (part + 1) * count):
        case = random.Random(f"{form.seed} {number}")
        files = hostile_file(case), hostile_file(case), detections(case)
        for name, work in work_of(*files, tmp_path):
            began = time.thread_time()
            try:
                outcomes[f"{name} {outcome(work)}"] += 1
            except Exception as error:  # any other error is a bug; the note says how to repeat it
                error.add_note(f"case {number}, {name}")
                raise
            slowest = max(slowest, time.thread_time() - began)
    growth = peak_mib() - before
    results = sum(number for name, number in outcomes.items() if name.endswith(" result"))
    refused = sum(outcomes.values()) - results
    record("hostile files", cases=count, results=results, refused=refused, growth_mib=growth, slowest_ms=slowest * 1000)
    print(dict(outcomes))
    assert sum(outcomes.values()) == 10 * count
    assert min(outcomes["memory result"], outcomes["stream result"], outcomes["server result"]) > count / 2
    assert outcomes["memory BadDataset"] > 0
    assert growth <= MAX_GROWTH_MIB
    assert slowest <= MAX_S


@pytest.mark.promise("evaluation", "A ground-truth mask of any bytes is counted or skipped, fast, with little memory")
def test_hostile_codes_of_ground_truth_are_counted_or_skipped(form: Form, record: Record) -> None:
    """The forms that a mask of an Evaluate request can take: any integers as size, any bytes as counts."""
    chance, count = random.Random(form.seed + 1), form.pick(300, 20_000)
    outcomes: Counter[str] = Counter()
    slowest, before = 0.0, peak_mib()
    for number in range(count):
        counts = hostile_counts(chance, HEIGHT * WIDTH)
        content = counts.encode("utf-8", "replace") if isinstance(counts, str) else chance.randbytes(50)
        size = [HEIGHT, WIDTH] if chance.random() < 0.8 else [chance.choice((0, -1, 1, 2**31 - 1)) for _ in range(2)]
        box = tuple(chance.choice((0.0, 5.0, 1e308, -1e308)) for _ in range(4))
        raw = {"segmentation": {"size": size, "counts": content}}
        evaluator = Evaluator({1: "a"})
        began = time.thread_time()
        for is_crowd in (False, True):
            row = Annotation(int(is_crowd), number, 1, box, is_crowd, raw)  # type: ignore[arg-type]
            evaluator.add(row, MASK, 0.5)
        report = evaluator.report()
        slowest = max(slowest, time.thread_time() - began)
        json.dumps(report.to_dict(), allow_nan=False)
        outcomes["counted" if report.overall.count else "skipped"] += 1
    growth = peak_mib() - before
    record("hostile codes", cases=count, growth_mib=growth, slowest_ms=slowest * 1000, **outcomes)
    assert sum(outcomes.values()) == count
    assert min(outcomes["counted"], outcomes["skipped"]) > 0
    assert growth <= MAX_GROWTH_MIB
    assert slowest <= MAX_S


@pytest.mark.parametrize("levels", [50, 300, 950, 985, 995, 100_000])
def test_a_deeply_nested_file_is_written_or_refused_when_it_is_read(levels: int, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    row = '{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "x": %s1%s}' % ("[" * levels, "]" * levels)  # noqa: UP031
    head = '"images": [{"id": 1, "file_name": "a", "width": 60, "height": 40}], "categories": [{"id": 1}]'
    path.write_text(f'{{{head}, "annotations": [{row}]}}')

    def work() -> Any:
        coco = read_coco(path)
        write(coco, path, tmp_path / "out.json")
        return rle.decode_mask(MASK)

    assert outcome(work) == ("result" if levels <= 50 else "BadDataset")
