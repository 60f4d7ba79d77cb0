"""Tests of the dataset check."""

import json
from pathlib import Path

import numpy as np
import pytest
from mal_client.cli.main import main
from mal_client.dataset_check.check import check_dataset
from mal_client.dataset_check.report import NO_ISSUES, CheckReport, Severity
from PIL import Image

from mal_train.core.errors import BadDataset
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, serving
from tests.mal_train.core.images.tiffs import tiff_of


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path)


def check(dataset: Dataset, *, decode: bool = True) -> CheckReport:
    dataset.save()
    return check_dataset(dataset.json_path, dataset.images_dir, decode=decode)


def counts(report: CheckReport) -> dict[str, int]:
    return {code: issue.count for code, issue in report.issues.items()}


def test_a_valid_dataset_has_no_issues_and_its_sizes_are_counted(dataset: Dataset) -> None:
    report = check(dataset)
    assert counts(report) == {}
    assert (report.images, report.annotations, report.by_category) == (3, 6, {"cup": 6})
    assert report.image_sizes == {f"{WIDTH} × {HEIGHT}": 3}
    assert report.boxes_by_size == {"small": 6}
    assert report.side_histogram() == {"8–16 px": 6}


def test_missing_truncated_and_non_image_files_are_distinct_issues(dataset: Dataset) -> None:
    paths = sorted(dataset.images_dir.iterdir())
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-400])
    paths[2].write_text("not an image")
    report = check(dataset)
    assert counts(report) == {"IMAGE_NOT_FOUND": 1, "IMAGE_DECODE_FAILED": 1, "IMAGE_FORMAT": 1}
    assert "image_1.png" in report.issues["IMAGE_DECODE_FAILED"].examples[0]
    assert report.count(Severity.ERROR) == 3


def test_headers_only_does_not_find_a_truncated_file(dataset: Dataset) -> None:
    path = dataset.images_dir / "image_1.png"
    path.write_bytes(path.read_bytes()[:-400])
    dataset.coco["images"][0]["width"] = WIDTH + 1
    assert counts(check(dataset, decode=False)) == {"IMAGE_SIZE_MISMATCH": 1}


def test_exif_orientation_and_several_frames_are_warnings(dataset: Dataset) -> None:
    pixels = Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(dataset.images_dir / "rotated.jpg", exif=exif)
    other = Image.fromarray(np.full((HEIGHT, WIDTH, 3), 200, dtype=np.uint8))
    pixels.save(dataset.images_dir / "animated.webp", save_all=True, append_images=[other])
    dataset.coco["images"][0]["file_name"] = "rotated.jpg"
    dataset.coco["images"][1]["file_name"] = "animated.webp"
    report = check(dataset)
    assert counts(report) == {"EXIF_ORIENTATION": 1, "SEVERAL_FRAMES": 1, "FILE_NOT_LISTED": 2}
    assert report.issues["EXIF_ORIENTATION"].examples == ["rotated.jpg: EXIF orientation 6"]
    assert report.count(Severity.ERROR) == 0


def test_files_of_other_values_are_warnings_and_of_other_bands_errors_that_name_them(dataset: Dataset) -> None:
    gray = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    files = {
        "thermal.tif": tiff_of(gray.astype(np.uint16)),
        "heights.tif": tiff_of(gray.astype(np.float32)),
        "infrared.tif": tiff_of(np.dstack([gray] * 4).astype(np.uint8), extra=(0,)),
        "five.tif": tiff_of(np.dstack([gray] * 5).astype(np.float32), extra=(0, 0, 0, 0)),
    }
    for name, content in files.items():
        (dataset.images_dir / name).write_bytes(content)
        dataset.coco["images"].append({"id": name, "file_name": name, "width": WIDTH, "height": HEIGHT})
    dataset.save()
    for decode in (True, False):
        report = check(dataset, decode=decode)
        assert report.issues["PIXELS_STRETCHED"].examples == [
            "thermal.tif: 16-bit unsigned, 1 band",
            "heights.tif: 32-bit float, 1 band",
        ]
        assert report.issues["BANDS_DROPPED"].examples == ["infrared.tif: 8-bit unsigned, 4 bands"]
        assert report.issues["PIXELS_STRETCHED"].severity is Severity.WARNING
        assert report.issues["IMAGE_FORMAT"].severity is Severity.ERROR
        (example,) = report.issues["IMAGE_FORMAT"].examples
        assert "five.tif: 5 bands" in example


def test_errors_are_the_boxes_that_labeling_would_fail(dataset: Dataset) -> None:
    rows = dataset.coco["annotations"]
    boxes = [[500, 500, 5, 5], [1, 2, 0, 5], [-3, 2, 10, 10], [5, 5, 1.5, 9], [2, 2, 8, 8], [2, 2, 8, 8]]
    for row, box in zip(rows, boxes, strict=True):
        row["bbox"] = box
    report = check(dataset)
    assert counts(report) == {
        "BOX_OUTSIDE": 1,
        "BOX_EMPTY": 1,
        "BOX_CLIPPED": 1,
        "BOX_SMALL": 1,
        "DUPLICATE_BOX": 1,
    }
    with serving(FakeServer()) as address:
        given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
        assert main(["label", "--server", address, *given, "--output", str(dataset.output)]) == 3
    failed = [row["id"] for row in dataset.labeled().values() if "error" in row]
    assert len(failed) == report.count(Severity.ERROR)


@pytest.mark.parametrize(
    ("box", "code"),
    [
        ([5.2, 5.2, 0.5, 0.5], "BOX_TOO_SMALL"),
        ([5, 5, 10, 0.05], "BOX_TOO_SMALL"),
        ([-0.3, 5, 0.9, 1], "BOX_TOO_SMALL"),
        ([-0.5, 5, 1, 1], "BOX_OUTSIDE"),
        ([WIDTH - 0.1, 5, 30, 3], "BOX_OUTSIDE"),
        ([-50, 5, 10, 10], "BOX_OUTSIDE"),
        ([900, 900, 0.1, 0.1], "BOX_OUTSIDE"),
    ],
)
def test_a_box_is_reported_for_the_first_rule_that_it_breaks(dataset: Dataset, box: list[float], code: str) -> None:
    dataset.coco["annotations"][0]["bbox"] = box
    report = check(dataset)
    assert counts(report) == {code: 1}
    (example,) = report.issues[code].examples
    rule = {"BOX_TOO_SMALL": "area", "BOX_OUTSIDE": "image"}[code]
    assert rule in example
    assert report.issues[code].severity is Severity.ERROR


def test_a_mask_without_a_pixel_is_reported(dataset: Dataset) -> None:
    rows = dataset.coco["annotations"]
    rows[0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    rows[1]["segmentation"] = [[900, 900, 910, 900, 910, 910]]
    report = check(dataset)
    assert counts(report) == {"EMPTY_GROUND_TRUTH": 2}
    assert [str(rows[n]["id"]) in text for n, text in enumerate(report.issues["EMPTY_GROUND_TRUTH"].examples)] == [
        True,
        True,
    ]


def test_an_unusable_box_among_corners_is_an_error_of_its_own(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, boxes=8)
    rows = dataset.coco["annotations"]
    for row in rows:
        row["bbox"] = [20, 10, 38, 28]
    rows[5]["bbox"] = [5, 5, 0, 10]
    report = check(dataset)
    assert (report.issues["BOX_EMPTY"].count, report.issues["BOX_EMPTY"].severity) == (1, Severity.ERROR)
    assert report.issues["BOXES_ARE_CORNERS"].severity is Severity.ERROR
    assert "BOX_CLIPPED" not in report.issues


def test_a_box_that_is_no_corners_among_corners_is_an_error(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, boxes=30)
    rows = dataset.coco["annotations"]
    for row in rows:
        row["bbox"] = [20, 10, 38, 28]
    rows[5]["bbox"] = [30, 20, 9, 9]
    issue = check(dataset).issues["BOX_EMPTY"]
    assert (issue.count, issue.severity, len(issue.examples)) == (1, Severity.ERROR, 1)


def test_boxes_are_compared_with_the_size_of_the_file_if_the_row_has_none(dataset: Dataset) -> None:
    for image in dataset.coco["images"]:
        del image["width"], image["height"]
    dataset.coco["annotations"][0]["bbox"] = [WIDTH + 5, 0, 5, 5]
    assert counts(check(dataset)) == {"BOX_OUTSIDE": 1}


def test_unknown_ids_crowds_and_gaps_are_issues(dataset: Dataset) -> None:
    rows = dataset.coco["annotations"]
    rows[0]["image_id"] = 99
    rows[1]["category_id"] = 99
    rows[2]["bbox"] = None
    rows[3]["iscrowd"] = 1
    dataset.coco["categories"].append({"id": 7, "name": "plate"})
    dataset.coco["images"].append({"id": 50, "file_name": "image_0.png", "width": WIDTH, "height": HEIGHT})
    report = check(dataset)
    assert counts(report) == {
        "FILE_NAMED_TWICE": 1,
        "IMAGE_UNKNOWN": 1,
        "CATEGORY_UNKNOWN": 1,
        "BAD_BOX": 1,
        "CROWD": 1,
        "CATEGORY_UNUSED": 1,
        "CATEGORY_ID_GAP": 1,
        "IMAGE_WITHOUT_BOXES": 1,
    }
    assert report.issues["CATEGORY_UNUSED"].examples == ["plate"]
    line = next(line for line in report.lines() if "CATEGORY_UNUSED" in line)
    assert line.endswith("plate")


def test_duplicate_ids_are_fatal_and_the_rest_is_still_checked(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.coco["annotations"][1]["id"] = 100
    dataset.coco["images"][1]["id"] = 1
    (dataset.images_dir / "image_2.png").unlink()
    report = check(dataset)
    assert report.count(Severity.FATAL) == 2
    assert "IMAGE_NOT_FOUND" in report.issues
    assert main(["check", "--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]) == 2
    assert "DUPLICATE_ANNOTATION_ID" in capsys.readouterr().out


def test_a_file_that_is_not_coco_is_refused(dataset: Dataset) -> None:
    dataset.json_path.write_text("[]")
    with pytest.raises(BadDataset):
        check_dataset(dataset.json_path, dataset.images_dir)


def test_the_command_writes_json_and_html_and_exits_3_if_boxes_would_fail(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["check", "--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    assert main(given) == 0
    dataset.coco["images"][0]["file_name"] = "<absent>.png"
    dataset.save()
    report_json, page = dataset.folder / "report.json", dataset.folder / "page.html"
    assert main([*given, "--output", str(report_json), "--report", str(page)]) == 3
    assert json.loads(report_json.read_text())["counts"] == {"fatal": 0, "error": 1, "warning": 0, "note": 1}
    assert "&lt;absent&gt;.png" in page.read_text()
    assert "<absent>" not in page.read_text()
    assert "IMAGE_NOT_FOUND" in capsys.readouterr().out


def test_all_occurrences_are_counted_and_the_first_ten_are_examples(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=2, boxes=30)
    for row in dataset.coco["annotations"]:
        row["bbox"] = [0, 0, -1, 1]
    issue = check(dataset).issues["BOX_EMPTY"]
    assert (issue.count, len(issue.examples)) == (60, 10)


def test_gaps_and_repeated_names_of_categories_are_issues(dataset: Dataset) -> None:
    dataset.coco["categories"] += [{"id": 3, "name": "cup"}, {"id": 7, "name": "plate"}, {"id": "x", "name": "jug"}]
    report = check(dataset)
    assert report.issues["CATEGORY_ID_GAP"].examples == ["2", "4 to 6"]
    assert report.issues["CATEGORY_NAMED_TWICE"].examples == ["cup: ids 1, 3"]
    assert report.count(Severity.ERROR) == 0


def test_a_repeated_category_id_is_an_issue(dataset: Dataset) -> None:
    dataset.coco["categories"].append({"id": 1, "name": "plate"})
    issue = check(dataset).issues["ROW_UNUSABLE"]
    (example,) = issue.examples
    assert example.startswith("categories[1]: id 1")


def test_image_files_without_a_row_are_issues_for_folders_and_patterns(dataset: Dataset) -> None:
    (dataset.images_dir / "deep").mkdir()
    (dataset.images_dir / "deep" / "more.JPG").write_bytes(b"")
    (dataset.images_dir / "notes.txt").write_text("not an image")
    assert check(dataset).issues["FILE_NOT_LISTED"].examples == ["deep/more.JPG"]
    pattern = f"{dataset.images_dir}/**/*"
    report = check_dataset(dataset.json_path, pattern)
    assert report.issues["FILE_NOT_LISTED"].examples == [f"{dataset.images_dir}/deep/more.JPG"]


def test_a_report_without_issues_says_so_and_has_no_empty_table(tmp_path: Path) -> None:
    report = check(make_dataset(tmp_path))
    (line,) = report.lines()
    assert line.endswith(NO_ISSUES)
    page = "".join(report.sections())
    assert NO_ISSUES in page
    assert "Examples" not in page
    assert "meaning" not in page


def test_the_progress_of_a_check_shows_no_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path)
    assert main(["check", "--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]) == 0
    progress = capsys.readouterr().err
    assert "check: image 3/3" in progress
    assert "boxes" not in progress
