"""Fields of rows in the forms that exporters write."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mal_train.core.coco.annotations import Reason, parse_coco, read_coco, without_points
from mal_train.core.coco.box_form import form_note, likely_form
from mal_train.core.coco.fields import enclosing_box, file_name_of, points_of, rotation_of, side_of
from mal_train.core.coco.image_urls import image_urls
from mal_train.core.masks.points import MAX_POINTS
from mal_train.core.settings import BoxForm, RotatedBoxes, RowRules
from tests.mal_train.core.coco.coco_rows import dataset, only, row

UPRIGHT = RowRules(rotated_boxes=RotatedBoxes.UPRIGHT)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"file_name": "a.jpg", "coco_url": "http://host/val2017/b.jpg"}, "a.jpg"),
        ({"coco_url": "http://host/val2017/b.jpg"}, "val2017/b.jpg"),
        ({"coco_url": "http://host/b%20c.jpg?sig=1"}, "b c.jpg"),
        ({"coco_url": "http://[bad"}, ""),
        ({"coco_url": "http://host"}, ""),
        ({"coco_url": ["x"]}, ""),
        ({"coco_url": "http://host/../../etc/passwd"}, "etc/passwd"),
        ({"file_name": "", "coco_url": "http://host/val2017/b.jpg"}, ""),
        ({"file_name": 5}, ""),
    ],
)
def test_the_file_name_is_that_of_the_row_or_of_its_url(fields: dict[str, Any], expected: str) -> None:
    assert file_name_of(fields) == expected


def test_urls_are_found_by_the_names_that_the_rows_get(tmp_path: Path) -> None:
    url = "https://images.example/val2017/7.jpg"
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(dataset(images=[{"id": 7, "coco_url": url}])))
    (image,) = read_coco(path).images.values()
    assert image_urls(path) == {image.file_name: url}


@pytest.mark.parametrize("value", [True, "", "x", "-5", "1.5", 5.5, math.nan, math.inf, 10**400, [], {}, "9" * 99])
def test_a_side_that_is_no_number_of_pixels_is_an_error(value: Any) -> None:
    side, rule = side_of(value)
    assert side is None
    assert rule


@pytest.mark.parametrize(
    ("attributes", "angle"),
    [({"rotation": 30.5}, 30.5), ({"rotation": -90}, 270), ({"rotation": None}, 0), ({}, 0), ([], 0)],
)
def test_the_angle_is_that_of_the_attributes(attributes: Any, angle: float) -> None:
    assert rotation_of({"attributes": attributes}, (0, 0, 9, 9)) == (angle, None)


def test_a_rotated_box_gets_the_smallest_upright_box_round_its_corners() -> None:
    x, y, w, h, degrees = 10.0, 20.0, 40.0, 16.0, 33.0
    turn = np.exp(1j * math.radians(degrees))
    corners = (np.array([w + 1j * h, w - 1j * h]) / 2) * turn
    half = np.abs([corners.real, corners.imag]).max(axis=1)
    expected = (x + w / 2 - half[0], y + h / 2 - half[1], 2 * half[0], 2 * half[1])
    assert enclosing_box((x, y, w, h), degrees) == pytest.approx(expected)
    raw = dataset(row(bbox=[x, y, w, h], attributes={"rotation": degrees}))
    (annotation,) = parse_coco(raw, rules=UPRIGHT).annotations
    assert annotation.problem is None
    assert annotation.box_xywh == pytest.approx(expected)
    assert only(raw).reason is Reason.BOX_ROTATED


def test_one_point_too_many_is_read() -> None:
    points, problem = points_of({"points": [[1, 2, 1]] * 1000})
    assert (len(points), problem) == (MAX_POINTS + 1, None)


@pytest.mark.parametrize(
    "points",
    [
        3,
        "text",
        {},
        [1, 2, 1],
        [[1, 2]],
        [[1, 2, 2]],
        [[1, 2, True]],
        [[1, "2", 1]],
        [[1, 2, 1], None],
        [[1, 1e999, 0]],
    ],
)
def test_points_of_another_form_fail_their_row(points: Any) -> None:
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "points": points}
    (found,) = parse_coco({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [row]}).annotations
    assert (found.reason, found.points) == (Reason.BAD_POINT, ())
    used = without_points(found)
    assert (used.problem, used.reason, used.box_xywh) == (None, None, (0, 0, 4, 4))


def test_without_points_other_problems_stay() -> None:
    assert without_points(only(dataset(row(points=3, iscrowd=2)))).reason is Reason.BAD_ISCROWD
    assert without_points(only(dataset(row(points=3, attributes={"rotation": 30})))).reason is Reason.BOX_ROTATED
    assert without_points(only(dataset(row(points=[[1, 1, 1]])))).points == ()


@pytest.mark.parametrize("rotation", ["30", " 30.0 ", "3e1", 390, "-330"])
def test_an_angle_may_be_text(rotation: Any) -> None:
    found = only(dataset(row(attributes={"rotation": rotation})))
    assert (found.reason, found.is_rotated) == (Reason.BOX_ROTATED, True)


@pytest.mark.parametrize("rotation", [True, False, "x", "true", "nan", "1_0", "30 deg", [30], {}, math.inf, math.nan])
def test_an_angle_that_is_no_number_is_a_bad_row(rotation: Any) -> None:
    for rules in (UPRIGHT, RowRules()):
        (found,) = parse_coco(dataset(row(attributes={"rotation": rotation})), rules=rules).annotations
        assert found.reason is Reason.BAD_BOX
        assert "attributes.rotation" in (found.problem or "")


@pytest.mark.parametrize("rotation", [1e-7, -1e-9, "1e-7", 360 - 1e-7, 180, -180.0, None, "", 0.1])
def test_an_angle_that_leaves_the_corners_in_place_is_none(rotation: Any) -> None:
    found = only(dataset(row(bbox=[3, 4, 40, 30], attributes={"rotation": rotation})))
    assert (found.problem, found.is_rotated, found.box_xywh) == (None, False, (3, 4, 40, 30))


def test_a_small_angle_turns_a_large_box() -> None:
    image = {"id": 1, "file_name": "a.png", "width": 4000, "height": 4000}
    large = row(bbox=[0, 0, 3000, 3000], attributes={"rotation": 0.1})
    assert only({"images": [image], "annotations": [large]}).reason is Reason.BOX_ROTATED


def test_crowd_regions_can_be_read_as_objects() -> None:
    raw = dataset(row(1, iscrowd=1), row(2))
    assert [one.iscrowd for one in parse_coco(raw).annotations] == [True, False]
    assert [one.iscrowd for one in parse_coco(raw, rules=RowRules(crowd_as_objects=True)).annotations] == [False, False]


def random_boxes(count: int) -> tuple[Any, Any]:
    """Returns boxes inside images of 640 x 480 px, (count, 4), and the sizes of their images."""
    rng = np.random.default_rng(3)
    sizes = np.tile([640.0, 480.0], (count, 1))
    first = rng.uniform(0, 0.7, (count, 2)) * sizes
    return np.hstack((first, rng.uniform(0.05, 1, (count, 2)) * (sizes - first))), sizes


@pytest.mark.parametrize("count", [1, 3, 200])
def test_the_form_of_boxes_is_recognized_and_that_of_coco_is_never_doubted(count: int) -> None:
    boxes, sizes = random_boxes(count)
    boxes[0] = [400, 300, 200, 150]
    corners = np.hstack((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]))
    shares = boxes / np.tile(sizes, 2)
    unknown = np.full_like(sizes, np.nan)
    assert likely_form(boxes, sizes) == (BoxForm.XYWH, "")
    assert likely_form(boxes, unknown)[0] is BoxForm.XYWH
    assert likely_form(corners, sizes)[0] is BoxForm.CORNERS
    assert likely_form(shares, sizes)[0] is BoxForm.SHARES
    assert likely_form(shares, unknown)[0] is BoxForm.SHARES


@pytest.mark.parametrize("whole", [1, 5, 9])
def test_boxes_of_complete_images_do_not_hide_shares(whole: int) -> None:
    boxes, sizes = random_boxes(10)
    shares = boxes / np.tile(sizes, 2)
    shares[:whole] = [0, 0, 1.0005, 1]  # as other tools round
    assert likely_form(shares, sizes)[0] is BoxForm.SHARES
    shares[:whole] = [0, 0, 1, 1]
    form, text = likely_form(shares, sizes)
    assert form is BoxForm.SHARES
    assert "10 of 10" in text


def test_boxes_that_stick_out_or_lie_outside_are_no_corners() -> None:
    boxes, sizes = random_boxes(100)
    boxes[:30, 2] = 640
    assert likely_form(boxes, sizes)[0] is BoxForm.XYWH
    assert likely_form(np.array([[0.0, 0.0, 1.0, 1.0]]), sizes[:1])[0] is BoxForm.XYWH
    assert likely_form(np.zeros((0, 4)), np.zeros((0, 2))) == (BoxForm.XYWH, "")


def test_invalid_rows_and_crowds_say_nothing_about_the_form() -> None:
    coco = parse_coco(dataset(row(1, bbox=[0.1, 0.1, 0.5, 0.5]), row(2, bbox=None), row(3, iscrowd=1)))
    assert form_note(coco.annotations, coco.images) is not None
    assert form_note([], coco.images) is None
