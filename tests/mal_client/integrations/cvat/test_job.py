"""Tests of labeling the rectangles of a CVAT task, with a task in memory."""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mal_client.client import Client
from mal_client.errors import ServerUnavailable
from mal_client.integrations.cvat.job import JobResult, label_task
from mal_client.integrations.cvat.mask_encoding import mask_points
from mal_client.integrations.cvat.task_plan import LabelMap, make_plan
from mal_client.types import LabelOptions

from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.locked_file import IN_USE
from mal_train.core.masks.rle import encode_mask
from tests.mal_client.fake_server import FakeServer, Faults, Limits, serving
from tests.mal_client.integrations.cvat.cvat_task import LABELS, TaskInMemory, rectangle, tag, track


def decoded(points: Sequence[float], height: int, width: int) -> Any:
    """Decodes a mask from CVAT's encoding, independently of the implementation."""
    *runs, left, top, right, bottom = map(int, points)
    values = np.repeat(np.arange(len(runs)) % 2, runs)
    full = np.zeros((height, width), dtype=bool)
    full[top : bottom + 1, left : right + 1] = values.reshape(bottom + 1 - top, right + 1 - left)
    return full


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.05, 1), st.integers(0, 99))
def test_points_hold_the_mask_exactly_in_its_tight_box(height: int, width: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < density
    if not mask.any():
        with pytest.raises(ValueError, match="empty"):
            mask_points(encode_mask(mask))
        return
    points = mask_points(encode_mask(mask))
    assert (decoded(points, height, width) == mask).all()
    rows, columns = np.nonzero(mask)
    assert points[-4:] == [columns.min(), rows.min(), columns.max(), rows.max()]


def sample_task() -> TaskInMemory:
    """Makes a task with two rectangles, a track of rectangles, and annotations that stay unchanged."""
    first = rectangle(1, 0, [5.0, 4.0, 15.0, 12.0], group=3, z_order=2, occluded=True)
    first["attributes"] = [{"spec_id": 1, "value": "red"}]
    polygon = rectangle(3, 1, [1.0, 1.0, 9.0, 1.0, 9.0, 9.0], type="polygon")
    moving = [rectangle(50 + n, n, [2.0 + n, 2.0, 12.0 + n, 10.0], outside=n == 2) for n in range(4)]
    return TaskInMemory([first, rectangle(2, 1, [20.0, 8.0, 30.0, 20.0]), polygon], [track(9, moving)], [tag(4, 0)])


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
def client(fake: FakeServer) -> Iterator[Client]:
    with serving(fake) as address, Client(address, timeout_s=10) as client:
        yield client


def run(task: TaskInMemory, client: Client, folder: Path, **more: Any) -> JobResult:
    return label_task(task, client, folder / "task-7.ledger", LabelOptions(), **more)


def test_tight_boxes_are_added_with_the_masks_and_once(client: Client, tmp_path: Path) -> None:
    task = sample_task()
    before = len(task.annotations()["shapes"])
    assert run(task, client, tmp_path, tight_boxes=True).written == 5
    assert run(task, client, tmp_path, tight_boxes=True).written == 0
    masks, added = task.masks(), task.annotations()["shapes"][before:]
    boxes = [row for row in added if row["type"] == "rectangle"]
    assert len(boxes) == len(masks) == 5
    for mask, tight in zip(masks, boxes, strict=True):
        left, top, right, bottom = mask["points"][-4:]
        assert tight["points"] == [left, top, right + 1, bottom + 1]
        same = ("frame", "label_id", "group", "z_order", "occluded", "attributes")
        assert [tight[key] for key in same] == [mask[key] for key in same]
    with pytest.raises(ConfigError):
        run(task, client, tmp_path)


def test_a_tight_box_has_the_label_of_its_rectangle(client: Client, tmp_path: Path) -> None:
    task = sample_task()
    names = {row["id"]: row["name"] for row in LABELS}
    run(task, client, tmp_path, tight_boxes=True, label_names={"cup": "crate mask"})
    mask, tight = (
        next(row for row in task.annotations()["shapes"] if row["type"] == kind and row["source"] == "auto")
        for kind in ("mask", "rectangle")
    )
    assert (names[mask["label_id"]], names[tight["label_id"]]) == ("crate mask", "cup")


def test_every_rectangle_gets_a_mask_and_nothing_else_changes(client: Client, tmp_path: Path) -> None:
    task = sample_task()
    before = task.annotations()
    result = run(task, client, tmp_path)
    assert (result.written, result.existing, result.skipped, result.changed) == (5, 0, [], [])
    assert result.plan.other == 2, "the polygon and the tag"
    assert task.content["shapes"][:3] == before["shapes"]
    assert (task.content["tracks"], task.content["tags"]) == (before["tracks"], before["tags"])
    masks = task.masks()
    assert [mask["frame"] for mask in masks] == [0, 0, 1, 1, 3]
    filled = decoded(masks[0]["points"], 30, 40)
    assert filled.sum() == 80
    assert filled[4:12, 5:15].all()


def test_a_mask_keeps_label_attributes_group_order_and_occlusion(client: Client, tmp_path: Path) -> None:
    task = sample_task()
    run(task, client, tmp_path)
    fields = {key: task.masks()[0][key] for key in ("label_id", "group", "z_order", "occluded", "source", "attributes")}
    assert fields == {
        "label_id": 11,
        "group": 3,
        "z_order": 2,
        "occluded": True,
        "source": "auto",
        "attributes": [{"spec_id": 1, "value": "red"}],
    }
    assert task.masks()[0]["score"] == 0.75


def test_masks_of_a_track_share_a_new_group_and_skip_frames_outside(client: Client, tmp_path: Path) -> None:
    task = sample_task()
    run(task, client, tmp_path)
    of_track = [mask for mask in task.masks() if mask["group"] == 4]
    assert [mask["frame"] for mask in of_track] == [0, 1, 3]


def test_a_second_run_writes_nothing(client: Client, fake: FakeServer, tmp_path: Path) -> None:
    task = sample_task()
    run(task, client, tmp_path)
    calls = len(fake.label_requests)
    again = run(task, client, tmp_path)
    assert (again.written, again.existing, len(task.masks())) == (0, 5, 5)
    assert len(fake.label_requests) == calls


@pytest.mark.parametrize("failure", ["fail_creates", "lose_responses"])
def test_a_failed_call_loses_no_mask_and_repeats_none(
    failure: str, client: Client, fake: FakeServer, tmp_path: Path
) -> None:
    task = sample_task()
    setattr(task, failure, 1)
    with pytest.raises(ConnectionError):
        run(task, client, tmp_path)
    calls = len(fake.label_requests)
    again = run(task, client, tmp_path)
    assert (again.written, again.existing) == ((5, 0) if failure == "fail_creates" else (0, 5))
    assert len(task.masks()) == 5
    assert len(fake.label_requests) == calls, "the masks were in the journal"


@pytest.mark.parametrize(("key", "other"), [(b'"frame"', b'"image"'), (b'"points":[', b'"points":["",')])
def test_a_journal_whose_mask_has_another_form_is_refused(
    key: bytes, other: bytes, client: Client, tmp_path: Path
) -> None:
    task = sample_task()
    task.fail_creates = 1
    with pytest.raises(ConnectionError):
        run(task, client, tmp_path)
    journal = tmp_path / "task-7.ledger"
    first, *lines = journal.read_bytes().splitlines()
    texts = [line[9:].replace(key, other) for line in lines]
    journal.write_bytes(b"\n".join([first, *(b"%08x %s" % (zlib.crc32(text), text) for text in texts)]) + b"\n")
    with pytest.raises(ConfigError, match=journal.name):
        run(task, client, tmp_path)
    assert task.masks() == []


def test_masks_stay_after_the_labeling_server_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.integrations.cvat.job.FRAMES_AT_ONCE", 1)
    monkeypatch.setattr("mal_client.integrations.cvat.job.MASKS_PER_CALL", 1)
    task = sample_task()
    fake = FakeServer()
    with serving(fake) as address, Client(address, timeout_s=10) as client:
        create, fake_faults = task.create, fake.faults

        def create_then_lose_server(shapes: Any) -> None:
            create(shapes)
            fake_faults.unavailable = 100

        task.create = create_then_lose_server  # type: ignore[method-assign]
        with pytest.raises(ServerUnavailable):
            run(task, client, tmp_path)
    assert len(task.masks()) == 2
    task.create = create  # type: ignore[method-assign]
    with serving(FakeServer()) as address, Client(address, timeout_s=10) as client:
        assert (run(task, client, tmp_path).written, len(task.masks())) == (3, 5)


def test_other_rectangles_or_options_are_refused_without_restart(client: Client, tmp_path: Path) -> None:
    task = sample_task()
    run(task, client, tmp_path)
    task.content["shapes"][0]["points"] = [6.0, 4.0, 15.0, 12.0]
    with pytest.raises(ConfigError, match="rectangles"):
        run(task, client, tmp_path)
    result = run(task, client, tmp_path, restart=True)
    assert (result.written, result.existing) == (1, 4), "existing masks are not added twice"
    for options, change in (
        (LabelOptions(threshold=0.5), r"thresholds .*\[0\.5, 0\.5, 0\.5\]"),
        (LabelOptions(min_component_area_px=9), "min_component_area_px"),
        (LabelOptions(resolve_overlaps=True), "resolve_overlaps"),
    ):
        with pytest.raises(ConfigError, match=change):
            label_task(task, client, tmp_path / "task-7.ledger", options)


def test_the_original_annotations_are_saved(client: Client, tmp_path: Path) -> None:
    task = sample_task()
    before = task.annotations()
    run(task, client, tmp_path)
    run(task, client, tmp_path)
    assert json.loads((tmp_path / "task-7.ledger.before.json").read_text()) == before


def test_rectangles_that_cannot_be_labeled_are_listed_and_the_others_are_labeled(tmp_path: Path) -> None:
    shapes = [
        rectangle(1, 0, [5.0, 4.0, 15.0, 12.0], rotation=20.0),
        rectangle(2, 1, [5.0, 4.0, 15.0, 12.0], label_id=12),
        rectangle(3, 2, [5.0, 4.0, 15.0, 12.0]),
        rectangle(4, 3, [90.0, 90.0, 99.0, 99.0]),
        rectangle(5, 4, [5.0, 4.0, 15.0, 12.0]),
    ]
    task = TaskInMemory(shapes)
    task.deleted = frozenset({2})
    with serving(FakeServer()) as address, Client(address) as client:
        result = run(task, client, tmp_path)
    reasons = {shape.key: shape.reason for shape in result.skipped}
    assert sorted(reasons) == ["shape 1", "shape 2", "shape 3", "shape 4"]
    assert "20 degrees" in reasons["shape 1"]
    assert "--label crate=" in reasons["shape 2"]
    assert "deleted" in reasons["shape 3"]
    assert "BAD_BOX" in reasons["shape 4"]
    assert (result.written, [mask["frame"] for mask in task.masks()]) == (1, [4])


@pytest.mark.parametrize(("orientation", "size_wh"), [(6, (40, 30)), (1, (30, 40))])
def test_frames_that_cvat_displays_differently_from_their_file_are_refused(
    orientation: int, size_wh: tuple[int, int], client: Client, tmp_path: Path
) -> None:
    task = TaskInMemory([rectangle(1, 0, [5.0, 4.0, 15.0, 12.0])])
    task.orientation, task.size_wh = orientation, size_wh
    result = run(task, client, tmp_path)
    assert (result.written, len(result.skipped)) == (0, 1)
    assert "frame 0: " in result.skipped[0].reason
    assert f"EXIF orientation {orientation}" in result.skipped[0].reason


def test_masks_may_have_another_label_whose_attributes_are_matched_by_name(client: Client, tmp_path: Path) -> None:
    task = sample_task()
    run(task, client, tmp_path, label_names={"cup": "crate mask"})
    assert {mask["label_id"] for mask in task.masks()} == {13}
    assert task.masks()[0]["attributes"] == [{"spec_id": 5, "value": "red"}]
    with pytest.raises(ConfigError, match="'nothing'"):
        run(task, client, tmp_path, label_names={"cup": "nothing"})


def test_changes_by_another_user_are_detected(client: Client, tmp_path: Path) -> None:
    task = sample_task()
    create = task.create

    def create_while_another_user_edits(shapes: Any) -> None:
        create(shapes)
        task.content["shapes"][1] = task.content["shapes"][1] | {"points": [0.0, 0.0, 5.0, 5.0]}

    task.create = create_while_another_user_edits  # type: ignore[method-assign]
    assert run(task, client, tmp_path).changed == ["shape 2"]


def test_two_concurrent_runs_are_refused(client: Client, tmp_path: Path) -> None:
    task, errors = sample_task(), list[Exception]()
    create = task.create

    def create_after_another_run(shapes: Any) -> None:
        try:
            run(sample_task(), client, tmp_path)
        except Exception as error:  # any error counts; its type is asserted below
            errors.append(error)
        create(shapes)

    task.create = create_after_another_run  # type: ignore[method-assign]
    run(task, client, tmp_path)
    assert [type(error) for error in errors] == [OutputError]
    assert IN_USE in str(errors[0])


def test_large_tasks_are_sent_in_small_calls(client: Client, tmp_path: Path) -> None:
    task = TaskInMemory([rectangle(n, n % 6, [n % 20, 4.0, n % 20 + 9.0, 12.0]) for n in range(130)])
    assert run(task, client, tmp_path).written == 130
    assert max(task.create_calls) <= 50 + 22
    assert sum(task.create_calls) == 130


def test_a_plan_orders_targets_by_frame() -> None:
    task = sample_task()
    plan = make_plan(task.annotations(), LabelMap(LABELS, {}), frozenset(), 1)
    assert [target.key for target in plan.targets] == [
        "shape 1",
        "track 9 on frame 0",
        "shape 2",
        "track 9 on frame 1",
        "track 9 on frame 3",
    ]
    assert plan.targets[0].box == (5.0, 4.0, 10.0, 8.0)


@pytest.mark.parametrize(("degrees", "skipped"), [(1e-7, 0), (180.0, 0), (360.0, 0), (45.0, 1)])
def test_only_a_rotation_that_moves_a_corner_keeps_a_rectangle_from_its_mask(degrees: float, skipped: int) -> None:
    task = sample_task()
    annotations = {**task.annotations(), "tracks": [], "shapes": [rectangle(1, 0, [5, 4, 15, 12], rotation=degrees)]}
    plan = make_plan(annotations, LabelMap(LABELS, {}), frozenset(), 1)
    assert (len(plan.targets), len(plan.skipped)) == (1 - skipped, skipped)


def test_a_failed_box_is_labeled_again_in_the_next_run(tmp_path: Path) -> None:
    task = sample_task()
    with serving(FakeServer(Faults(bad_boxes={0}), Limits())) as address, Client(address) as client:
        assert len(run(task, client, tmp_path).skipped) == 3
    with serving(FakeServer()) as address, Client(address) as client:
        result = run(task, client, tmp_path)
    assert (result.skipped, result.written + result.existing, len(task.masks())) == ([], 5, 5)
