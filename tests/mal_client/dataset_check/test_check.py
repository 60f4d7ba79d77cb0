"""Claims about the report on a data set."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from mal_client.cli.main import main
from mal_client.dataset_check.check import check_dataset
from mal_client.dataset_check.report import CheckReport, Severity
from PIL import Image

from mal_train.core.errors import BadDataset
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, serving


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path)


def checked(dataset: Dataset, *, decode: bool = True) -> CheckReport:
    dataset.save()
    return check_dataset(dataset.json_path, dataset.images_dir, decode=decode)


def found(report: CheckReport) -> dict[str, int]:
    return {kind: finding.count for kind, finding in report.findings.items()}


def test_a_clean_data_set_has_no_finding_and_its_sizes_are_counted(dataset: Dataset) -> None:
    report = checked(dataset)
    assert found(report) == {}
    assert (report.images, report.annotations, report.by_category) == (3, 6, {"cup": 6})
    assert report.image_sizes == {f"{WIDTH} × {HEIGHT}": 3}
    assert report.boxes_by_size == {"small": 6}
    assert report.side_histogram() == {"8–16 px": 6}


def test_missing_broken_and_wrong_files_are_told_apart(dataset: Dataset) -> None:
    pictures = sorted(dataset.images_dir.iterdir())
    pictures[0].unlink()
    pictures[1].write_bytes(pictures[1].read_bytes()[:-400])
    pictures[2].write_text("no picture")
    report = checked(dataset)
    assert found(report) == {"IMAGE_NOT_FOUND": 1, "IMAGE_DECODE_FAILED": 1, "IMAGE_FORMAT": 1}
    assert "image_1.png" in report.findings["IMAGE_DECODE_FAILED"].examples[0]
    assert report.count(Severity.ERROR) == 3


def test_headers_alone_do_not_show_a_file_that_is_cut_off(dataset: Dataset) -> None:
    picture = dataset.images_dir / "image_1.png"
    picture.write_bytes(picture.read_bytes()[:-400])
    dataset.coco["images"][0]["width"] = WIDTH + 1
    assert found(checked(dataset, decode=False)) == {"IMAGE_SIZE_MISMATCH": 1}


def test_pictures_that_viewers_turn_and_animations_are_warned_of(dataset: Dataset) -> None:
    pixels = Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(dataset.images_dir / "turned.jpg", exif=exif)
    other = Image.fromarray(np.full((HEIGHT, WIDTH, 3), 200, dtype=np.uint8))
    pixels.save(dataset.images_dir / "moving.webp", save_all=True, append_images=[other])
    dataset.coco["images"][0]["file_name"] = "turned.jpg"
    dataset.coco["images"][1]["file_name"] = "moving.webp"
    report = checked(dataset)
    assert found(report) == {"EXIF_ORIENTATION": 1, "SEVERAL_FRAMES": 1, "FILE_NOT_LISTED": 2}
    assert report.findings["EXIF_ORIENTATION"].examples == ["turned.jpg: EXIF orientation 6"]
    assert report.count(Severity.ERROR) == 0


def test_boxes_are_judged_as_labeling_would(dataset: Dataset) -> None:
    rows = dataset.coco["annotations"]
    boxes = [[500, 500, 5, 5], [1, 2, 0, 5], [-3, 2, 10, 10], [5, 5, 1.5, 9], [2, 2, 8, 8], [2, 2, 8, 8]]
    for row, box in zip(rows, boxes, strict=True):
        row["bbox"] = box
    report = checked(dataset)
    assert found(report) == {
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


def test_boxes_are_held_against_the_file_when_the_row_states_no_size(dataset: Dataset) -> None:
    for image in dataset.coco["images"]:
        del image["width"], image["height"]
    dataset.coco["annotations"][0]["bbox"] = [WIDTH + 5, 0, 5, 5]
    assert found(checked(dataset)) == {"BOX_OUTSIDE": 1}


def test_rows_that_belong_nowhere_crowds_and_gaps_are_listed(dataset: Dataset) -> None:
    rows = dataset.coco["annotations"]
    rows[0]["image_id"] = 99
    rows[1]["category_id"] = 99
    rows[2]["bbox"] = None
    rows[3]["iscrowd"] = 1
    dataset.coco["categories"].append({"id": 7, "name": "plate"})
    dataset.coco["images"].append({"id": 50, "file_name": "image_0.png", "width": WIDTH, "height": HEIGHT})
    report = checked(dataset)
    assert found(report) == {
        "FILE_NAMED_TWICE": 1,
        "IMAGE_UNKNOWN": 1,
        "CATEGORY_UNKNOWN": 1,
        "BAD_BOX": 1,
        "CROWD": 1,
        "CATEGORY_UNUSED": 1,
        "CATEGORY_ID_GAP": 1,
        "IMAGE_WITHOUT_BOXES": 1,
    }
    assert report.findings["CATEGORY_UNUSED"].examples == ["plate"]
    line = next(line for line in report.lines() if "CATEGORY_UNUSED" in line)
    assert line.endswith("a category without annotations; first: plate")


def test_clashing_ids_are_fatal_and_the_rest_is_still_looked_at(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.coco["annotations"][1]["id"] = 100
    dataset.coco["images"][1]["id"] = 1
    (dataset.images_dir / "image_2.png").unlink()
    report = checked(dataset)
    assert report.count(Severity.FATAL) == 2
    assert "IMAGE_NOT_FOUND" in report.findings
    assert main(["check", "--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]) == 2
    assert "DUPLICATE_ANNOTATION_ID" in capsys.readouterr().out


def test_something_that_is_no_coco_file_is_an_error(dataset: Dataset) -> None:
    dataset.json_path.write_text("[]")
    with pytest.raises(BadDataset):
        check_dataset(dataset.json_path, dataset.images_dir)


def test_the_command_writes_json_and_page_and_its_code_says_whether_boxes_would_fail(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["check", "--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    assert main(given) == 0
    dataset.coco["images"][0]["file_name"] = "<absent>.png"
    dataset.save()
    figures, page = dataset.folder / "report.json", dataset.folder / "page.html"
    assert main([*given, "--output", str(figures), "--report", str(page)]) == 3
    assert json.loads(figures.read_text())["counts"] == {"fatal": 0, "error": 1, "warning": 0, "note": 1}
    assert "&lt;absent&gt;.png" in page.read_text()
    assert "<absent>" not in page.read_text()
    assert "IMAGE_NOT_FOUND" in capsys.readouterr().out


def test_examples_are_few_however_many_findings_there_are(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=2, boxes=30)
    for row in dataset.coco["annotations"]:
        row["bbox"] = [0, 0, -1, 1]
    finding = checked(dataset).findings["BOX_EMPTY"]
    assert (finding.count, len(finding.examples)) == (60, 10)


def test_gaps_and_names_of_categories_are_told(dataset: Dataset) -> None:
    dataset.coco["categories"] += [{"id": 3, "name": "cup"}, {"id": 7, "name": "plate"}, {"id": "x", "name": "jug"}]
    report = checked(dataset)
    assert report.findings["CATEGORY_ID_GAP"].examples == ["2", "4 to 6"]
    assert report.findings["CATEGORY_NAMED_TWICE"].examples == ["cup: ids 1, 3"]
    assert report.count(Severity.ERROR) == 0


def test_a_category_id_that_stands_twice_is_told(dataset: Dataset) -> None:
    dataset.coco["categories"].append({"id": 1, "name": "plate"})
    finding = checked(dataset).findings["ROW_UNUSABLE"]
    (example,) = finding.examples
    assert example.startswith("categories[1]: id 1 ")


def test_pictures_that_no_row_names_are_listed_in_folders_and_patterns(dataset: Dataset) -> None:
    (dataset.images_dir / "deep").mkdir()
    (dataset.images_dir / "deep" / "more.JPG").write_bytes(b"")
    (dataset.images_dir / "notes.txt").write_text("no picture")
    assert checked(dataset).findings["FILE_NOT_LISTED"].examples == ["deep/more.JPG"]
    pattern = f"{dataset.images_dir}/**/*"
    report = check_dataset(dataset.json_path, pattern)
    assert report.findings["FILE_NOT_LISTED"].examples == [f"{dataset.images_dir}/deep/more.JPG"]


def test_a_set_without_faults_is_said_to_be_so_and_its_page_has_no_empty_table(tmp_path: Path) -> None:
    report = checked(make_dataset(tmp_path))
    assert report.lines()[-1].endswith("6 annotations; no fault found")
    page = "".join(report.sections())
    assert "no fault found" in page
    assert "Examples" not in page
    assert "meaning" not in page


def test_the_progress_of_a_check_counts_no_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path)
    assert main(["check", "--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]) == 0
    assert re.search(r"^check: 3/3 images, [0-9.]+ images/s", capsys.readouterr().err, re.MULTILINE)
