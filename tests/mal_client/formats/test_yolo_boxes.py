"""YOLO text files as users bring them: poses, rotated boxes, confidences, class names and folders."""

import gzip
from pathlib import Path

import pytest
from pycocotools.coco import COCO

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_images(tmp_path, "a.png")
    (tmp_path / "given.txt").write_text("cup\nant\n")
    return tmp_path


def yolo(folder: Path, text: str, *more: str, names: str = "given.txt") -> int:
    (folder / "labels" / "a.txt").write_text(text)
    return convert(folder, "yolo", "--names", str(folder / names), *more)


BOX = "0.5 0.5 0.25 0.4"
PX = [30, 15, 20, 20]
TURNED = "0.5 0.2 0.6 0.4 0.5 0.6 0.4 0.4"
"""Corners of a box that stands on a corner; in px a rhomb, but no rectangle."""
RECTANGLE = " ".join(f"{x / WIDTH} {y / HEIGHT}" for x, y in ((40, 10), (56, 22), (50, 30), (34, 18)))


def test_key_points_are_read_by_their_shape(folder: Path) -> None:
    (folder / "data.yaml").write_text("kpt_shape: [2, 3]\nnames: [cup, ant]\n", encoding="utf-8-sig")
    text = f"1 {BOX} 0.5 0.5 2 0 0 0\n1 {BOX} 0.5 0.5 2 0 0 0 0.75\n1 {BOX}\n1 {BOX} 0.5 0.5 2 0 0 0 0 0\n"
    assert yolo(folder, text, names="data.yaml") == 3
    assert reasons(folder) == [("a.txt:3", "BAD_ROW"), ("a.txt:4", "BAD_ROW")]
    first, second = annotations(folder)
    assert first["bbox"] == PX
    assert (first["keypoints"], first["num_keypoints"]) == ([40, 25, 2, 0, 0, 0], 1)
    assert "segmentation" not in first
    assert second["score"] == 0.75


def test_key_points_without_a_visibility_are_visible_unless_at_0(folder: Path) -> None:
    (folder / "data.yaml").write_text("kpt_shape: [2, 2]\nnames: [cup]\n")
    assert yolo(folder, f"0 {BOX} 0.5 0.5 0 0\n", names="data.yaml") == 0
    assert annotations(folder)[0]["keypoints"] == [40, 25, 2, 0, 0, 0]


def test_a_folder_of_labels_in_the_given_one_lies_beside_the_images(folder: Path) -> None:
    make_images(folder, "train/b.png")
    (folder / "labels" / "train").mkdir()
    for name in ("a.txt", "train/b.txt"):
        (folder / "labels" / name).write_text(f"0 {BOX}\n")
    root = folder / "root"
    root.mkdir()
    (folder / "labels").rename(root / "labels")
    assert convert(folder, "yolo", "--names", str(folder / "given.txt"), labels="root") == 0
    assert boxes(folder) == {"a.png": [("cup", PX)], "train/b.png": [("cup", PX)]}


def test_two_text_files_that_may_mean_one_image_are_listed(folder: Path) -> None:
    root = folder / "root"
    (root / "labels").mkdir(parents=True)
    for name in ("a.txt", "labels/a.txt"):
        (root / name).write_text(f"0 {BOX}\n")
    assert convert(folder, "yolo", "--names", str(folder / "given.txt"), labels="root") == 3
    assert ("labels/a.txt", "BAD_IMAGE") in reasons(folder)


def test_poses_need_their_shape(folder: Path) -> None:
    assert yolo(folder, f"0 {BOX} 0.5 0.5\n", "--rows", "pose") == 2


@pytest.mark.parametrize("shape", ["17", "[17]", "[0, 3]", "[17, 4]", "[17, 3, 1]", "[a, b]"])
def test_a_shape_of_key_points_that_is_none_is_refused(folder: Path, shape: str) -> None:
    (folder / "data.yaml").write_text(f"kpt_shape: {shape}\nnames: [cup]\n")
    assert yolo(folder, f"0 {BOX}\n", names="data.yaml") == 2


@pytest.mark.parametrize(
    ("row", "options", "outcome"),
    [
        (BOX, [], PX),
        (f"{BOX} 0.5", [], PX),
        (f"{BOX} 0.5", ["--rows", "boxes"], PX),
        (f"{BOX} 1.5", [], "BAD_ROW"),
        (f"{BOX} 0.5 1", [], "BAD_ROW"),
        (f"{BOX} 0.5 7", [], "BAD_ROW"),
        (f"{BOX} 0.5 0.5 0.5", [], "BAD_ROW"),
        (f"{BOX} 0.1 0.1", ["--rows", "boxes"], "BAD_ROW"),
        ("0.1 0.2 0.5 0.2 0.5 0.6", [], [8, 10, 32, 20]),
        ("0.1 0.2 0.5 0.2 0.5 0.6 0.5", [], "BAD_ROW"),
        ("0.1 0.2 0.5 0.2 0.5 0.6 0.5", ["--rows", "segments"], [8, 10, 32, 20]),
        (BOX, ["--rows", "segments"], "BAD_ROW"),
        (TURNED, [], [32, 10, 16, 20]),
        (RECTANGLE, [], "BOX_ROTATED"),
        (f"{RECTANGLE} 0.9", [], "BAD_ROW"),
        (f"{RECTANGLE} 0.9", ["--rows", "obb"], "BOX_ROTATED"),
        (f"{RECTANGLE} 0.9", ["--rows", "obb", "--rotated-boxes", "upright"], [34, 10, 22, 20]),
        (RECTANGLE, ["--rotated-boxes", "upright"], [34, 10, 22, 20]),
        (RECTANGLE, ["--rows", "segments"], [34, 10, 22, 20]),
        (TURNED, ["--rows", "obb"], "BOX_ROTATED"),
        ("0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6", ["--rows", "obb"], [8, 10, 32, 20]),
        (BOX, ["--rows", "obb"], "BAD_ROW"),
        ("0.96 0.5 0.1 0.4", [], [72.8, 15, 8, 20]),
        ("40 25 20 20", [], "BAD_ROW"),
        ("0_5 0.5 0.2 0.2", [], "BAD_ROW"),
        ("0,5 0,5 0,2 0,2", [], "BAD_ROW"),
        ("0.5 0.5 0 0.2", [], "BAD_ROW"),
    ],
)
def test_a_row_is_read_by_its_form_or_listed(folder: Path, row: str, options: list[str], outcome: object) -> None:
    code = yolo(folder, f"0 {row}\n\n1 {BOX}\n", *options)
    of_first = [found["bbox"] for found in annotations(folder) if found["source"] == "a.txt:1"]
    if isinstance(outcome, str):
        assert code == 3
        assert ("a.txt:1", outcome) in reasons(folder)
    else:
        (box,) = of_first
        assert box == pytest.approx(outcome)


def test_the_area_of_an_outline_is_that_of_its_pixels(folder: Path) -> None:
    assert yolo(folder, f"0 0.125 0.2 0.625 0.2 0.625 0.6\n0 {BOX}\n0 0.125 0.2 0.625 0.2 0.625 0.6 0.125 0.6\n") == 0
    triangle, box, square = annotations(folder)
    assert triangle["area"] == pytest.approx(40 * 20 / 2, rel=0.05)
    assert triangle["area"] == COCO(str(folder / "out.json")).annToMask(triangle).sum()
    assert (box["area"], square["area"]) == (box["bbox"][2] * box["bbox"][3], 40 * 20)


@pytest.mark.parametrize(
    "points",
    ["0.1 0.1 0.2 0.2 0.3 0.3", "0.1 0.2 0.5 0.3 0.9 0.4", "0.1 0.1 0.3 0.1 0.3 0.4 0.3 0.1", "0 0 0.004 0 0 0.004"],
)
def test_an_outline_without_pixels_is_listed(folder: Path, points: str) -> None:
    assert yolo(folder, f"0 {points}\n0 {BOX}\n", "--rows", "auto") == 3
    assert reasons(folder) == [("a.txt:1", "BAD_ROW")]
    assert len(annotations(folder)) == 1


@pytest.mark.parametrize(
    ("number", "category"),
    [("0", "cup"), ("1.0", "ant"), ("1.5", None), ("-1", None), ("cup", None), ("2", None), ("\u0661", None)],
)
def test_a_class_is_a_number_of_the_list(folder: Path, number: str, category: str | None) -> None:
    assert yolo(folder, f"{number} {BOX}\n") == (3 if category is None else 0)
    assert boxes(folder) == ({} if category is None else {"a.png": [(category, PX)]})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["given.txt", "data.yaml"])
def test_class_names_may_have_a_byte_order_mark(folder: Path, encoding: str, name: str) -> None:
    text = "names: [lægte, 床]\n" if name == "data.yaml" else "lægte\n床\n"
    (folder / name).write_text(text, encoding=encoding, newline="\r\n")
    assert yolo(folder, f"0 {BOX}\n1 {BOX}\n", names=name) == 0
    assert boxes(folder) == {"a.png": [("lægte", PX), ("床", PX)]}


def test_class_names_in_another_encoding_are_refused_unless_it_is_given(folder: Path) -> None:
    (folder / "given.txt").write_text("床\n", encoding="gbk")
    assert yolo(folder, f"0 {BOX}\n") == 2
    assert yolo(folder, f"0 {BOX}\n", "--encoding", "gbk") == 0
    assert boxes(folder) == {"a.png": [("床", PX)]}


@pytest.mark.parametrize(
    ("place", "labels", "text"),
    [
        ("labels/classes.txt", "labels", "cup\nant\n"),
        ("data.yaml", "labels", "names: [cup, ant]\nnc: 2\n"),
        ("data.yml", "labels/train", "names: {1: ant, 0: cup}\n"),
        ("data.yaml", "train/labels", "names: {'0': cup, '1': ant}\n"),
        ("obj.names", "obj_train_data", "cup\nant\n"),
        ("labels/names.txt", "labels", "cup\nant\n"),
    ],
)
def test_class_names_beside_the_labels_or_above_are_read_and_named(
    folder: Path, place: str, labels: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / labels).mkdir(parents=True, exist_ok=True)
    (folder / labels / "a.txt").write_text(f"1 {BOX}\n")
    (folder / place).write_text(text)
    assert convert(folder, "yolo", labels=labels) == 0
    assert boxes(folder) == {"a.png": [("ant", PX)]}
    assert str(folder / place) in capsys.readouterr().err


def test_the_nearest_class_names_win_and_none_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "labels" / "a.txt").write_text(f"0 {BOX}\n")
    assert convert(folder, "yolo") == 2
    assert "data.yaml" in capsys.readouterr().err
    (folder.parent / "data.yaml").write_text("names: [far]\n")
    (folder / "classes.txt").write_text("near\n")
    assert convert(folder, "yolo") == 0
    assert boxes(folder) == {"a.png": [("near", PX)]}


def test_a_count_of_classes_without_names_is_numbered(folder: Path) -> None:
    (folder / "data.yaml").write_text("nc: 2\n")
    assert yolo(folder, f"1 {BOX}\n", names="data.yaml") == 0
    assert boxes(folder) == {"a.png": [("class_1", PX)]}


def test_a_zipped_data_yaml_is_read_as_one(folder: Path) -> None:
    (folder / "data.yaml.gz").write_bytes(gzip.compress(b"names: [cup, ant]\n"))
    assert yolo(folder, f"1 {BOX}\n", names="data.yaml.gz") == 0
    assert boxes(folder) == {"a.png": [("ant", PX)]}


def test_a_name_ends_at_a_line_break_of_files_alone(folder: Path) -> None:
    (folder / "given.txt").write_bytes("a\u2028b\r\nc\x0cd\rant\n".encode())
    assert yolo(folder, f"1 {BOX}\n2 {BOX}\n") == 0
    assert [name for name, _ in boxes(folder)["a.png"]] == ["c\x0cd", "ant"]


@pytest.mark.parametrize(
    "names",
    [
        "names: [010]",
        "names: [0x1F, cup]",
        "names: [1_0]",
        "names: {0: 7}",
        "names: [no, cup]",
        "names: [1.5, cup]",
        "names: [cup, ant]\nnc: 3",
        "names: [~]",
    ],
)
def test_names_that_yaml_reads_as_other_values_are_refused(folder: Path, names: str) -> None:
    (folder / "data.yaml").write_text(names)
    assert yolo(folder, f"0 {BOX}\n", names="data.yaml") == 2


def test_an_export_with_images_and_labels_side_by_side_is_read_from_its_root(folder: Path) -> None:
    make_images(folder, "train/images/b.png", "valid/images/b.png")
    for part in ("train", "valid"):
        (folder / "labels" / part / "labels").mkdir(parents=True)
        (folder / "labels" / part / "labels" / "b.txt").write_text(f"{int(part == 'valid')} {BOX}\n")
    (folder / "labels" / "README.dataset.txt").write_text("exported\n")
    (folder / "labels" / "classes.txt").write_text("cup\nant\n")
    (folder / "labels" / "train.txt").write_text("./train/images/b.png\n")
    assert yolo(folder, "") == 0
    found = {name: [category for category, _ in rows] for name, rows in boxes(folder).items()}
    assert found == {"a.png": [], "train/images/b.png": ["cup"], "valid/images/b.png": ["ant"]}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"0 0,5 0,5 0,2 0,2\n", "decimal point"),
        (b"0,0.5,0.5,0.2,0.2\n", "spaces"),
        (b"0;0.5;0.5;0.2;0.2\n", "spaces"),
        (b"0, 0.5, 0.5, 0.2, 0.2\n", "spaces"),
        ("größe 0.5 0.5 0.2 0.2\n".encode("latin-1"), "--encoding"),
    ],
)
def test_the_remedy_for_rows_of_other_countries_is_named(folder: Path, text: bytes, word: str) -> None:
    make_images(folder, "b.png")
    (folder / "labels" / "b.txt").write_bytes(text)
    assert yolo(folder, f"0 {BOX}\n") == 3
    (error,) = errors(folder)
    assert error["where"] in ("b.txt", "b.txt:1")
    assert word in error["message"]


def test_text_files_in_capitals_utf_16_and_gzip_are_read(folder: Path) -> None:
    make_images(folder, "b.png", "c.png", "d.png")
    (folder / "labels" / "b.TXT").write_text(f"0 {BOX}\n")
    (folder / "labels" / "c.txt").write_text(f"0 {BOX}\n", encoding="utf-16")
    (folder / "labels" / "d.txt.gz").write_bytes(gzip.compress(f"0 {BOX}\n".encode()))
    assert yolo(folder, f"0 {BOX}\n") == 0
    assert [len(rows) for rows in boxes(folder).values()] == [1] * 4


def test_two_files_of_one_image_are_both_listed(folder: Path) -> None:
    (folder / "labels" / "a.txt.gz").write_bytes(gzip.compress(f"0 {BOX}\n".encode()))
    assert yolo(folder, f"0 {BOX}\n") == 3
    assert reasons(folder) == [("a.txt", "BAD_IMAGE"), ("a.txt.gz", "BAD_IMAGE")]


def test_a_row_of_six_numbers_that_may_be_a_triangle_names_the_option(folder: Path) -> None:
    row = "0 .1 .2 .5 .6 .3 1\n"
    assert yolo(folder, row) == 3
    assert "--rows segments" in errors(folder)[0]["message"]
    assert yolo(folder, row, "--rows", "segments") == 0


def test_edges_beyond_the_image_by_rounding_are_those_of_the_image(folder: Path) -> None:
    rows = ["0 0.033333 0.5 0.066667 1", "0 0.966667 0.5 0.066667 1", "0 0.0329 0.5 0.0666 1"]
    assert yolo(folder, "\n".join(rows)) == 0
    (_, left), (_, right), (_, beyond) = boxes(folder)["a.png"]
    assert (left[0], right[0] + right[2]) == (0, WIDTH)
    assert beyond[0] == pytest.approx(-0.0004 * WIDTH)


def test_a_folder_of_empty_files_is_refused(folder: Path) -> None:
    assert yolo(folder, "") == 2
    assert not (folder / "out.json").exists()


def test_dota_rows_are_upright_boxes_or_named(folder: Path) -> None:
    rows = [
        "imagesource:GoogleEarth",
        "gsd:0.146",
        "10 5 30 5 30 25 10 25 plane 0",
        "40 10 56 22 50 30 34 18 large-vehicle 1",
        "10 5 30 5 30 25 10 25",
        "0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2 plane 0",
        "10 5 30 5 30 x 10 25 plane 0",
        "10 5 30 5 30 25 10 25 plane 0 1",
    ]
    (folder / "labels" / "a.txt").write_text("\n".join(rows))
    assert convert(folder, "dota") == 3
    assert reasons(folder) == [
        ("a.txt:4", "BOX_ROTATED"),
        *((f"a.txt:{line}", "BAD_ROW") for line in (5, 6, 7, 8)),
    ]
    assert boxes(folder) == {"a.png": [("plane", [10, 5, 20, 20])]}
    (folder / "labels" / "a.txt").write_text("\n".join(rows[:4]))
    assert convert(folder, "dota", "--rotated-boxes", "upright") == 0
    upright, rotated = annotations(folder)
    assert (rotated["bbox"], rotated["difficult"]) == ([34, 10, 22, 20], "1")
    assert rotated["rotated_box"] == [40, 10, 56, 22, 50, 30, 34, 18]
    assert "rotated_box" not in upright
    assert COCO(str(folder / "out.json")).getAnnIds()


@pytest.mark.parametrize(
    "row",
    [
        "P0001 0.93 10 5 30 5 30 25 10 25",
        "0001 0.93 10 5 30 5 30 25 10 25",
        "0001 0.93 10 5 30 5 30 25 10.5 1",
        "10 5 30 5 30 25 10 25 plane 0.93",
        "10 5 30 5 30 25 10 25 storage tank",
        "3 10 5 30 5 30 25 10 25",
        "10 5 30 5 30 25 10 25 0.93",
    ],
)
def test_columns_in_another_order_than_that_of_dotas_labels_are_listed(folder: Path, row: str) -> None:
    (folder / "labels" / "a.txt").write_text(f"{row}\n10 5 30 5 30 25 10 25 plane 1\n")
    assert convert(folder, "dota") == 3
    assert reasons(folder) == [("a.txt:1", "BAD_ROW")]
    assert [found["difficult"] for found in annotations(folder)] == ["1"]


def test_a_file_of_dotas_results_is_named_as_such(folder: Path) -> None:
    (folder / "labels" / "Task1_plane.txt").write_text("P0001 0.93 10 5 30 5 30 25 10 25\n")
    (folder / "labels" / "a.txt").write_text("10 5 30 5 30 25 10 25 plane\n")
    assert convert(folder, "dota") == 3
    assert reasons(folder) == [("Task1_plane.txt", "BAD_FILE")]
    assert "results" in errors(folder)[0]["message"]
