"""Tests of the conversion of boxes from other formats: each box is converted or listed as an error."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from mal_client.cli.main import main
from mal_client.formats.boxes import BoxRecord
from mal_client.formats.csv_boxes import CsvTable

from tests.mal_client.formats.conversions import HEIGHT, WIDTH, boxes, convert, errors, make_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Makes three images, one of them in a subfolder, and a file that is not an image."""
    make_images(tmp_path, "a.png", "b.png", "deep/c.png")
    (tmp_path / "labels" / "deep").mkdir()
    (tmp_path / "images" / "broken.png").write_text("not an image")
    return tmp_path


VOC_BOX = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
VOC = "<annotation>{size}<object><name>cup</name>" + VOC_BOX + "</object></annotation>"
VOC_SIZE = "<size><width>9</width><height>9</height></size>"
LABELME = (
    '{"imageWidth": %d, "imageHeight": 50, "shapes": [{"label": "cup", "shape_type": "rectangle", '
    '"points": [[1, 1], [9, 9]]}]}'
)
DOTA = "1 1 9 1 9 9 1 9 ship"
PER_IMAGE = {
    "yolo": (".txt", "0 0.5 0.5 0.5 0.5", "0 0.5"),
    "voc": (".xml", VOC.format(size=""), VOC.format(size=VOC_SIZE)),
    "labelme": (".json", LABELME % WIDTH, LABELME % 9),
    "dota": (".txt", DOTA, "1 1 ship"),
}
"""Suffix of the files, one with a box, and one whose only row is refused."""
EMPTY = {
    "yolo": "",
    "voc": "<annotation/>",
    "labelme": '{"imageWidth": 80, "imageHeight": 50, "shapes": []}',
    "dota": "",
}


def convert_files(folder: Path, source_format: str, files: dict[str, bytes]) -> int:
    """Converts files by the name of their image; other images have none."""
    (folder / "images" / "broken.png").unlink()
    for name, content in files.items():
        (folder / "labels" / f"{name}{PER_IMAGE[source_format][0]}").write_bytes(content)
    (folder / "names.txt").write_text("cup")
    return convert(folder, source_format, *(["--names", str(folder / "names.txt")] if source_format == "yolo" else []))


@pytest.mark.parametrize("source_format", PER_IMAGE)
def test_images_without_a_label_file_have_no_boxes_and_are_counted_by_name(
    folder: Path, source_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    box, empty = PER_IMAGE[source_format][1], EMPTY[source_format]
    assert convert_files(folder, source_format, {"a": box.encode(), "b": empty.encode()}) == 0
    assert [name for name, rows in boxes(folder).items() if not rows] == ["b.png", "deep/c.png"]
    assert "1 image without" in (printed := capsys.readouterr().err)
    assert "'deep/c.png'" in printed


@pytest.mark.parametrize("source_format", PER_IMAGE)
@pytest.mark.parametrize("is_broken", [True, False])
def test_images_whose_labels_are_all_refused_are_listed_only(
    folder: Path, source_format: str, is_broken: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    _, box, refused = PER_IMAGE[source_format]
    content = b"\xff<" if is_broken else refused.encode()
    assert convert_files(folder, source_format, {"a": box.encode(), "b": content, "deep/c": box.encode()}) == 3
    assert len(errors(folder)) == 1
    assert sorted(boxes(folder)) == ["a.png", "deep/c.png"]
    assert "image without" not in capsys.readouterr().err


@pytest.mark.parametrize("source_format", PER_IMAGE)
def test_the_folder_of_images_is_named_once_if_images_are_missing(
    folder: Path, source_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    box = PER_IMAGE[source_format][1].encode()
    assert convert_files(folder, source_format, {"a": box, "x": box, "y": box}) == 3
    assert capsys.readouterr().err.count(f"{folder / 'images'}; --images") == 1


def test_a_csv_file_with_corners_becomes_a_coco_file(folder: Path) -> None:
    (folder / "boxes.csv").write_text(
        "filename,xmin,ymin,xmax,ymax,class\na.png,1,2,11,22,cup\ndeep/c.png,0,0,5,5,ant\n"
    )
    assert convert(folder, "csv", labels="boxes.csv") == 0
    assert boxes(folder) == {"a.png": [("cup", [1, 2, 10, 20])], "deep/c.png": [("ant", [0, 0, 5, 5])]}
    written = json.loads((folder / "out.json").read_text())
    assert [row["source"] for row in written["annotations"]] == ["boxes.csv:2", "boxes.csv:3"]
    assert written["images"][0] == {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}
    assert [row["name"] for row in written["categories"]] == ["ant", "cup"]


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("file_name;x;y;w;h\na.png;1;2;10;20\n", []),
        ("Image\tX\tY\tWidth\tHeight\r\na.png\t1\t2\t10\t20\r\n", []),
        ("\ufefffile_name,x,y,width,height\n\na.png,1,2,10,20\n", []),
        ("a.png,1,2,11,22\n", ["--columns", "file_name,x1,y1,x2,y2"]),
        ("path,width,height,x1,y1,x2,y2\na.png,80,50,1,2,11,22\n", []),
    ],
)
def test_csv_dialects_and_column_names_are_recognized(folder: Path, text: str, more: list[str]) -> None:
    (folder / "boxes.csv").write_text(text, newline="")
    assert convert(folder, "csv", *more, labels="boxes.csv") == 0
    assert boxes(folder) == {"a.png": [("object", [1, 2, 10, 20])]}


def test_every_row_of_a_csv_file_that_is_not_converted_is_listed_with_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        "a.png,1,2,11,22",
        "a.png,1,2,x,22",
        "a.png,1,2",
        "missing.png,1,2,3,4",
        "broken.png,1,2,3,4",
        "a.png,9,2,9,4",
        "a.png,0,0,1e200,1e200",
        "a.png,-1e308,0,1e308,5",
    ]
    (folder / "boxes.csv").write_text("\n".join(["file,x1,y1,x2,y2", *rows, ",1,2,3,4", "a.png,nan,2,3,4"]))
    assert convert(folder, "csv", labels="boxes.csv") == 3
    assert len(boxes(folder)["a.png"]) == 1
    assert [(row["where"], row["reason"]) for row in errors(folder)] == [
        ("boxes.csv:3", "BAD_ROW"),
        ("boxes.csv:4", "BAD_ROW"),
        ("boxes.csv:5", "BAD_IMAGE"),
        ("boxes.csv:6", "BAD_IMAGE"),
        ("boxes.csv:7", "BAD_ROW"),
        ("boxes.csv:8", "BAD_ROW"),
        ("boxes.csv:9", "BAD_ROW"),
        ("boxes.csv:10", "BAD_ROW"),
        ("boxes.csv:11", "BAD_ROW"),
    ]
    assert "BAD_ROW: 7" in capsys.readouterr().err


@pytest.mark.parametrize("header", ["a,b,c", "file_name,x,y", "x,y,width,height", "file_name,x,x,y,width,height"])
def test_a_csv_file_without_the_required_columns_is_refused(folder: Path, header: str) -> None:
    (folder / "boxes.csv").write_text(f"{header}\n")
    assert convert(folder, "csv", labels="boxes.csv") == 2
    assert not (folder / "out.json").exists()


def test_yolo_files_become_boxes_scores_and_outlines(folder: Path) -> None:
    (folder / "names.txt").write_text("cup\nant\n")
    (folder / "images" / "broken.png").unlink()
    (folder / "labels" / "a.txt").write_text("1 0.5 0.5 0.25 0.4\n0 0.5 0.5 1 1 0.875\n")
    (folder / "labels" / "deep" / "c.txt").write_text("0 0.1 0.2 0.5 0.2 0.5 0.6\n")
    assert convert(folder, "yolo", "--names", str(folder / "names.txt")) == 0
    assert boxes(folder) == {
        "a.png": [("ant", [30, 15, 20, 20]), ("cup", [0, 0, 80, 50])],
        "b.png": [],
        "deep/c.png": [("cup", [8, 10, 32, 20])],
    }
    rows = json.loads((folder / "out.json").read_text())["annotations"]
    assert rows[1]["score"] == 0.875
    np.testing.assert_allclose(rows[2]["segmentation"], [[8, 10, 40, 10, 40, 30]])


def test_invalid_yolo_rows_are_listed(folder: Path) -> None:
    (folder / "data.yaml").write_text("names:\n  0: cup\n  1: ant\n")
    rows = [
        "2 .5 .5 .1 .1",
        "cup .5 .5 .1 .1",
        "0 40 25 10 10",
        "0 .5 .5 .1",
        "0 .5 .5 -.1 .1",
        "0 .5 .5 .1 .1 .1 .1 .1",
        f"{'9' * 5000} .5 .5 .1 .1",
    ]
    (folder / "labels" / "a.txt").write_text("\n".join(rows))
    (folder / "labels" / "missing.txt").write_text("0 .5 .5 .1 .1\n")
    assert convert(folder, "yolo", "--names", str(folder / "data.yaml")) == 3
    listed = [row["where"].removeprefix(f"{folder}/") for row in errors(folder)]
    assert listed == ["images/broken.png", *(f"a.txt:{line}" for line in range(1, 8)), "missing.txt"]
    assert {row["reason"] for row in errors(folder)[1:8]} == {"BAD_ROW"}
    messages = {row["where"]: row["message"] for row in errors(folder)}
    assert messages["a.txt:1"].startswith("a.txt:1: class '2'")
    assert str(folder / "data.yaml") in messages["a.txt:1"]
    assert "pixels" in messages["a.txt:3"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("names.txt", text) for text in ("", "cup\n\nant\n", "cup\ncup\n")),
        *(
            ("data.yaml", f"names: {text}")
            for text in ("{0: cup, 2: ant}", "{0: cup, one: ant}", "{0: cup, null: ant}")
        ),
    ],
)
def test_class_names_with_gaps_or_duplicates_are_refused(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / "labels" / "a.txt").write_text("0 .5 .5 .1 .1\n")
    assert convert(folder, "yolo", "--names", str(folder / name)) == 2


VOC = """<annotation><filename>{name}</filename><size><width>{width}</width><height>{height}</height></size>
<object><name>cup</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>3</ymin><xmax>80</xmax><ymax>22</ymax></bndbox>
</object>{more}</annotation>"""


def voc(name: str = "a.png", width: int = WIDTH, height: int = HEIGHT, more: str = "") -> str:
    return VOC.format(name=name, width=width, height=height, more=more)


@pytest.mark.parametrize(
    ("form", "box"),
    [(None, [0, 2, 80, 20]), ("indices", [0, 2, 80, 20]), ("from-0", [1, 3, 79, 19]), ("from-1", [0, 2, 79, 19])],
)
def test_voc_corners_are_indices_of_pixels_unless_stated(folder: Path, form: str | None, box: list[float]) -> None:
    (folder / "images" / "broken.png").unlink()
    (folder / "labels" / "a.xml").write_text(voc())
    assert convert(folder, "voc", *(["--corners", form] if form else [])) == 0
    assert boxes(folder)["a.png"] == [("cup", box)]
    (row,) = json.loads((folder / "out.json").read_text())["annotations"]
    assert row["difficult"] == "1"


def test_voc_files_that_do_not_match_their_image_are_listed(folder: Path) -> None:
    (folder / "images" / "broken.png").unlink()
    (folder / "labels" / "a.xml").write_text(voc(width=HEIGHT, height=WIDTH))
    (folder / "labels" / "b.xml").write_text(voc("b.png", more="<object><name>x</name></object>"))
    (folder / "labels" / "d.xml").write_text(voc("d.png"))
    (folder / "labels" / "e.xml").write_text("<annotation>")
    (folder / "labels" / "f.xml").write_text("<?xml version='1.0' encoding='nothing'?><annotation/>")
    with (folder / "labels" / "g.xml").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "labels" / "h.xml").write_text(voc("b.png").replace("<width>80", f"<width>{'8' * 5000}"))
    assert convert(folder, "voc") == 3
    listed = errors(folder)
    assert [row["reason"] for row in listed] == [
        *("IMAGE_SIZE_MISMATCH", "BAD_ROW", "BAD_IMAGE"),
        *["BAD_FILE"] * 3,
        "BAD_IMAGE",  # b.xml has its image
    ]
    assert "swapped" in listed[0]["message"]
    assert listed[1]["where"] == "b.xml:object 2"
    assert boxes(folder)["b.png"] == [("cup", [0, 2, 80, 20])]


def test_a_yolo_file_that_is_not_text_is_listed_and_the_others_are_read(folder: Path) -> None:
    (folder / "labels" / "a.txt").write_bytes(b"\xff\xfe0")
    (folder / "labels" / "b.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (folder / "names.txt").write_text("cup\n")
    assert convert(folder, "yolo", "--names", str(folder / "names.txt")) == 3
    assert [row["where"] for row in errors(folder) if row["reason"] == "BAD_FILE"] == ["a.txt"]
    assert len(boxes(folder)["b.png"]) == 1


def test_a_csv_file_is_read_row_by_row(folder: Path) -> None:
    path = folder / "boxes.csv"
    path.write_text("file_name,x,y,width,height\n" + "a.png,1,2,3,4\n" * 200_000)
    tracemalloc.start()
    try:
        rows = sum(isinstance(row, BoxRecord) for row in CsvTable(path).rows())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows == 200_000
    assert peak < path.stat().st_size / 4


@pytest.mark.parametrize(
    "text",
    ["x" * 2_000_000, "file_name,x,y,width,height\n" + "a.png," * 400_000, 'a,b\n"' + 'b\n","' * 400_000],
    ids=["first line", "row", "row of many lines"],
)
def test_a_row_of_a_csv_file_is_bounded(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "boxes.csv").write_text(text)
    assert convert(folder, "csv", labels="boxes.csv") == 2
    assert "boxes.csv" in capsys.readouterr().err


def test_a_csv_file_with_an_open_quotation_mark_is_refused_with_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "boxes.csv").write_text('file_name,x,y,width,height\n"a.png,1,2,3,4\n' + "b.png,1,2,3,4\n" * 10_000)
    assert convert(folder, "csv", labels="boxes.csv") == 2
    assert "boxes.csv: line " in capsys.readouterr().err


@pytest.mark.parametrize("source_format", ["voc", "yolo"])
def test_a_folder_without_annotations_is_refused(
    folder: Path, source_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "names.txt").write_text("cup\n")
    names = ["--names", str(folder / "names.txt")] if source_format == "yolo" else []
    assert convert(folder, source_format, *names) == 2
    message = capsys.readouterr().err
    assert str(folder / "labels") in message
    assert "--labels" in message


@pytest.mark.parametrize("form", ["voc", "dota"])
@pytest.mark.parametrize(("labels", "text"), [("none", "no such folder"), ("a_file", "is a file")])
def test_labels_that_are_no_folder_are_refused_as_such(
    folder: Path, capsys: pytest.CaptureFixture[str], form: str, labels: str, text: str
) -> None:
    (folder / "a_file").touch()
    given = ["--labels", str(folder / labels), "--images", str(folder), "--output", str(folder / "out.json")]
    assert main(["convert", "--from", form, *given]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source_format", "option"),
    [("csv", ["--corners", "from-0"]), ("voc", ["--names", "n.txt"]), ("yolo", ["--columns", "a,b"])],
)
def test_an_option_of_another_format_is_refused(
    folder: Path, source_format: str, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(folder, source_format, *option) == 2
    assert f"{option[0]}: " in capsys.readouterr().err


def test_a_missing_image_folder_is_one_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "boxes.csv").write_text("file,x1,y1,x2,y2\na.png,1,2,11,22\nb.png,3,4,9,9\n")
    (folder / "images").rename(folder / "elsewhere")
    assert convert(folder, "csv", labels="boxes.csv") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"--images {folder / 'images'}: " in message
    assert not (folder / "out.json").exists()


@pytest.mark.parametrize(
    ("source_format", "option"),
    [("csv", "--labels"), ("csv", "--names"), ("yolo", "--names"), ("voc", "--image-set"), ("cvat", "--labels")],
)
def test_a_file_that_cannot_be_read_is_one_error_without_a_number(
    folder: Path, source_format: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "boxes.csv").write_text("file,x1,y1,x2,y2\na.png,1,2,11,22\n")
    given = {"--labels": "boxes.csv" if source_format == "csv" else "labels", option: "gone.txt"}
    arguments = [text for name, value in given.items() for text in (name, str(folder / value))]
    more = ["--images", str(folder / "images"), "--output", str(folder / "out.json")]
    assert main(["convert", "--from", source_format, *arguments, *more]) == 2
    message = capsys.readouterr().err
    assert "Errno" not in message
    assert message.count("gone.txt") == 1


def test_no_conversion_replaces_the_file_that_it_reads(folder: Path) -> None:
    text = "file_name,x1,y1,x2,y2\na.png,1,2,11,22\n"
    (folder / "out.json").write_text(text)
    assert convert(folder, "csv", labels="out.json") == 2
    assert (folder / "out.json").read_text() == text


def test_check_accepts_the_converted_file(folder: Path) -> None:
    (folder / "boxes.csv").write_text("file,x1,y1,x2,y2\na.png,1,2,11,22\nb.png,3,4,9,9\n")
    convert(folder, "csv", labels="boxes.csv")
    given = ["--annotations", str(folder / "out.json"), "--images", str(folder / "images")]
    assert main(["check", *given]) == 0
