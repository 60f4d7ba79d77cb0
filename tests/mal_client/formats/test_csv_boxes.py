"""CSV files as users bring them: shares, sizes, classes by number, Open Images, images without boxes."""

import gzip
from pathlib import Path

import pytest

from tests.mal_client.formats.conversions import annotations, boxes, convert, errors, make_images, reasons


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_images(tmp_path, "a.png", "deep/b.png")
    return tmp_path


def table(folder: Path, *lines: str, options: tuple[str, ...] = ()) -> int:
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    return convert(folder, "csv", *options, labels="boxes.csv")


CORNERS = "file_name,label,xmin,ymin,xmax,ymax"


def test_the_first_row_with_a_share_shows_the_unit_of_the_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["a.png,cup,0,0,1,1", "a.png,cup,0.25,0.5,0.5,1", "a.png,cup,10,5,20,15"]
    assert table(folder, "file_name,label,XMin,YMin,XMax,YMax", *rows) == 3
    assert boxes(folder) == {"a.png": [("cup", [0, 0, 80, 50]), ("cup", [20, 25, 20, 25])]}
    assert reasons(folder) == [("boxes.csv:4", "BAD_ROW")]
    assert "shares" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "is_named"), [("/m/01g317", True), ("/g/11f1x", True), ("/t/dd", True), ("cup", False)]
)
def test_identifiers_of_open_images_without_names_are_pointed_out(
    folder: Path, label: str, is_named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    header, row = "ImageID,LabelName,XMin,XMax,YMin,YMax", f"a,{label},0.25,0.5,0.5,1"
    assert table(folder, header, row, row) == 0
    assert boxes(folder)["a.png"][0][0] == label
    assert capsys.readouterr().err.count("--names") == is_named
    (folder / "classes.csv").write_text(f"{label},Person\n")
    assert table(folder, header, row, options=("--names", str(folder / "classes.csv"))) == 0
    assert "--names" not in capsys.readouterr().err


@pytest.mark.parametrize(("text", "flag"), [("1.0", 1), ("0.0", 0), ("-1.0", -1), ("True", 1), ("FALSE", 0), ("1", 1)])
def test_flags_of_open_images_may_be_written_as_other_tools_do(folder: Path, text: str, flag: int) -> None:
    header = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf,IsOccluded"
    assert table(folder, header, f"a,/m/1,0.25,0.5,0.5,1,{text},{text}") == 0
    (row,) = annotations(folder)
    assert (row["is_group_of"], row["is_occluded"], row.get("iscrowd", 0)) == (flag, flag, int(flag == 1))


@pytest.mark.parametrize("text", ["2", "0.5", "nan", "yes", "1e999", "inf"])
def test_another_flag_of_open_images_is_listed(folder: Path, text: str) -> None:
    header = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf"
    rows = [f"a,/m/1,0.25,0.5,0.5,1,{text}", "a,/m/1,0.25,0.5,0.25,1,0"]
    assert table(folder, header, *rows) == 3
    assert reasons(folder) == [("boxes.csv:2", "BAD_ROW")]


def test_spaces_after_the_delimiter_are_no_part_of_a_name(folder: Path) -> None:
    assert table(folder, 'image, "label", "xmin", "ymin", "xmax", "ymax"', 'a.png, "cup, red", 1, 2, 9, 9') == 0
    assert boxes(folder)["a.png"] == [("cup, red", [1, 2, 8, 7])]


def test_names_that_lead_to_one_file_are_errors_except_its_own(folder: Path) -> None:
    names = ["x/a.png", "y/a.png", "A.PNG", "a.png"]
    assert table(folder, CORNERS, *(f"{name},cup,10,5,20,15" for name in names)) == 3
    assert boxes(folder) == {"a.png": [("cup", [10, 5, 10, 10])]}
    assert reasons(folder) == [(f"boxes.csv:{number}", "BAD_IMAGE") for number in (2, 3, 4)]


def test_names_that_lead_to_a_file_of_another_spelling_are_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table(folder, CORNERS, "x/A.PNG,cup,10,5,20,15", "deep/b.png,cup,10,5,20,15") == 0
    assert "1 image of another spelling" in capsys.readouterr().err


def test_a_share_in_a_table_of_pixels_is_listed(folder: Path) -> None:
    rows = ["a.png,cup,10,5,20,15", "a.png,cup,0.25,0.5,0.5,1", "a.png,cup,0,0,1,1", "a.png,cup,0,0,1,2"]
    assert table(folder, CORNERS, *rows) == 3
    assert reasons(folder) == [("boxes.csv:3", "BAD_ROW"), ("boxes.csv:4", "BAD_ROW")]
    assert table(folder, CORNERS, *rows, options=("--units", "pixels")) == 0
    assert len(annotations(folder)) == 4
    assert table(folder, CORNERS, *rows, options=("--units", "shares")) == 3
    assert reasons(folder) == [("boxes.csv:2", "BAD_ROW"), ("boxes.csv:5", "BAD_ROW")]


def test_a_table_that_shows_no_unit_is_listed(folder: Path) -> None:
    assert table(folder, CORNERS, "a.png,cup,0,0,1,1") == 3
    assert "--units" in errors(folder)[0]["message"]


@pytest.mark.parametrize(
    ("header", "row", "exit_code"),
    [
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.png,80,50,cup,10,5,20,15", 0),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.png,416,416,cup,10,5,20,15", 3),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.png,416,416,cup,0,0,416,416", 3),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.png,10,10,cup,10,5,20,15", 0),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.png,0,0,cup,10,5,20,15", 0),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.png,,,cup,10,5,20,15", 0),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.png,wide,50,cup,10,5,20,15", 3),
        ("filename,x,y,width,height,image_width,image_height", "a.png,10,5,10,10,80,50", 0),
        ("filename,x,y,width,height,image_width,image_height", "a.png,10,5,10,10,50,80", 3),
    ],
)
def test_a_stated_size_must_be_that_of_the_image(folder: Path, header: str, row: str, exit_code: int) -> None:
    assert table(folder, header, row) == exit_code
    if exit_code == 0:
        assert [found["bbox"] for found in annotations(folder)] == [[10, 5, 10, 10]]


def test_rows_without_a_box_are_images_without_boxes(folder: Path) -> None:
    assert table(folder, CORNERS, "deep/b.png,,,,,", "a.png,cup,10,5,20,15") == 0
    assert boxes(folder) == {"deep/b.png": [], "a.png": [("cup", [10, 5, 10, 10])]}
    assert table(folder, CORNERS, "a.png,cup,,,,", "a.png,,10,5,20,15", "a.png,cup,10,,20,15") == 3
    assert reasons(folder) == [(f"boxes.csv:{line}", "BAD_ROW") for line in (2, 3, 4)]


def test_classes_by_number_get_their_names(folder: Path) -> None:
    (folder / "names.txt").write_text("cup\nant\n", encoding="utf-16")
    names = ("--names", str(folder / "names.txt"))
    header = CORNERS.replace("label", "class_id")
    rows = [f"a.png,{number},10,5,20,15" for number in ("1", "0.0", "ant", "2", "1.5")]
    assert table(folder, header, *rows, options=names) == 3
    assert [name for name, _ in boxes(folder)["a.png"]] == ["ant", "cup", "ant"]
    assert reasons(folder) == [("boxes.csv:5", "BAD_ROW"), ("boxes.csv:6", "BAD_ROW")]
    assert table(folder, header, rows[0]) == 0
    assert boxes(folder) == {"a.png": [("1", [10, 5, 10, 10])]}


def test_scores_are_kept_and_columns_that_are_not_read_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = f"{CORNERS},confidence,annotator"
    assert table(folder, header, "a.png,cup,10,5,20,15,0.75,me", "a.png,cup,10,5,20,15,,me") == 0
    assert [row.get("score") for row in annotations(folder)] == [0.75, None]
    assert "annotator" in capsys.readouterr().err
    assert table(folder, header, "a.png,cup,10,5,20,15,sure,me") == 3


OPEN_IMAGES = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)


def test_open_images_tables_are_read_by_their_own_header(folder: Path) -> None:
    (folder / "classes.csv").write_text('LabelName,DisplayName\n/m/01,Cup\n/m/02,"Box, paper"\n', encoding="utf-8-sig")
    rows = [
        "a,xclick,/m/01,1,0.25,0.5,0.5,1,0,1,0,0,-1",
        "b,xclick,/m/02,1,0,1,0,1,0,0,1,0,0",
        "b,xclick,/m/03,1,0,1,0,1,0,0,0,0,0",
        "c,xclick,/m/01,1,0,1,0,1,0,0,0,0,0",
        "a,xclick,/m/01,1,0.25,0.5,0.5,1,0,2,0,0,0",
        "a,xclick,/m/01,1,25,50,5,10,0,0,0,0,0",
    ]
    assert table(folder, OPEN_IMAGES, *rows, options=("--names", str(folder / "classes.csv"))) == 3
    assert boxes(folder) == {"a.png": [("Cup", [20, 25, 20, 25])], "deep/b.png": [("Box, paper", [0, 0, 80, 50])]}
    assert [(where, reason) for where, reason in reasons(folder)] == [
        ("boxes.csv:4", "BAD_ROW"),
        ("boxes.csv:5", "BAD_IMAGE"),
        ("boxes.csv:6", "BAD_ROW"),
        ("boxes.csv:7", "BAD_ROW"),
    ]
    first, group = annotations(folder)
    assert (first["is_truncated"], first["is_inside"], first["iscrowd"], group["iscrowd"]) == (1, -1, 0, 1)
    assert "score" not in first  # Open Images' confidence says that the label was verified
    assert table(folder, OPEN_IMAGES, rows[0]) == 0
    assert [name for name, _ in boxes(folder)["a.png"]] == ["/m/01"]


@pytest.mark.parametrize("text", ["", "a,b,c\n", "/m/01,\n", "/m/01,Cup\n/m/01,Mug\n"])
def test_descriptions_of_classes_that_are_none_are_refused(folder: Path, text: str) -> None:
    (folder / "classes.csv").write_text(text)
    options = ("--names", str(folder / "classes.csv"))
    assert table(folder, CORNERS, "a.png,/m/01,10,5,20,15", options=options) == 2


def test_a_table_without_header_is_refused_with_the_option_that_names_its_columns(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table(folder, "a.png,10,10,20,15,cup") == 2
    assert "--columns" in capsys.readouterr().err


def test_a_decimal_comma_is_pointed_out(folder: Path) -> None:
    assert table(folder, CORNERS.replace(",", ";"), "a.png;cup;10,5;5;20;15", "a.png;cup;10.5;5;20;15") == 3
    assert reasons(folder) == [("boxes.csv:2", "BAD_ROW")]
    assert "decimal point" in errors(folder)[0]["message"]


def test_width_and_height_mean_one_thing_in_a_table(folder: Path) -> None:
    header = "filename,width,height,class,xmin,ymin,xmax,ymax"
    whole, far, other = "a.png,20,15,cup,0,0,20,15", "a.png,10,10,cup,10,5,20,15", "a.png,80,50,cup,1,5,20,15"
    assert table(folder, header, whole, far, whole) == 0
    assert len(annotations(folder)) == 3
    assert table(folder, header, other, far, whole) == 3
    assert reasons(folder) == [("boxes.csv:3", "IMAGE_SIZE_MISMATCH"), ("boxes.csv:4", "IMAGE_SIZE_MISMATCH")]


@pytest.mark.parametrize("encoding", ["undefined", "utf-16", "rot13"])
def test_text_that_an_encoding_cannot_decode_is_refused(folder: Path, encoding: str) -> None:
    (folder / "names.txt").write_text("cup\nant\n")
    row = "a.png,cup,10,5,20,15"
    assert table(folder, CORNERS, row, options=("--encoding", encoding)) == 2
    assert table(folder, CORNERS, row, options=("--names", str(folder / "names.txt"), "--encoding", encoding)) == 2


def test_a_table_of_names_with_a_cell_without_end_is_refused(folder: Path) -> None:
    (folder / "names.csv").write_text(f'/m/01,"{"x" * 200_000}\n')
    assert table(folder, CORNERS, "a.png,cup,10,5,20,15", options=("--names", str(folder / "names.csv"))) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gbk"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_table_in_any_encoding_and_in_gzip_is_read(folder: Path, encoding: str, zipped: bool) -> None:
    data = f"{CORNERS}\r\na.png,床,10,5,20,15\r\n".encode(encoding)
    (folder / "boxes.csv").write_bytes(gzip.compress(data) if zipped else data)
    options = ("--encoding", "gbk") if encoding == "gbk" else ()
    if options:
        assert convert(folder, "csv", labels="boxes.csv") == 2
    assert convert(folder, "csv", *options, labels="boxes.csv") == 0
    assert boxes(folder) == {"a.png": [("床", [10, 5, 10, 10])]}


def test_a_damaged_gzip_file_is_one_error(folder: Path) -> None:
    (folder / "boxes.csv").write_bytes(gzip.compress(f"{CORNERS}\na.png,cup,10,5,20,15\n".encode())[:-5])
    assert convert(folder, "csv", labels="boxes.csv") == 2
    assert not (folder / "out.json").exists()


def test_lines_that_a_quotation_mark_joins_are_listed_with_their_place(folder: Path) -> None:
    rows = ["a.png,cup,10,5,20,15", '"a.png,cup,10,5,20,15', "a.png,cup,10,5,20,15", 'a.png",cup,10,5,20,15']
    assert table(folder, CORNERS, *rows, "a.png,ant,10,5,20,15") == 3
    assert reasons(folder) == [("boxes.csv:3-5", "BAD_IMAGE")]
    assert len(annotations(folder)) == 2


@pytest.mark.parametrize(
    ("first", "delimiter"),
    [
        ("", "|"),
        ("sep=;", ";"),
        ("SEP=|", "|"),
        ('"sep=,"', ","),
        ("sep=\t", "\t"),
        ("sep=,,,,,,", ","),
        ("sep=:", ":"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_the_delimiter_is_that_of_the_first_line(folder: Path, first: str, delimiter: str, encoding: str) -> None:
    lines = [*([first] if first else []), CORNERS, "a.png,cup,1,2,11,22", "a.png,cup,x,2,3,4"]
    text = "\r\n".join([*lines[:-3], *(line.replace(",", delimiter) for line in lines[-3:])])
    (folder / "boxes.csv").write_text(text, encoding=encoding, newline="")
    assert convert(folder, "csv", labels="boxes.csv") == 3
    assert boxes(folder) == {"a.png": [("cup", [1, 2, 10, 20])]}
    assert reasons(folder) == [(f"boxes.csv:{len(lines)}", "BAD_ROW")]


def test_blank_lines_before_the_header_are_skipped(folder: Path) -> None:
    assert table(folder, "", "sep=;", " ", CORNERS.replace(",", ";"), "a.png;cup;1;2;11;22", "a.png;cup;x;2;3;4") == 3
    assert reasons(folder) == [("boxes.csv:6", "BAD_ROW")]


def test_a_named_delimiter_goes_before_given_columns(folder: Path) -> None:
    assert table(folder, "sep=;", "a.png;1;2;11;22", options=("--columns", "file_name,x1,y1,x2,y2")) == 0
    assert boxes(folder) == {"a.png": [("object", [1, 2, 10, 20])]}


def test_a_table_without_rows_is_refused(folder: Path) -> None:
    assert table(folder, CORNERS) == 2
