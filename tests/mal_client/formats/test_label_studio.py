"""Masks and boxes from Label Studio's JSON export."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from mal_client.cli.common import EXIT_SOME_FAILED
from mal_client.cli.main import main
from mal_client.formats.boxes import BoxRecord, EmptyImage, RowError
from mal_client.formats.label_files import ImageNames
from mal_client.formats.label_studio import read_label_studio, upload_name
from mal_client.integrations.label_studio.brush import decode_brush, encode_brush
from mal_client.integrations.label_studio.label_config import Control
from mal_client.integrations.label_studio.regions import mask_regions, read_rectangle, tight_box_region
from mal_client.types import BoxLabel
from PIL import Image

from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import Rle, area, encode_mask, from_segmentation, to_box
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset, make_dataset
from tests.mal_client.review.test_queue import with_scores

Json = dict[str, Any]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path)


def noisy_mask(seed: int, hw: tuple[int, int] = (HEIGHT, WIDTH)) -> Rle:
    """Returns a mask with several components and holes."""
    mask = np.zeros(hw, dtype=bool)
    mask[4:20, 6:30] = np.random.default_rng(seed).random((16, 24)) > 0.2
    return encode_mask(mask)


def region(kind: str, value: Mapping[str, Any], region_id: str = "a", label: str = "cup") -> Json:
    return {
        "id": region_id,
        "type": kind,
        "from_name": "mask",
        "to_name": "image",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": {**value, kind: [label]},
    }


def brush(rle: Rle, region_id: str = "a", label: str = "cup") -> Json:
    return region("brushlabels", {"format": "rle", "rle": encode_brush(rle)}, region_id, label)


def rectangle(box: tuple[float, float, float, float], region_id: str = "a", label: str = "cup") -> Json:
    x, y, w, h = (v * 100 / side for v, side in zip(box, (WIDTH, HEIGHT, WIDTH, HEIGHT), strict=True))
    return region("rectanglelabels", {"x": x, "y": y, "width": w, "height": h, "rotation": 0}, region_id, label)


def task(*results: Any, url: str = "/data/local-files/?d=images/image_0.png", **more: Any) -> Json:
    annotation = {"id": 7, "result": list(results), "was_cancelled": False, "updated_at": "2026-11-30T10:00:00Z"}
    return {"id": 3, "data": {"image": url}, "annotations": [annotation], **more}


def read(dataset: Dataset, *tasks: Any) -> list[BoxRecord | RowError]:
    path = dataset.folder / "export.json"
    path.write_text(json.dumps(tasks))
    return rows_of(path, [f"image_{number}.png" for number in range(3)])


def rows_of(path: Path, names: list[str]) -> list[BoxRecord | RowError]:
    """Returns the objects and the errors of an export."""
    return [row for row in read_label_studio(path, ImageNames(names)) if not isinstance(row, EmptyImage)]


def converted(dataset: Dataset, export: Any, *more: str) -> tuple[int, Json]:
    path, output = dataset.folder / "export.json", dataset.folder / "converted.json"
    path.write_text(json.dumps(export))
    given = ["--from", "label-studio", "--labels", str(path), "--images", str(dataset.images_dir), *more]
    return main(["convert", *given, "--output", str(output)]), json.loads(output.read_text())


def test_brush_masks_and_their_boxes_come_back_exactly(dataset: Dataset) -> None:
    rle = noisy_mask(0)
    code, coco = converted(dataset, [task(rectangle((5, 3, 27, 18)), brush(rle, "a-mask"), brush(noisy_mask(1), "b"))])
    assert code == 0
    first, second = coco["annotations"]
    assert first["segmentation"] == rle.to_coco()
    assert (first["bbox"], first["area"]) == ([5, 3, 27, 18], area(rle))
    assert second["segmentation"] == noisy_mask(1).to_coco()
    assert coco["images"] == [{"id": 1, "file_name": "image_0.png", "width": WIDTH, "height": HEIGHT}]
    assert coco["categories"] == [{"id": 1, "name": "cup"}]


def test_tasks_of_review_come_back_as_they_were(tmp_path: Path) -> None:
    dataset = with_scores(tmp_path)
    tasks = dataset.folder / "tasks.json"
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), "--worst", "9"]
    assert main(["review", *given, "--label-studio", str(tasks)]) == 0
    export = json.loads(tasks.read_text())
    for number, row in enumerate(export):  # as accepted by a user
        row |= {"id": number, "annotations": [{"id": 1, "result": row["predictions"][0]["result"]}]}
    code, coco = converted(dataset, export)
    assert code == 0
    assert len(coco["annotations"]) == len(dataset.coco["annotations"])
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    key = "segmentation"
    found = sorted((names[row["image_id"]], row["bbox"], str(row.get(key))) for row in coco["annotations"])
    known = {image["id"]: image["file_name"] for image in dataset.coco["images"]}
    for row in dataset.coco["annotations"]:
        if "error" in row:
            del row[key]
    expected = [(known[row["image_id"]], row["bbox"], str(row.get(key))) for row in dataset.coco["annotations"]]
    assert found == sorted(expected)


@pytest.mark.parametrize("seed", range(5))
def test_polygons_of_the_backend_come_back_as_the_same_pixels(dataset: Dataset, seed: int) -> None:
    rle = noisy_mask(seed)
    label = BoxLabel(index=0, box=(5, 3, 27, 18), rle=rle, score=0.5)
    control = Control("mask", "image", "polygonlabels", ("cup",))
    regions = mask_regions(label, control, ("cup",), "a-mask", tolerance_px=0.0)
    code, coco = converted(dataset, [task(rectangle((5, 3, 27, 18)), *regions)])
    assert (code, len(coco["annotations"])) == (0, 1)
    (row,) = coco["annotations"]
    assert from_segmentation(row["segmentation"], HEIGHT, WIDTH) == rle
    assert row["bbox"] == [5, 3, 27, 18]


def test_a_box_and_a_mask_drawn_apart_are_one_object_if_they_overlap(dataset: Dataset) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[4:20, 6:30] = True
    near, far, other = rectangle((5, 3, 26, 18), "r1"), rectangle((30, 20, 8, 8), "r2"), brush(encode_mask(mask), "m")
    rows = [row for row in read(dataset, task(near, far, other)) if isinstance(row, BoxRecord)]
    assert [(row.xyxy, row.segmentation is None) for row in rows] == [((5, 3, 31, 21), False), ((30, 20, 38, 28), True)]
    rows = [
        row for row in read(dataset, task(near, brush(encode_mask(mask), "m", "hat"))) if isinstance(row, BoxRecord)
    ]
    assert len(rows) == 2, "another class is another object"


def test_labels_of_a_control_of_their_own_are_those_of_the_region(dataset: Dataset) -> None:
    plain = rectangle((5, 3, 10, 8))
    plain["type"] = "rectangle"
    labels = copy.deepcopy(plain) | {"type": "labels"}
    plain["value"].pop("rectanglelabels")
    labels["value"]["labels"] = ["hat"]
    (row,) = read(dataset, task(plain, labels))
    assert isinstance(row, BoxRecord)
    assert row.category == "hat"


@pytest.mark.parametrize(
    "url",
    [
        "/data/local-files/?d=any/where/a%20b%2B%231.png",
        "http://host:1/a/a%20b%2B%231.png?sig=1",
        "s3://bucket/a b+#1.png",
        f"/data/upload/12/0f3c9a1b-{upload_name('a b+#1.png')}",
        quote("a b+#1.png"),
    ],
)
def test_an_image_is_found_by_the_url_of_its_task(dataset: Dataset, url: str) -> None:
    path = dataset.folder / "export.json"
    path.write_text(json.dumps([task(rectangle((5, 3, 10, 8)), url=url)]))
    (row,) = rows_of(path, ["a b+#1.png", "other.png"])
    assert isinstance(row, BoxRecord), row
    assert row.file_name == "a b+#1.png"
    (row,) = rows_of(path, ["x/a b+#1.png", "y/a b+#1.png"])
    assert isinstance(row, RowError), "neither folder is in the URL"


def test_urls_that_can_mean_one_image_are_errors_but_for_its_exact_name(dataset: Dataset) -> None:
    urls = [f"/data/local-files/?d={name}" for name in ("cam0/image_0.png", "cam1/image_0.png", "image_1.png")]
    urls.append("/data/local-files/?d=cam1/image_1.png")
    rows = read(dataset, *(task(rectangle((5, 3, 10, 8)), url=url) for url in urls))
    found = [row.reason if isinstance(row, RowError) else row.file_name for row in rows]
    assert found == ["BAD_IMAGE", "BAD_IMAGE", "image_1.png", "BAD_IMAGE"]


def test_two_tasks_of_one_url_are_of_one_image(dataset: Dataset) -> None:
    code, coco = converted(dataset, [task(rectangle((5, 3, 10, 8))), task(rectangle((1, 1, 3, 3)))])
    assert (code, len(coco["images"]), len(coco["annotations"])) == (0, 1, 2)


def test_eight_digits_in_a_name_are_no_prefix_of_an_upload(dataset: Dataset) -> None:
    path = dataset.folder / "export.json"
    path.write_text(json.dumps([task(rectangle((5, 3, 10, 8)), url="/data/upload/1/scan-deadbeef-1.png")]))
    (row,) = rows_of(path, ["scan-1.png"])
    assert isinstance(row, RowError)


@pytest.mark.parametrize("is_drawn_kept", [True, False])
def test_a_tight_box_is_no_object_of_its_own(dataset: Dataset, is_drawn_kept: bool) -> None:
    rle = noisy_mask(0)
    label = BoxLabel(index=0, box=(5, 3, 27, 18), rle=rle, score=0.5, mask_box=to_box(rle))
    drawn = rectangle((5, 3, 27, 18))
    tight = tight_box_region(label, read_rectangle(drawn), Control("box", "image", "rectanglelabels", ("cup",)))
    code, coco = converted(dataset, [task(*([drawn] if is_drawn_kept else []), tight, brush(rle, "a-mask"))])
    (row,) = coco["annotations"]
    assert (code, row["segmentation"]) == (0, rle.to_coco())
    assert row["bbox"] == ([5, 3, 27, 18] if is_drawn_kept else list(to_box(rle) or ()))


WRONG: list[tuple[Any, str]] = [
    (task({"id": [1], "type": "labels"}), "BAD_ROW"),
    (task(region("ellipselabels", {"x": 1})), "BAD_ROW"),
    (task(region("choices", {"choices": ["x"]})), "BAD_ROW"),
    (task({**rectangle((5, 3, 10, 8)), "image_rotation": 90}), "BAD_ROW"),
    (task(region("rectanglelabels", {"x": 1, "y": 1, "width": 9, "height": 9, "rotation": 30})), "BAD_ROW"),
    (task(region("brushlabels", {"format": "rle", "rle": [0, 0, 1]})), "BAD_ROW"),
    (task(region("brushlabels", {"format": "rle", "rle": "no"})), "BAD_ROW"),
    (task(region("brushlabels", {"format": "png", "rle": [1]})), "BAD_ROW"),
    (task(brush(noisy_mask(0, (HEIGHT, WIDTH + 1)))), "BAD_ROW"),
    (task(brush(encode_mask(np.zeros((HEIGHT, WIDTH))))), "BAD_ROW"),
    (task(region("polygonlabels", {"points": [[1, 1], [2, 2]]})), "BAD_ROW"),
    (task(region("polygonlabels", {"points": [[1, 1], [2, 2], ["x", 3]]})), "BAD_ROW"),
    (task({**brush(noisy_mask(0)), "value": {"format": "rle", "rle": [1], "brushlabels": ["a", "b"]}}), "BAD_ROW"),
    (task("text"), "BAD_ROW"),
    (task(rectangle((5, 3, 10, 8)), url="/data/local-files/?d=none.png"), "BAD_IMAGE"),
    (task(annotations=[]), "NOT_ANNOTATED"),
    (task(annotations=[{"result": [], "was_cancelled": True}]), "NOT_ANNOTATED"),
    ({"id": 1, "image": "a.png"}, "BAD_ROW"),
    ("text", "BAD_ROW"),
]


@pytest.mark.parametrize(("wrong", "reason"), WRONG)
def test_what_is_not_taken_over_is_listed(dataset: Dataset, wrong: Any, reason: str) -> None:
    good = task(rectangle((5, 3, 10, 8)), url="/data/local-files/?d=image_1.png")
    code, coco = converted(dataset, [wrong, good])
    assert (code, len(coco["annotations"])) == (EXIT_SOME_FAILED, 1)
    (line,) = (dataset.folder / "converted.errors.jsonl").read_text().splitlines()
    error = json.loads(line)
    assert error["reason"] == reason
    assert error["where"].startswith("export.json:task ")


def test_an_image_without_objects_is_kept(dataset: Dataset) -> None:
    other = task(rectangle((5, 3, 10, 8)), url="/data/local-files/?d=image_1.png")
    code, coco = converted(dataset, [task(), other])
    assert (code, len(coco["annotations"])) == (0, 1)
    assert [row["file_name"] for row in coco["images"]] == ["image_0.png", "image_1.png"]


def test_the_newest_annotation_counts_and_older_ones_are_listed(dataset: Dataset) -> None:
    row = task(rectangle((5, 3, 10, 8)))
    older = {"id": 6, "updated_at": "2026-11-29T10:00:00Z", "result": [rectangle((1, 1, 3, 3))]}
    row["annotations"].insert(0, older)
    error, kept = sorted(read(dataset, row), key=lambda found: isinstance(found, BoxRecord))
    assert isinstance(error, RowError)
    assert error.reason == "NOT_NEWEST"
    assert isinstance(kept, BoxRecord)
    assert kept.xyxy == (5, 3, 15, 11)


def test_an_image_that_browsers_rotate_is_listed(dataset: Dataset) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (WIDTH, HEIGHT)).save(dataset.images_dir / "image_0.png", exif=exif)
    code, coco = converted(dataset, [task(brush(noisy_mask(0)))])
    assert (code, coco["annotations"]) == (EXIT_SOME_FAILED, [])
    assert "IMAGE_SIZE_MISMATCH" in (dataset.folder / "converted.errors.jsonl").read_text()


@pytest.mark.parametrize("content", [b"", b"{}", b"[", b'[{"id": 1},', b"\xff\xfe", b"3"])
def test_another_file_is_refused_and_names_the_export(dataset: Dataset, content: bytes) -> None:
    path = dataset.folder / "export.json"
    path.write_bytes(content)
    with pytest.raises(BadDataset, match="Label Studio"):
        list(read_label_studio(path, ImageNames([])))


@pytest.mark.parametrize("seed", range(20))
def test_brush_masks_are_decoded_as_they_were_encoded(seed: int) -> None:
    case = np.random.default_rng(seed)
    height, width = case.integers(1, 60, 2).tolist()
    rle = encode_mask(case.random((height, width)) < case.random())
    code = encode_brush(rle)
    assert decode_brush(code, (width, height)) == rle
    assert decode_brush([*code, 0], (width, height)) == rle  # the SDK appends a zero byte
    with pytest.raises(BadDataset):
        decode_brush(code[:-2], (width, height))


def test_single_values_of_a_brush_mask_are_decoded() -> None:
    """Other encoders write values that do not repeat without a run."""
    bits = f"{8:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}" + "0" + "00" + f"{7:03b}"
    bits += "".join(f"{value:08b}" for value in (0, 0, 0, 0, 255, 255, 255, 255))
    code = [int(bits[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(bits), 8)]
    assert decode_brush(code, (2, 1)) == encode_mask(np.array([[0, 1]]))


@pytest.mark.parametrize(
    ("data", "named"), [({}, "none"), ({"image": 5}, "'image'"), ({"text": "a dog"}, "'text'"), (None, "none")]
)
def test_a_task_without_an_image_is_listed_with_its_fields(data: object, named: str, tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    path.write_text(json.dumps([{"id": 7, "data": data, "annotations": [{"id": 1, "result": []}]}, 5]))
    without_image, no_task = read_label_studio(path, ImageNames(["a.png"]))
    assert isinstance(without_image, RowError)
    assert (without_image.where, without_image.reason) == ("export.json:task 7", "BAD_IMAGE")
    assert without_image.message.endswith(f"its fields are: {named}")
    assert isinstance(no_task, RowError)
    assert (no_task.where, no_task.reason) == ("export.json:task 2", "BAD_ROW")
    assert "a number" in no_task.message
