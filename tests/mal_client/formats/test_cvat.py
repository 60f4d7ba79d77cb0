"""Masks and boxes from CVAT's exports."""

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from mal_client.cli.common import EXIT_SOME_FAILED
from mal_client.cli.main import main
from mal_client.formats.boxes import BoxRecord
from mal_client.formats.cvat import read_cvat
from mal_client.formats.label_files import ImageNames
from mal_client.integrations.cvat.mask_encoding import mask_from_runs, mask_points

from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import Rle, area, encode_mask, from_segmentation, to_box
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset, make_dataset
from tests.mal_client.formats.test_label_studio import noisy_mask
from tests.mal_client.review.test_queue import with_scores

SPAN = 4 * (math.cos(math.radians(30)) + math.sin(math.radians(30)))
"""Side of the upright box around a box of 4 px by 4 px that is rotated by 30 degrees."""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path)


def mask_of(rle: Rle, group: int = 0, label: str = "cup") -> str:
    *runs, left, top, right, bottom = mask_points(rle)
    box = f'left="{left}" top="{top}" width="{right - left + 1}" height="{bottom - top + 1}"'
    return f'<mask label="{label}" group_id="{group}" rle="{", ".join(map(str, runs))}" {box}/>'


def box(*corners: float, group: int = 0, more: str = "") -> str:
    x0, y0, x1, y1 = corners
    return f'<box label="cup" group_id="{group}" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}" {more}/>'


def image(*shapes: str, name: str = "image_0.png", size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    return f'<image id="0" name="{name}" width="{size[0]}" height="{size[1]}">{"".join(shapes)}</image>'


def errors_of(dataset: Dataset) -> list[str]:
    lines = (dataset.folder / "converted.errors.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines]


def converted(dataset: Dataset, content: str, name: str = "annotations.xml", *more: str) -> tuple[int, dict[str, Any]]:
    path, output = dataset.folder / name, dataset.folder / "converted.json"
    path.write_text(
        content if name.endswith(".json") else f"<annotations><version>1.1</version>{content}</annotations>"
    )
    given = ["--from", "cvat", "--labels", str(path), "--images", str(dataset.images_dir), "--output", str(output)]
    return main(["convert", *given, *more]), json.loads(output.read_text())


def test_masks_and_their_boxes_come_back_exactly(dataset: Dataset) -> None:
    shapes = [mask_of(noisy_mask(0), 4), box(5, 3, 32, 21.5, group=4), mask_of(noisy_mask(1))]
    code, coco = converted(dataset, image(*shapes))
    assert code == 0
    first, second = coco["annotations"]
    assert (first["segmentation"], first["bbox"]) == (noisy_mask(0).to_coco(), [5, 3, 27, 18.5])
    assert second["segmentation"] == noisy_mask(1).to_coco()
    assert second["bbox"] == list(to_box(noisy_mask(1)) or ())


def test_annotations_of_review_come_back_as_they_were(tmp_path: Path) -> None:
    dataset = with_scores(tmp_path)
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), "--worst", "9"]
    assert main(["review", *given, "--cvat", str(dataset.folder / "cvat")]) == 0
    text = (dataset.folder / "cvat" / "annotations.xml").read_text()
    code, coco = converted(dataset, "".join(re.findall("<image.*</image>", text, re.DOTALL)))
    assert code == 0
    names = {row["id"]: row["file_name"] for row in coco["images"]}
    known = {row["id"]: row["file_name"] for row in dataset.coco["images"]}
    expected = [
        (known[row["image_id"]], row["bbox"], None if "error" in row else row["segmentation"])
        for row in dataset.coco["annotations"]
    ]
    found = [(names[row["image_id"]], row["bbox"], row.get("segmentation")) for row in coco["annotations"]]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_an_image_without_objects_is_kept(dataset: Dataset) -> None:
    code, coco = converted(dataset, image() + image(box(1, 1, 9, 9), name="image_1.png"))
    assert (code, len(coco["annotations"])) == (0, 1)
    assert [row["file_name"] for row in coco["images"]] == ["image_0.png", "image_1.png"]


def test_parts_in_one_group_are_one_object(dataset: Dataset) -> None:
    left, right = (np.zeros((HEIGHT, WIDTH), dtype=bool) for _ in range(2))
    left[3:9, 3:9], right[3:9, 20:28] = True, True
    polygon = '<polygon label="cup" group_id="2" points="20,3;28,3;28,9;20,9"/>'
    code, coco = converted(dataset, image(mask_of(encode_mask(left), 2), polygon, box(2, 2, 29, 10, group=2)))
    assert code == 0
    (row,) = coco["annotations"]
    assert from_segmentation(row["segmentation"], HEIGHT, WIDTH) == encode_mask(left | right)
    assert (row["bbox"], row["area"]) == ([2, 2, 27, 8], 84)


def test_boxes_in_one_group_are_objects_of_their_own(dataset: Dataset) -> None:
    code, coco = converted(dataset, image(box(1, 1, 9, 9, group=3), box(11, 1, 19, 9, group=3)))
    assert (code, len(coco["annotations"])) == (0, 2)


def test_masks_of_cvats_coco_export_are_objects(dataset: Dataset) -> None:
    """CVAT marks every mask as a crowd there."""
    rle = noisy_mask(0)
    runs = {"size": [HEIGHT, WIDTH], "counts": rle.to_coco()["counts"]}
    rows = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [6, 4, 24, 16], "iscrowd": 1, "segmentation": runs,
         "attributes": {"occluded": False, "rotation": 0.0}},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "iscrowd": 0, "segmentation": [],
         "attributes": {"rotation": 30.0}},
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "iscrowd": 0,
         "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]},
    ]  # fmt: skip
    images = [{"id": 1, "file_name": "image_0.png", "width": WIDTH, "height": HEIGHT}]
    export = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cup"}]}
    code, coco = converted(dataset, json.dumps(export), "instances_default.json")
    assert code == EXIT_SOME_FAILED
    assert [(row["iscrowd"], row["segmentation"]) for row in coco["annotations"]] == [
        (0, rle.to_coco()),
        (0, [[1, 1, 5, 1, 5, 5, 1, 5]]),
    ]
    assert errors_of(dataset) == ["BOX_ROTATED"]
    code, coco = converted(dataset, json.dumps(export), "instances_default.json", "--rotated-boxes", "upright")
    assert code == 0
    assert coco["annotations"][1]["bbox"] == pytest.approx([3 - SPAN / 2, 3 - SPAN / 2, SPAN, SPAN])
    assert len(coco["annotations"][1]["rotated_box"]) == 8


def test_a_rotated_box_is_refused_by_name_or_taken_upright(dataset: Dataset) -> None:
    shapes = [box(1, 1, 5, 5, more='rotation="390"'), box(5, 3, 32, 21.5, group=4, more='rotation="1"')]
    content = image(*shapes, mask_of(noisy_mask(0), 4))
    code, coco = converted(dataset, content)
    assert (code, errors_of(dataset)) == (EXIT_SOME_FAILED, ["BOX_ROTATED"] * 2)
    assert [row["segmentation"] for row in coco["annotations"]] == [noisy_mask(0).to_coco()]
    code, coco = converted(dataset, content, "annotations.xml", "--rotated-boxes", "upright")
    assert code == 0
    alone, with_mask = coco["annotations"]
    assert alone["bbox"] == pytest.approx([3 - SPAN / 2, 3 - SPAN / 2, SPAN, SPAN])
    center = np.reshape(alone["rotated_box"], (4, 2)).mean(0)
    assert center == pytest.approx([3, 3])
    assert with_mask["segmentation"] == noisy_mask(0).to_coco()
    assert with_mask["bbox"][2] > 27


def test_rows_of_the_coco_export_that_are_no_objects_are_listed_at_their_place(dataset: Dataset) -> None:
    export = json.loads(coco_export({"bbox": [1, 1, 4, 4], "segmentation": []}))
    export["annotations"] = [None, *export["annotations"], 5]
    export["images"] += [
        None,
        {"id": 8, "width": WIDTH, "height": HEIGHT},
        {"id": 9, "file_name": "image_2.png", "width": WIDTH, "height": HEIGHT},
    ]
    code, coco = converted(dataset, json.dumps(export), "instances_default.json")
    assert (code, len(coco["annotations"])) == (EXIT_SOME_FAILED, 1)
    assert "image_2.png" in [row["file_name"] for row in coco["images"]]
    lines = (dataset.folder / "converted.errors.jsonl").read_text().splitlines()
    listed = [(row["where"].partition(":")[2], row["reason"]) for row in map(json.loads, lines)]
    assert sorted(listed) == [
        ("annotations[0]", "NOT_AN_OBJECT"),
        ("annotations[2]", "NOT_AN_OBJECT"),
        ("image 8", "IMAGE_UNUSABLE"),
        ("images[1]", "IMAGE_UNUSABLE"),
    ]


@pytest.mark.parametrize("name", ["annotations.xml", "instances_default.json"])
@pytest.mark.parametrize("text", ["", " \n", "\ufeff"])
def test_an_empty_export_is_named_as_empty(
    dataset: Dataset, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dataset.folder / name
    path.write_text(text, encoding="utf-8")
    given = ["--labels", str(path), "--images", str(dataset.images_dir), "--output", str(dataset.output)]
    assert main(["convert", "--from", "cvat", *given]) == 2
    assert f"{path}: empty file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rotation", "reason"),
    [("1e-7", None), ("180", None), ("", None), ("true", "BAD_ROW"), ("1_0", "BAD_ROW"), ("45", "BOX_ROTATED")],
)
def test_only_an_angle_that_moves_a_corner_rotates_a_box(dataset: Dataset, rotation: str, reason: str | None) -> None:
    code, coco = converted(dataset, image(box(1, 1, 5, 9, more=f'rotation="{rotation}"'), box(1, 1, 9, 9)))
    if reason is None:
        assert (code, coco["annotations"][0]["bbox"]) == (0, [1, 1, 4, 8])
    else:
        assert (code, errors_of(dataset)) == (EXIT_SOME_FAILED, [reason])


def test_names_that_can_mean_one_image_are_errors_but_for_its_exact_name(dataset: Dataset) -> None:
    names = ["cam0/image_0.png", "cam1/image_0.png", "image_1.png", "cam0/image_1.png"]
    code, coco = converted(dataset, "".join(image(box(1, 1, 9, 9), name=name) for name in names))
    assert (code, errors_of(dataset)) == (EXIT_SOME_FAILED, ["BAD_IMAGE"] * 3)
    assert [row["file_name"] for row in coco["images"]] == ["image_1.png"]


@pytest.mark.parametrize("form", ["xml", "json"])
def test_images_of_one_name_are_errors(dataset: Dataset, form: str) -> None:
    names = ["image_0.png", "image_0.png", "image_1.png"]
    if form == "xml":
        content = "".join(image(box(1, 1, 9, 9), name=name) for name in names)
    else:
        images = [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(names)]
        rows = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 8, 8]} for i in range(3)]
        content = json.dumps({"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cup"}]})
    code, coco = converted(dataset, content, f"export.{form}" if form == "json" else "annotations.xml")
    assert (code, errors_of(dataset)) == (EXIT_SOME_FAILED, ["BAD_IMAGE"] * 2)
    assert [row["file_name"] for row in coco["images"]] == ["image_1.png"]
    assert len(coco["annotations"]) == 1


def test_a_damaged_gzip_file_is_refused_with_its_damage(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(f"<annotations>{image(box(1, 1, 5, 5))}</annotations>".encode()))
    content[-8] ^= 1  # the first byte of the checksum
    (tmp_path / "export.xml.gz").write_bytes(content)
    with pytest.raises(BadDataset, match="CRC"):
        list(read_cvat(tmp_path / "export.xml.gz", ImageNames(["image_0.png"])))


def test_a_tight_box_that_a_tool_added_is_no_object_of_its_own(dataset: Dataset) -> None:
    x, y, w, h = to_box(noisy_mask(0)) or (0, 0, 0, 0)
    tight = box(x, y, x + w, y + h, more='source="auto"')
    code, coco = converted(dataset, image(box(5, 3, 32, 21.5), mask_of(noisy_mask(0)), tight))
    (row,) = coco["annotations"]
    assert (code, row["bbox"], row["segmentation"]) == (0, [5, 3, 27, 18.5], noisy_mask(0).to_coco())
    code, coco = converted(dataset, image(mask_of(noisy_mask(0)), tight, box(1, 1, 4, 4, more='source="auto"')))
    assert [row["bbox"] for row in coco["annotations"]] == [[x, y, w, h], [1, 1, 3, 3]]


def coco_export(*rows: dict[str, Any]) -> str:
    images = [{"id": 1, "file_name": "image_0.png", "width": WIDTH, "height": HEIGHT}]
    annotations = [{"id": number, "image_id": 1, "category_id": 1, **row} for number, row in enumerate(rows, start=1)]
    return json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}]})


def test_a_box_and_its_mask_in_the_coco_export_are_one_object_with_the_area_of_the_mask(dataset: Dataset) -> None:
    rle = noisy_mask(0)
    x, y, w, h = to_box(rle) or (0, 0, 0, 0)
    mask = {"bbox": [x, y, w - 1, h - 1], "iscrowd": 1, "segmentation": rle.to_coco()}
    polygons = [[1, 21, 5, 21, 5, 25], [8, 21, 12, 21, 12, 25], [1, 1]]
    parts = {"bbox": [1, 21, 20, 4], "segmentation": polygons}
    content = coco_export(mask, {"bbox": [5, 3, 27, 18.5], "segmentation": []}, parts)
    code, coco = converted(dataset, content, "instances.json")
    assert code == 0
    first, second = coco["annotations"]
    assert (first["bbox"], first["segmentation"], first["area"]) == ([5, 3, 27, 18.5], rle.to_coco(), area(rle))
    assert (second["bbox"], second["segmentation"]) == ([1, 21, 20, 4], polygons[:2])
    assert second["area"] == area(from_segmentation(polygons, HEIGHT, WIDTH))


@pytest.mark.parametrize(
    "wrong",
    [
        {"segmentation": "abc"},
        {"segmentation": [[1, 2]]},
        {"segmentation": [[1, 2, 3, 4, 5]]},
        {"segmentation": noisy_mask(0, (HEIGHT, WIDTH + 1)).to_coco()},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "x"}},
        {"category_id": 7},
        {"category_id": None},
        {"keypoints": [2, 2, 2], "num_keypoints": 1},
    ],
)
def test_rows_of_the_coco_export_that_cannot_be_read_are_listed(dataset: Dataset, wrong: dict[str, Any]) -> None:
    content = coco_export({"bbox": [1, 1, 4, 4], **wrong}, {"bbox": [9, 1, 4, 4]})
    code, coco = converted(dataset, content, "instances.json")
    assert (code, errors_of(dataset)) == (EXIT_SOME_FAILED, ["BAD_ROW"])
    assert [row["bbox"] for row in coco["annotations"]] == [[9, 1, 4, 4]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_first_character_shows_the_form_of_an_export_under_any_name(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "download"
    for content in (coco_export({"bbox": [1, 1, 4, 4]}), f"<annotations>{image(box(1, 1, 5, 5))}</annotations>"):
        path.write_text(f"\n{content}", encoding=encoding)
        rows = list(read_cvat(path, ImageNames(["image_0.png"]), name="export"))
        (row,) = (row for row in rows if isinstance(row, BoxRecord))
        assert row.xyxy == (1, 1, 5, 5)
        assert row.where.startswith("export:")


WRONG = [
    image(box(1, 1, 9, 9, more='rotation="30.0"')),
    image(box(9, 1, 1, 9)),
    image('<box label="cup" xtl="nan" ytl="1" xbr="9" ybr="9"/>'),
    image('<box xtl="1" ytl="1" xbr="9" ybr="9"/>'),
    image('<mask label="cup" rle="1, 2" left="0" top="0" width="2" height="2"/>'),
    image('<mask label="cup" rle="4" left="39" top="0" width="2" height="2"/>'),
    image('<mask label="cup" rle="4" left="0" top="0" width="2" height="2"/>'),
    image('<mask label="cup" rle="x" left="0" top="0" width="2" height="2"/>'),
    image('<mask label="cup" rle="" left="0" top="0" width="2" height="2"/>'),
    image('<polygon label="cup" points="1,1;2,2"/>'),
    image('<polygon label="cup" points="1,1;2,2;3"/>'),
    image('<polyline label="cup" points="1,1;2,2"/>'),
    image('<ellipse label="cup" cx="1" cy="1" rx="1" ry="1"/>'),
    image('<tag label="cup"/>'),
    image(box(1, 1, 9, 9), name="none.png"),
    image(box(1, 1, 9, 9), size=(WIDTH + 1, HEIGHT)),
    '<image id="0" name="image_0.png" width="x" height="3"/>',
    '<track id="0" label="cup"><box frame="0" xtl="1" ytl="1" xbr="9" ybr="9"/></track>',
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_taken_over_is_listed(dataset: Dataset, wrong: str) -> None:
    code, coco = converted(dataset, wrong + image(box(1, 1, 9, 9), name="image_1.png"))
    assert (code, len(coco["annotations"])) == (EXIT_SOME_FAILED, 1)
    (line,) = (dataset.folder / "converted.errors.jsonl").read_text().splitlines()
    assert json.loads(line)["where"].startswith("annotations.xml:")


@pytest.mark.parametrize(
    "content", ["", "<html/>", "<annotations><image", '<?xml version="1.0" encoding="no-such"?><annotations/>']
)
def test_another_file_is_refused_and_names_the_export(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(content)
    with pytest.raises(BadDataset, match="CVAT for images"):
        list(read_cvat(path, ImageNames([])))


@pytest.mark.parametrize("content", ["[]", "{", '["images"]'])
def test_another_json_file_is_refused_and_names_the_exports_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "a").write_text(content)
    with pytest.raises(BadDataset, match="CVAT for images") as raised:
        list(read_cvat(tmp_path / "a", ImageNames([])))
    assert "give a COCO annotation file" not in str(raised.value)


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_decoded_as_they_were_encoded(seed: int) -> None:
    case = np.random.default_rng(seed)
    height, width = case.integers(1, 60, 2).tolist()
    mask = case.random((height, width)) < case.random()
    mask[height // 2, width // 3] = True
    *runs, left, top, right, bottom = mask_points(encode_mask(mask))
    region = (left, top, right - left + 1, bottom - top + 1)
    assert mask_from_runs(runs, region, (width, height)) == encode_mask(mask)


def test_an_image_in_a_folder_is_found_by_the_end_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "image", {"name": "b/c.png", "width": "9", "height": "9"}).append(
        ElementTree.Element("box", {"label": "cup", "xtl": "1", "ytl": "1", "xbr": "3", "ybr": "3"})
    )
    ElementTree.ElementTree(root).write(path)
    for names, expected in ((["b/c.png", "c.png"], "b/c.png"), (["c.png"], "c.png"), (["a/b/c.png"], "a/b/c.png")):
        (row,) = (row for row in read_cvat(path, ImageNames(names)) if isinstance(row, BoxRecord))
        assert row.file_name == expected
