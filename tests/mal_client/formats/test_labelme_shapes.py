"""labelme's JSON files as users bring them: every kind of shape, objects of several shapes, and damaged files."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal_client.cli.main import main
from mal_client.formats.labelme_shapes import ARC_ERROR_PX, circle

from mal_train.core.masks.encodings import encode_bitmap
from mal_train.core.masks.rle import Rle, decode_mask, encode_mask
from tests.mal_client.dataset.test_mask_encodings import ring
from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.formats.conversions import (
    HEIGHT,
    WIDTH,
    annotations,
    boxes,
    convert,
    errors,
    make_images,
    reasons,
)


def shape(kind: str, *points: tuple[float, float], label: object = "cup", **more: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": [list(point) for point in points], **more}


PIXELS = np.array([[True, True, False], [False, True, True]])
SQUARE = shape("polygon", (10, 5), (30, 5), (30, 25), (10, 25))
BOX = shape("rectangle", (30, 25), (10, 5))
MASK = shape("mask", (10, 5), (12, 6), mask=base64.b64encode(encode_bitmap(PIXELS)).decode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_images(tmp_path, "a.png")
    return tmp_path


def save(folder: Path, *shapes: Any, name: str = "a", **head: Any) -> None:
    content = {"imagePath": "../images/a.png", "imageWidth": WIDTH, "imageHeight": HEIGHT, "shapes": list(shapes)}
    (folder / "labels" / f"{name}.json").write_text(json.dumps({**content, **head}))


def test_each_kind_of_shape_is_an_object(folder: Path) -> None:
    save(folder, SQUARE, {**BOX, "label": "ant"}, {**MASK, "label": "bee"}, shape("circle", (40, 20), (43, 24)))
    assert convert(folder, "labelme") == 0
    assert boxes(folder)["a.png"] == [
        ("cup", [10, 5, 20, 20]),
        ("ant", [10, 5, 20, 20]),
        ("bee", [10, 5, 3, 2]),
        ("cup", pytest.approx([35, 15, 10, 10])),
    ]
    outline, box, mask, disc = annotations(folder)
    assert outline["segmentation"] == [[10, 5, 30, 5, 30, 25, 10, 25]]
    assert "segmentation" not in box
    frame = np.zeros((HEIGHT, WIDTH), bool)
    frame[5:7, 10:13] = PIXELS
    assert (decode_mask(Rle.from_coco(mask["segmentation"])) == frame).all()
    assert disc["area"] == pytest.approx(np.pi * 25, abs=3)


@pytest.mark.parametrize("radius", [0.3, 5, 500, 40_000])
def test_a_circle_is_as_close_to_its_outline_as_stated(radius: float) -> None:
    points = np.reshape(circle(7, 9, 7, 9 + radius), (-1, 2)) - [7, 9]
    middles = (points + np.roll(points, -1, axis=0)) / 2
    assert np.hypot(*points.T) == pytest.approx(radius)
    assert radius - np.hypot(*middles.T).min() <= ARC_ERROR_PX
    assert (points.min(), points.max()) == pytest.approx((-radius, radius))


def test_shapes_of_one_group_and_pairs_of_box_and_mask_are_one_object(folder: Path) -> None:
    other = shape("polygon", (50, 5), (60, 5), (60, 9))
    save(folder, {**SQUARE, "group_id": 1}, {**other, "group_id": 1}, {**other, "label": "ant"}, name="a")
    assert convert(folder, "labelme") == 0
    first, second = annotations(folder)
    assert (len(first["segmentation"]), first["bbox"]) == (2, [10, 5, 50, 20])
    assert second["bbox"] == [50, 5, 10, 4]
    save(folder, BOX, SQUARE)
    assert convert(folder, "labelme") == 0
    (row,) = annotations(folder)
    assert (row["bbox"], row["segmentation"]) == ([10, 5, 20, 20], [[10, 5, 30, 5, 30, 25, 10, 25]])


def test_descriptions_and_flags_are_kept(folder: Path) -> None:
    save(folder, {**SQUARE, "description": "score 0.5", "flags": {"MULTI_PART": True, "other": False}})
    assert convert(folder, "labelme") == 0
    (row,) = annotations(folder)
    assert (row["description"], row["flags"]) == ("score 0.5", ["MULTI_PART"])


@pytest.mark.parametrize(
    "bad",
    [
        shape("point", (1, 2)),
        shape("line", (1, 2), (3, 4)),
        shape("linestrip", (1, 2), (3, 4), (5, 9)),
        shape("points", (1, 2), (3, 4)),
        shape("oriented_rectangle", (1, 2), (9, 2), (9, 8), (1, 8)),
        shape("polygon", (1, 2), (3, 4)),
        shape("polygon", (1, 2), (3, 4), (5, 6)),
        shape("rectangle", (1, 2), (1, 9)),
        shape("rectangle", (1, 2)),
        shape("circle", (1, 2), (1, 2)),
        shape("polygon", (1, 2), (3, 4), (5, float("inf"))),
        {**SQUARE, "points": [[1], [2, 3], [4, 5]]},
        {**SQUARE, "points": 7},
        {**SQUARE, "shape_type": []},
        {**SQUARE, "shape_type": {"polygon": 1}},
        {**SQUARE, "label": None},
        {**SQUARE, "label": " "},
        {**MASK, "mask": None},
        {**MASK, "mask": "no base64!"},
        {**MASK, "mask": base64.b64encode(b"no PNG").decode()},
        {**MASK, "points": [[10, 5], [13, 6]]},
        {**MASK, "points": [[WIDTH - 2, 5], [WIDTH, 6]]},
        {**MASK, "points": [[10.5, 5], [12.5, 6]]},
        "no object",
    ],
)
def test_another_shape_is_listed_with_its_file_and_place(folder: Path, bad: Any) -> None:
    save(folder, SQUARE, bad, {**SQUARE, "label": "ant"})
    assert convert(folder, "labelme") == 3
    assert reasons(folder) == [("a.json:shape 2", "BAD_ROW")]
    assert [name for name, _ in boxes(folder)["a.png"]] == ["cup", "ant"]


def test_every_shape_of_an_object_is_listed_with_the_shape_that_keeps_it_out(folder: Path) -> None:
    line = shape("polygon", (1, 2), (3, 4), (5, 6))
    far = shape("circle", (30, 30), (1e7, 30))
    box = shape("rectangle", (30, 5), (40, 15))
    group = [{**found, "label": "ant", "group_id": 1} for found in (box, far, shape("polygon", (1, 2), (9, 2), (9, 9)))]
    save(folder, {**box, "group_id": 2}, {**line, "group_id": 2}, *group, SQUARE)
    assert convert(folder, "labelme") == 3
    assert len(annotations(folder)) == 1
    messages = {row["where"]: row["message"] for row in errors(folder)}
    assert list(messages) == [f"a.json:shape {number}" for number in range(1, 6)]
    assert "polygon has no pixel" in messages["a.json:shape 2"]
    assert "polygon: " in messages["a.json:shape 4"]
    causes = {where: text.partition(" with ")[2].partition(",")[0] for where, text in messages.items()}
    assert [causes[f"a.json:shape {number}"] for number in (1, 3, 5)] == [
        *("a.json:shape 2", "a.json:shape 4", "a.json:shape 4")
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"shapes": 1}', '{"shapes": []}', '{"images": [], "annotations": []}', "[" * 100_000]
    + [f'{{"imageWidth": {size}, "imageHeight": 50, "shapes": []}}' for size in ("null", "-80", '"80"', "1e400")],
)
def test_a_file_of_another_kind_is_listed_and_the_others_are_read(folder: Path, text: str) -> None:
    make_images(folder, "b.png")
    save(folder, SQUARE)
    (folder / "labels" / "b.json").write_text(text)
    assert convert(folder, "labelme") == 3
    assert reasons(folder) == [("b.json", "BAD_FILE")]
    assert len(annotations(folder)) == 1


@pytest.mark.parametrize(
    ("name", "path", "found"),
    [("a", "..\\images\\a.png", True), ("x", "C:\\data\\a.png", True), ("a", "gone.png", True), ("x", "y.png", False)],
)
def test_the_image_is_found_by_its_path_or_the_name_of_the_file(
    folder: Path, name: str, path: str, found: bool
) -> None:
    save(folder, SQUARE, name=name, imagePath=path)
    assert convert(folder, "labelme") == (0 if found else 3)
    assert len(boxes(folder)["a.png"]) == found
    if not found:
        assert reasons(folder) == [("x.json", "BAD_IMAGE")]


def test_a_size_that_is_not_that_of_the_image_is_listed(folder: Path) -> None:
    save(folder, SQUARE, imageWidth=WIDTH * 2, imageHeight=HEIGHT * 2)
    assert convert(folder, "labelme") == 3
    assert reasons(folder) == [("a.json:shape 1", "IMAGE_SIZE_MISMATCH")]


@pytest.mark.parametrize("form", ["polygon", "mask"])
def test_exported_masks_come_back_exactly(tmp_path: Path, form: str) -> None:
    dataset: Dataset = make_dataset(tmp_path)
    for row in dataset.coco["annotations"]:
        row["segmentation"] = encode_mask(ring()).to_coco()
    dataset.save()
    images, target = ["--images", str(dataset.images_dir)], dataset.folder / "labelme"
    given = ["--annotations", str(dataset.json_path), *images, "--output", str(target), "--shape", form]
    assert main(["export", "--to", "labelme", *given]) == 0
    back = dataset.folder / "back.json"
    assert main(["convert", "--from", "labelme", "--labels", str(target), *images, "--output", str(back)]) == 0
    rows = json.loads(back.read_text())["annotations"]
    assert len(rows) == len(dataset.coco["annotations"])
    if form == "mask":
        assert all((decode_mask(Rle.from_coco(row["segmentation"])) == ring()).all() for row in rows)
    else:
        assert {row["area"] for row in rows} == {int(ring().sum())}
