"""COCO files as exporters and other machines write them: each is read as it is, or named with its cause."""

import gzip
import json
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal_client.cli.main import main
from PIL import Image

from mal_train.core.masks.rle import Rle, decode_mask
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset, make_dataset, with_masks
from tests.mal_client.test_against_server import served
from tests.reference import shared

Change = Callable[[Dataset], None]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served(limits={"max_boxes": 1000}) as address:
        yield address


def arguments(dataset: Dataset, *others: str) -> list[str]:
    return ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), *others]


def run_label(server: str, dataset: Dataset, *others: str) -> int:
    return main(["label", "--server", server, *arguments(dataset, "--output", str(dataset.output)), *others])


def run_check(dataset: Dataset, *others: str) -> dict[str, dict[str, Any]]:
    """Returns the issues that `check` finds, by code."""
    main(["check", *arguments(dataset, "--output", str(dataset.folder / "check.json")), *others])
    issues = json.loads((dataset.folder / "check.json").read_text())["findings"]
    return {issue["kind"]: issue for issue in issues if issue["kind"] not in {"CATEGORY_ID_GAP", "FILE_RESPELLED"}}


def evaluation(server: str, dataset: Dataset, *others: str) -> tuple[int, dict[str, Any]]:
    metrics = dataset.folder / "metrics.json"
    code = main(["evaluate", "--server", server, *arguments(dataset, "--output", str(metrics)), *others])
    return code, json.loads(metrics.read_text())


def rename_file(dataset: Dataset, index: int, on_disk: str, in_file: str) -> None:
    """Gives an image one name in the folder and another one in the annotations."""
    row = dataset.coco["images"][index]
    target = dataset.images_dir / on_disk
    target.parent.mkdir(parents=True, exist_ok=True)
    (dataset.images_dir / row["file_name"]).rename(target)
    row["file_name"] = in_file


def respelled(on_disk: str, in_file: str) -> Change:
    return lambda dataset: rename_file(dataset, 0, on_disk, in_file)


def compressed(dataset: Dataset) -> None:
    dataset.json_path.write_bytes(gzip.compress(json.dumps(dataset.coco).encode()))


def set_images(**fields: Any) -> Change:
    return lambda dataset: [row.update(fields) for row in dataset.coco["images"]].clear()


def set_rows(**fields: Any) -> Change:
    return lambda dataset: [row.update(fields) for row in dataset.coco["annotations"]].clear()


def as_lvis(dataset: Dataset) -> None:
    for row in dataset.coco["images"]:
        row["coco_url"] = f"http://images.example/val2017/{row.pop('file_name')}"
        row |= {"neg_category_ids": [], "not_exhaustive_category_ids": [1]}


def without_categories(dataset: Dataset) -> None:
    del dataset.coco["categories"]


READ_AS_THEY_ARE: dict[str, Change] = {
    "gzip": compressed,
    "sizes of 0": set_images(width=0, height=0),
    "sizes of -1": set_images(width=-1, height=-1),
    "sizes as text": set_images(width=str(WIDTH), height=str(HEIGHT)),
    "sizes as floats": set_images(width=float(WIDTH), height=float(HEIGHT)),
    "LVIS": as_lvis,
    "no class": set_rows(category_id=None),
    "class not in the list": set_rows(category_id=77),
    "class as a list": set_rows(category_id=[1]),
    "no list of classes": without_categories,
    "null list of classes": lambda dataset: dataset.coco.update(categories=None),
    "null iscrowd": set_rows(iscrowd=None),
    "backslashes": respelled("sub/a.png", "sub\\a.png"),
    "Windows path": respelled("a.png", "C:\\Users\\me\\images\\a.png"),
    "path of another machine": respelled("a.png", "/nowhere/images/a.png"),
    "path above": respelled("a.png", "../../upload/a.png"),
    "folder of the images": respelled("a.png", "images/a.png"),
    "patches, as in Objects365": respelled("patch8/a.png", "images/v1/patch8/a.png"),
    "percent-encoded": respelled("Capture d'\u00e9cran+1.png", "Capture%20d%27%C3%A9cran%2B1.png"),
    "composed accents": respelled(unicodedata.normalize("NFD", "\u00fc.png"), "\u00fc.png"),
    "decomposed accents": respelled("\u00fc.png", unicodedata.normalize("NFD", "\u00fc.png")),
    "letter case": respelled("DSC_1.PNG", "dsc_1.png"),
}


@pytest.mark.parametrize("name", READ_AS_THEY_ARE)
def test_a_form_that_has_one_meaning_is_labeled(server: str, dataset: Dataset, name: str) -> None:
    before = {row["id"]: dict(row) for row in dataset.coco["annotations"]}
    READ_AS_THEY_ARE[name](dataset)
    if name != "gzip":
        dataset.save()
    assert run_label(server, dataset) == 0
    labeled = dataset.labeled()
    assert len(labeled) == len(before)
    assert all(row["segmentation"]["size"] == [HEIGHT, WIDTH] for row in labeled.values())
    assert [row["bbox"] for row in labeled.values()] == [row["bbox"] for row in before.values()]
    assert not any(issue["level"] in {"fatal", "error"} for issue in run_check(dataset).values())


def test_a_name_leads_to_no_file_that_another_name_can_mean(server: str, dataset: Dataset) -> None:
    rename_file(dataset, 0, "frame.png", "cam0/frame.png")
    dataset.coco["images"][1]["file_name"] = "cam1/frame.png"
    dataset.save()
    assert run_label(server, dataset) == 3
    failed = [row for row in dataset.labeled().values() if "error" in row]
    assert {row["image_id"] for row in failed} == {1, 2}
    assert all(name in failed[0]["error"]["message"] for name in ("cam0/frame.png", "cam1/frame.png"))


def test_a_name_of_an_existing_file_elsewhere_is_refused_and_not_replaced(server: str, dataset: Dataset) -> None:
    other = dataset.folder / "other"
    other.mkdir()
    shutil.copy(dataset.images_dir / "image_0.png", other / "image_0.png")
    for name in ("../other/image_0.png", str(other / "image_0.png")):
        dataset.coco["images"][0]["file_name"] = name
        dataset.save()
        assert run_label(server, dataset, "--restart") == 3
        failed = [row["error"] for row in dataset.labeled().values() if "error" in row]
        assert len(failed) == 2
        assert "--allow-outside-images" in failed[0]["message"]


def test_two_files_that_differ_in_case_alone_are_not_chosen_by_chance(server: str, dataset: Dataset) -> None:
    rename_file(dataset, 0, "a.png", "A.pnG")
    (dataset.images_dir / "A.PNG").write_bytes((dataset.images_dir / "a.png").read_bytes())
    dataset.save()
    assert run_label(server, dataset) == 3
    messages = [row["error"]["message"] for row in dataset.labeled().values() if "error" in row]
    assert len(messages) == 2
    assert "a.png" in messages[0]
    assert "A.PNG" in messages[0]


def test_a_file_with_another_suffix_is_named(server: str, dataset: Dataset) -> None:
    dataset.coco["images"][0]["file_name"] = "image_0.jpg"
    dataset.save()
    assert run_label(server, dataset) == 3
    (message, *_) = [row["error"]["message"] for row in dataset.labeled().values() if "error" in row]
    assert "did you mean image_0.png" in message


def test_a_pattern_finds_names_of_another_spelling(server: str, dataset: Dataset) -> None:
    rename_file(dataset, 0, "sub/A.png", "other\\sub\\a.PNG")
    dataset.save()
    options = ["--annotations", str(dataset.json_path), "--image-glob", str(dataset.images_dir / "**" / "*.png")]
    assert main(["label", "--server", server, *options, "--output", str(dataset.output)]) == 0


def test_a_file_without_annotations_is_named(server: str, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    dataset.coco["annotations"] = []
    dataset.save()
    assert run_label(server, dataset) == 3
    err = capsys.readouterr().err
    assert "no annotation" in err
    assert "--boxes results.json" in err
    assert run_check(dataset)["NO_ANNOTATIONS"]["level"] == "warning"
    shard = ["--shard", "0/1", "--restart"]
    assert run_label(server, dataset, *shard) == 0


@pytest.mark.parametrize(("only", "named"), [("missing", "lacks a mask"), ("flagged", "--only missing")])
def test_a_filter_that_selects_no_annotation_is_named(
    server: str, dataset: Dataset, capsys: pytest.CaptureFixture[str], only: str, named: str
) -> None:
    if only == "missing":
        with_masks(dataset)
    dataset.save()
    assert run_label(server, dataset, "--only", only) == 0
    assert named in capsys.readouterr().err
    assert run_label(server, dataset, "--restart") == 0
    assert "no annotation was labeled" not in capsys.readouterr().err


def test_a_file_of_crowds_is_named_and_can_be_read_as_objects(
    server: str, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    with_masks(dataset)
    set_rows(iscrowd=1)(dataset)
    dataset.save()
    assert run_label(server, dataset) == 3
    assert "CROWD" in capsys.readouterr().err
    code, metrics = evaluation(server, dataset)
    printed = capsys.readouterr()
    assert (code, metrics["count"], metrics["skipped_by_reason"]) == (3, 0, {"CROWD": 6})
    assert "CROWD" in printed.out
    assert "--crowd-as-objects" in printed.err
    assert run_check(dataset)["CROWD"]["level"] == "warning"
    code, metrics = evaluation(server, dataset, "--crowd-as-objects")
    assert (code, metrics["count"]) == (0, 6)
    assert run_label(server, dataset, "--crowd-as-objects", "--restart") == 0
    assert [row["iscrowd"] for row in dataset.labeled().values()] == [0] * 6


def test_a_rotated_box_is_refused_or_labeled_by_the_box_round_it(server: str, dataset: Dataset) -> None:
    row = dataset.coco["annotations"][0]
    row |= {"attributes": {"rotation": 90.0}, "bbox": [5, 10, 20, 4]}
    dataset.save()
    assert run_label(server, dataset) == 3
    assert dataset.labeled()[100]["error"]["reason"] == "BOX_ROTATED"
    assert set(run_check(dataset)) == {"BOX_ROTATED"}
    assert run_label(server, dataset, "--rotated-boxes", "upright", "--restart") == 0
    labeled = dataset.labeled()[100]
    assert labeled["bbox"] == [5, 10, 20, 4]
    assert "BOX_ROTATED" in labeled["flags"]
    rows, columns = np.nonzero(decode_mask(Rle.from_coco(labeled["segmentation"])))
    assert (columns.min() >= 13, columns.max() < 17, rows.min() >= 2, rows.max() < 22) == (True,) * 4
    assert rows.max() - rows.min() > 4
    assert main(["review", *arguments(dataset), "--annotations", str(dataset.output)]) == 0


FORMS: dict[str, tuple[Callable[[list[float]], list[float]], str, int]] = {
    "corners": (lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]], "BOXES_ARE_CORNERS", 0),
    "shares": (
        lambda box: [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT],
        "BOXES_ARE_SHARES",
        3,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_of_another_form_are_named_once_and_converted(
    server: str, dataset: Dataset, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, code, exit_code = FORMS[form]
    for row, box in zip(dataset.coco["annotations"], 6 * [[20.0, 14.0, 15.0, 12.0]], strict=True):
        row["bbox"] = change(box)
        row["category_id"] = 1
    dataset.save()
    assert set(run_check(dataset)) - {"DUPLICATE_BOX"} == {code}
    capsys.readouterr()
    assert run_label(server, dataset) == exit_code
    printed = capsys.readouterr()
    assert f"--box-form {form}" in printed.err
    if form == "corners":
        assert "6 BOX_CLIPPED" in printed.out
    converted = dataset.folder / "converted.json"
    options = ["--from", "coco", "--box-form", form, "--labels", str(dataset.json_path)]
    assert main(["convert", *options, "--output", str(converted)]) == 0
    boxes = [row["bbox"] for row in json.loads(converted.read_text())["annotations"]]
    assert boxes == [pytest.approx([20, 14, 15, 12])] * 6


def test_rows_of_images_and_categories_that_are_ignored_are_named(
    server: str, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    with_masks(dataset)
    dataset.coco["images"] += [5, {"file_name": "no_id.png"}]
    dataset.coco["categories"] += [None] * 9
    dataset.save()
    assert run_label(server, dataset) == 0
    labeled = capsys.readouterr().err
    assert evaluation(server, dataset)[0] == 0
    for printed in (labeled, capsys.readouterr().err):
        assert printed.count("images[3]") == printed.count("images[4]") == printed.count("categories[1]") == 1
        assert "6 further rows" in printed


def test_check_names_causes_and_no_consequences(dataset: Dataset) -> None:
    dataset.coco["categories"].append({"id": 2, "name": "plate"})
    for row in dataset.coco["images"]:
        del row["file_name"]
    set_rows(category_id=2)(dataset)
    dataset.coco["annotations"][0]["category_id"] = 1
    dataset.save()
    assert {code: issue["count"] for code, issue in run_check(dataset).items()} == {
        "IMAGE_UNUSABLE": 3,
    }


def test_masks_that_cannot_be_read_are_named_by_check_and_by_evaluate(server: str, dataset: Dataset) -> None:
    with_masks(dataset)
    rows = dataset.coco["annotations"]
    whole = rows[0]["segmentation"][0]
    rows[0]["segmentation"] = [[5, 5, 9, 9], whole, []]
    rows[1]["segmentation"] = [[5, 5, 9, 9]]
    rows[2]["segmentation"] = whole
    rows[3]["segmentation"] = [whole[:-1]]
    rows[4]["segmentation"] = {}
    rows[5]["segmentation"] = {"size": [3, 3], "counts": [9]}
    dataset.save()
    issues = run_check(dataset)
    assert {code: issue["count"] for code, issue in issues.items()} == {"POLYGON_IGNORED": 1, "BAD_GROUND_TRUTH": 4}
    code, metrics = evaluation(server, dataset)
    assert code == 3
    assert metrics["count"] == 1
    assert {row["annotation_id"]: row["reason"] for row in metrics["skipped"]} == {
        101: "BAD_GROUND_TRUTH",
        102: "BAD_GROUND_TRUTH",
        103: "BAD_GROUND_TRUTH",
        104: "NO_GROUND_TRUTH",
        105: "BAD_GROUND_TRUTH",
    }


def crowded(folder: Path) -> Dataset:
    """Returns a dataset of one bright image whose boxes overlap each other."""
    dataset = with_masks(make_dataset(folder, images=2, boxes=7))
    for row in dataset.coco["images"]:
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 240, np.uint8)).save(dataset.images_dir / row["file_name"])
    return dataset


def overlap_px(dataset: Dataset) -> int:
    """Returns the number of pixels that are in several masks of an image."""
    counts = {row["id"]: np.zeros((HEIGHT, WIDTH), int) for row in dataset.coco["images"]}
    for row in dataset.labeled().values():
        counts[row["image_id"]] += decode_mask(Rle.from_coco(row["segmentation"]))
    return sum(int((count > 1).sum()) for count in counts.values())


def test_overlaps_are_resolved_over_the_whole_image_or_refused(server: str, tmp_path: Path) -> None:
    dataset = crowded(tmp_path)
    assert run_label(server, dataset) == 0
    before = overlap_px(dataset)
    assert run_label(server, dataset, "--resolve-overlaps", "--restart") == 0
    assert overlap_px(dataset) < before
    with served(limits={"max_boxes": 3}) as small:
        assert run_label(small, dataset, "--resolve-overlaps", "--restart") == 3
        errors = {row["error"]["reason"] for row in dataset.labeled().values()}
        assert errors == {"TOO_MANY_BOXES"}
        code, metrics = evaluation(small, dataset, "--resolve-overlaps")
    assert (code, metrics["skipped_by_reason"]) == (3, {"TOO_MANY_BOXES": 14})


def test_overlaps_with_copied_masks_are_refused_in_words(server: str, tmp_path: Path) -> None:
    dataset = crowded(tmp_path)
    assert run_label(server, dataset, "--resolve-overlaps", "--only", "missing") == 2
    assert not dataset.output.exists()


@pytest.mark.parametrize("option", [[], ["--min-component-area", "9"], ["--agreement"], ["--flip"]])
def test_an_image_in_several_requests_gets_the_masks_of_one_request(
    server: str, tmp_path: Path, option: list[str]
) -> None:
    dataset = crowded(tmp_path)
    assert run_label(server, dataset, *option) == 0
    expected = dataset.output.read_bytes()
    with served(limits={"max_boxes": 3}) as small:
        assert run_label(small, dataset, *option, "--restart") == 0
    assert dataset.output.read_bytes() == expected


def test_an_image_in_several_requests_is_evaluated_as_one(server: str, tmp_path: Path) -> None:
    dataset = crowded(tmp_path)
    dataset.coco["images"][0]["id"], dataset.coco["images"][1]["id"] = 2, 1
    dataset.coco["annotations"][2]["iscrowd"] = 1
    dataset.save()
    folders = [{"name": "data", "path": str(tmp_path)}]
    whole = evaluation(server, dataset)
    assert (whole[0], whole[1]["count"], whole[1]["images"]) == (0, 13, 2)
    with served(limits={"max_boxes": 3}, data_folders=folders) as small:
        assert evaluation(small, dataset) == whole
        metrics = tmp_path / "server.json"
        options = ["--annotations", "data/in.json", "--images", "data/images", "--on-server"]
        assert main(["evaluate", "--server", small, *options, "--output", str(metrics)]) == 0
    on_server = json.loads(metrics.read_text())
    same = ("count", "images", "mIoU", "AP@1", "AP@score", "skipped_by_reason")
    assert {key: on_server[key] for key in same} == {key: whole[1][key] for key in same}


def test_lvis_is_evaluated_by_its_own_metrics_here_and_on_the_server(server: str, tmp_path: Path) -> None:
    dataset = crowded(tmp_path)
    as_lvis(dataset)
    dataset.coco["categories"] = [{"id": 1, "name": "cup", "frequency": "r"}, {"id": 2, "name": "a", "frequency": "c"}]
    dataset.coco["annotations"][0]["category_id"] = 2
    dataset.save()
    _, metrics = evaluation(server, dataset)
    assert metrics["LVIS@score"]["APr"] is not None
    assert metrics["LVIS@score"]["APf"] is None
    folders = [{"name": "data", "path": str(tmp_path)}]
    output = tmp_path / "server.json"
    options = ["--annotations", "data/in.json", "--images", "data/images", "--on-server"]
    with served(limits={"max_boxes": 3}, data_folders=folders) as small:
        assert main(["evaluate", "--server", small, *options, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["LVIS@score"] == metrics["LVIS@score"]


def test_the_results_list_of_a_detector_is_labeled_on_the_images_of_a_file(server: str, dataset: Dataset) -> None:
    detections = [
        {"image_id": 1 + n % 3, "category_id": 1, "bbox": [1.0 + n, 2.0, 10.0, 9.0], "score": 0.25 * n}
        for n in range(4)
    ]
    results = dataset.folder / "results.json"
    results.write_text(json.dumps(detections))
    assert run_label(server, dataset, "--boxes", str(results)) == 0
    expected = dataset.output.read_bytes()
    labeled = list(dataset.labeled().values())
    assert [(row["id"], row["score"]) for row in labeled] == [(n + 1, 0.25 * n) for n in range(4)]
    assert all(0 <= row["mask_score"] <= 1 and "counts" in row["segmentation"] for row in labeled)
    options = ["--annotations", str(dataset.json_path), "--output", str(dataset.output), "--boxes", str(results)]
    for shard in range(2):
        assert run_label(server, dataset, "--boxes", str(results), "--shard", f"{shard}/2") == 0
    assert main(["merge", *options, "--shards", "2"]) == 0
    assert dataset.output.read_bytes() == expected
    dataset.json_path.write_text(json.dumps(detections))
    assert run_label(server, dataset) == 2


SHARED_ROWS = {
    "backslash_paths.json": [],
    "base_boxes.json": [],
    "boxes.json.gz": [],
    "lvis_rows.json": [],
    "no_categories.json": [],
    "null_category.json": [],
    "zero_sizes.json": [],
    "cvat_rle_all_iscrowd.json": ["--crowd-as-objects"],
    "cvat_rotated_box.json": ["--rotated-boxes", "upright"],
    "corner_boxes.json": [],
}


@pytest.mark.parametrize("name", SHARED_ROWS)
def test_the_collected_files_are_labeled(server: str, tmp_path: Path, name: str) -> None:
    path, images = shared("cases", "coco", name), shared("data", "coco_val_dev", "images")
    output = tmp_path / "out.json"
    options = ["--annotations", str(path), "--images", str(images), "--output", str(output)]
    assert main(["label", "--server", server, *options, *SHARED_ROWS[name]]) == 0
    rows = json.loads(output.read_text())["annotations"]
    assert len(rows) == 14
    assert all("counts" in row["segmentation"] for row in rows)


def shared_case(tmp_path: Path, name: str) -> Dataset:
    """Returns a collected file as a dataset; its images are the real ones."""
    dataset = Dataset(tmp_path, json.loads(shared("cases", "coco", name).read_text()))
    dataset.images_dir.mkdir()
    images = shared("data", "coco_val_dev", "images")
    for row in dataset.coco["images"]:
        if (images / row["file_name"]).is_file():
            shutil.copy(images / row["file_name"], dataset.images_dir)
    dataset.save()
    return dataset


def test_the_collected_names_of_other_spellings_are_found(server: str, tmp_path: Path) -> None:
    dataset = shared_case(tmp_path, "percent_and_nfd_names.json")
    images = shared("data", "coco_val_dev", "images")
    base, odd = (
        json.loads(shared("cases", "coco", name).read_text()) for name in ("base_boxes.json", "odd_names.json")
    )
    for original, on_disk in zip(base["images"], odd["images"], strict=True):
        shutil.copy(images / original["file_name"], dataset.images_dir / on_disk["file_name"])
    assert run_label(server, dataset) == 0
    assert len(dataset.labeled()) == 14


def test_the_collected_dense_image_is_labeled_and_measured_whole_or_refused(server: str, tmp_path: Path) -> None:
    dataset = shared_case(tmp_path, "dense_1100.json")
    assert run_label(server, dataset) == 0
    assert run_label(server, dataset, "--resolve-overlaps", "--restart") == 3
    assert {row["error"]["reason"] for row in dataset.labeled().values()} == {"TOO_MANY_BOXES"}
    dataset.coco = json.loads(shared("cases", "coco", "dense_1100_truth.json").read_text())
    dataset.save()
    code, metrics = evaluation(server, dataset)
    assert (code, metrics["count"], metrics["images"], metrics["skipped_by_reason"]) == (0, 1100, 1, {})


def test_the_collected_parts_of_two_points_are_ignored_or_named(server: str, tmp_path: Path) -> None:
    dataset = shared_case(tmp_path, "two_point_part.json")
    code, metrics = evaluation(server, dataset)
    named = {row["annotation_id"]: row["reason"] for row in metrics["skipped"]}
    assert code == 3
    assert 3 not in named
    assert {key: named[key] for key in (1, 2, 4, 5, 6)} == {
        **dict.fromkeys((1, 2, 4, 5), "BAD_GROUND_TRUTH"),
        6: "NO_GROUND_TRUTH",
    }
    assert metrics["count"] + len(named) == len(dataset.coco["annotations"])
    issues = run_check(dataset)
    assert issues["BAD_GROUND_TRUTH"]["count"] == sum(reason == "BAD_GROUND_TRUTH" for reason in named.values())


@pytest.mark.parametrize(
    ("name", "causes"),
    [
        ("normalised_boxes.json", {"BOXES_ARE_SHARES"}),
        ("corner_boxes.json", {"BOXES_ARE_CORNERS"}),
        ("zero_sizes.json", set[str]()),
        ("lvis_rows.json", set[str]()),
        ("no_categories.json", {"NO_CATEGORY"}),
    ],
)
def test_the_collected_files_have_one_cause_in_check(tmp_path: Path, name: str, causes: set[str]) -> None:
    dataset = shared_case(tmp_path, name) if name != "lvis_rows.json" else None
    if dataset is None:
        dataset = Dataset(tmp_path, json.loads(shared("cases", "coco", name).read_text()))
        dataset.images_dir.mkdir()
        for row in dataset.coco["images"]:
            file_name = row["coco_url"].rpartition("/")[2]
            shutil.copy(shared("data", "coco_val_dev", "images", file_name), dataset.images_dir)
        dataset.save()
    assert set(run_check(dataset)) - {"CATEGORY_UNUSED"} == causes
