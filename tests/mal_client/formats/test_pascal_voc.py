"""Pascal VOC as users bring it: encodings, subfolders, image sets, and objects that are not one box."""

import gzip
import os
import unicodedata
from pathlib import Path

import pytest

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


def xml(*objects: str, filename: str = "", size: str = "", declaration: str = "") -> str:
    name = f"<filename>{filename}</filename>" if filename else ""
    return f"{declaration}<annotation>{name}{size}{''.join(objects)}</annotation>"


def thing(inner: str = "", *, name: str = "cup", corners: tuple[object, ...] = (2, 3, 11, 22)) -> str:
    tags = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name><bndbox>{tags}</bndbox>{inner}</object>"


BOX = [1, 2, 10, 20]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_images(tmp_path, "a.png")
    return tmp_path


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        *((name, name) for name in ("gbk", "GB18030", "big5", "Shift_JIS", "euc-kr", "iso-8859-1", "windows-1252")),
        *(("utf-8", "utf-8-sig"), ("utf-16", "utf-16"), ("", "utf-8")),
    ],
)
def test_a_file_is_decoded_as_it_declares(folder: Path, declared: str, encoding: str) -> None:
    name = {"gbk": "床", "gb18030": "床", "big5": "床", "shift_jis": "床", "euc-kr": "침대"}.get(
        declared.lower(), "lit é"
    )
    declaration = f'<?xml version="1.0" encoding="{declared}"?>' if declared else ""
    (folder / "labels" / "a.xml").write_bytes(xml(thing(name=name), declaration=declaration).encode(encoding))
    assert convert(folder, "voc") == 0
    assert boxes(folder) == {"a.png": [(name, BOX)]}


def test_a_file_of_an_undeclared_encoding_is_listed_and_the_encoding_can_be_given(folder: Path) -> None:
    make_images(folder, "b.png")
    (folder / "labels" / "a.xml").write_bytes(xml(thing(name="床")).encode("gbk"))
    (folder / "labels" / "b.xml").write_bytes(
        xml(thing(name="床"), declaration="<?xml version='1.0' encoding='zip'?>").encode("gbk")
    )
    assert convert(folder, "voc") == 3
    assert reasons(folder) == [("a.xml", "BAD_FILE"), ("b.xml", "BAD_FILE")]
    assert convert(folder, "voc", "--encoding", "gbk") == 0
    assert boxes(folder) == {"a.png": [("床", BOX)], "b.png": [("床", BOX)]}
    assert convert(folder, "voc", "--encoding", "nothing") == 2


def test_the_path_of_a_file_decides_among_images_of_one_name(folder: Path) -> None:
    cameras = [f"cam{number}" for number in range(3)]
    make_images(folder, *(f"{camera}/frame.png" for camera in cameras))
    for number, camera in enumerate(cameras):
        (folder / "labels" / camera).mkdir()
        text = xml(thing(name=f"seen by {number}"), filename="frame.png")
        (folder / "labels" / camera / "frame.xml").write_text(text)
    assert convert(folder, "voc") == 0
    assert boxes(folder) == {
        "a.png": [],
        **{f"{camera}/frame.png": [(f"seen by {number}", BOX)] for number, camera in enumerate(cameras)},
    }


def test_folders_of_images_may_lie_deeper_than_those_of_the_files(folder: Path) -> None:
    make_images(folder, "set/cam0/frame.png", "set/cam1/frame.png")
    for camera in ("cam0", "cam1"):
        (folder / "labels" / camera).mkdir()
        (folder / "labels" / camera / "frame.xml").write_text(xml(thing(name=camera)))
    (folder / "labels" / "frame.xml").write_text(xml(thing()))
    assert convert(folder, "voc") == 3
    assert reasons(folder) == [("frame.xml", "BAD_IMAGE")]
    assert boxes(folder)["set/cam1/frame.png"] == [("cam1", BOX)]


@pytest.mark.parametrize(
    ("image", "file", "matches"),
    [
        ("JPEGImages/x.png", "Annotations/x.xml", True),
        ("JPEGImages/train/x.png", "Annotations/train/x.xml", True),
        ("x.png", "train/x.xml", True),
        ("train/x.png", "x.xml", True),
        ("cam1/x.png", "cam0/x.xml", False),
    ],
)
def test_an_image_in_another_folder_is_not_guessed(folder: Path, image: str, file: str, matches: bool) -> None:
    make_images(folder, image)
    (folder / "labels" / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / "labels" / file).write_text(xml(thing(), filename="x.png"))
    assert convert(folder, "voc") == (0 if matches else 3)
    assert boxes(folder)[image] == ([("cup", BOX)] if matches else [])


@pytest.mark.parametrize("stated", ["C:\\\\data\\\\a.png", "/home/me/a.png", "a", "old name.png", "A.PNG", ""])
def test_a_stated_name_that_is_no_image_leaves_the_name_of_the_file(folder: Path, stated: str) -> None:
    (folder / "labels" / "a.xml").write_text(xml(thing(), filename=stated))
    assert convert(folder, "voc") == 0
    assert boxes(folder) == {"a.png": [("cup", BOX)]}


def test_a_file_that_names_another_image_than_its_own_is_listed(folder: Path) -> None:
    make_images(folder, "b.png")
    (folder / "labels" / "a.xml").write_text(xml(thing(), filename="b.png"))
    (folder / "labels" / "copy.xml").write_text(xml(thing(), filename="b.png"))
    (folder / "labels" / "other.xml").write_text(xml(thing(), filename="b.png"))
    assert convert(folder, "voc") == 3
    assert reasons(folder) == [(name, "BAD_IMAGE") for name in ("a.xml", "copy.xml", "other.xml")]


def test_files_of_folders_that_the_images_do_not_have_are_errors_but_for_the_exact_name(folder: Path) -> None:
    make_images(folder, "b.png")
    for name in ("cam0/a.xml", "cam1/a.xml", "cam0/b.xml", "b.xml"):
        (folder / "labels" / name).parent.mkdir(exist_ok=True)
        (folder / "labels" / name).write_text(xml(thing()))
    assert convert(folder, "voc") == 3
    assert reasons(folder) == [(name, "BAD_IMAGE") for name in ("cam0/a.xml", "cam0/b.xml", "cam1/a.xml")]
    assert boxes(folder) == {"b.png": [("cup", BOX)]}


@pytest.mark.parametrize(
    "node",
    [
        "<object><name>cup</name><bndbox/></object>",
        "<object><name>cup</name></object>",
        thing("<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"),
        thing("<robndbox><cx>9</cx><cy>9</cy><w>4</w><h>4</h><angle>0</angle></robndbox>"),
        thing("<name>other</name>"),
        thing(name=""),
        thing(corners=(0.1, 0.2, 0.5, 0.6)),
        thing(corners=(0, 3, 11, 22)),
        thing(corners=("1_0", 3, 11, 22)),
        thing(corners=(11, 3, 2, 22)),
        thing("<confidence>high</confidence>"),
        thing("<part><name>head</name></part>"),
        thing("<polygon><x1>1</x1><y1>1</y1><x2>5</x2></polygon>"),
    ],
)
def test_an_object_that_is_not_one_box_is_listed(folder: Path, node: str) -> None:
    (folder / "labels" / "a.xml").write_text(xml(thing(), node, thing(name="ant")))
    assert convert(folder, "voc") == 3
    assert reasons(folder) == [("a.xml:object 2", "BAD_ROW")]
    assert [name for name, _ in boxes(folder)["a.png"]] == ["cup", "ant"]


def test_a_corner_at_0_names_the_option(folder: Path) -> None:
    (folder / "labels" / "a.xml").write_text(xml(thing(corners=(0, 3, 11, 22))))
    assert convert(folder, "voc") == 3
    assert "--corners from-0" in errors(folder)[0]["message"]
    assert convert(folder, "voc", "--corners", "from-0") == 0
    assert boxes(folder) == {"a.png": [("cup", [0, 3, 11, 19])]}


SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
ROBOFLOW = "<source><database>roboflow.com</database></source>"


@pytest.mark.parametrize(
    ("corners", "head", "given", "named"),
    [
        ((2, 3, 11, 22), SIZE, [], "from-0 or from-1"),
        ((2, 3, 11, 22), SIZE, ["indices"], None),
        ((2, 3, 11, 22), SIZE, ["from-1"], None),
        ((2, 3, 11, 22), SIZE + ROBOFLOW, [], "from-1"),
        ((2, 3, 11, 22), SIZE + ROBOFLOW, ["indices"], None),
        ((2, 3, WIDTH + 1, 22), SIZE, [], "from-1"),
        ((2, 3, 11, HEIGHT + 1), SIZE, ["from-0"], "from-1"),
        ((2, 3, WIDTH + 1, 22), SIZE, ["from-1"], None),
        ((2, 3, WIDTH + 1, 22), "", ["indices"], None),
    ],
)
def test_the_meaning_of_corners_is_printed_unless_stated_or_contradicted(
    corners: tuple[int, ...], head: str, given: list[str], named: str | None, request: pytest.FixtureRequest
) -> None:
    folder, capsys = request.getfixturevalue("folder"), request.getfixturevalue("capsys")
    (folder / "labels" / "a.xml").write_text(xml(thing(corners=corners), size=head))
    assert convert(folder, "voc", *(["--corners", *given] if given else [])) == 0
    printed = capsys.readouterr().err
    assert printed.count("--corners") == (named is not None)
    assert named is None or f"--corners {named}" in printed


def test_confidence_parts_and_outlines_are_kept(folder: Path) -> None:
    head = "<part><name>head</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>5</xmax><ymax>8</ymax></bndbox></part>"
    outline = "<polygon><x1>2</x1><y1>3</y1><x2>11</x2><y2>3</y2><x3>11</x3><y3>22</y3></polygon>"
    (folder / "labels" / "a.xml").write_text(xml(thing(f"{head}{outline}<score>0.25</score><pose>Left</pose>")))
    assert convert(folder, "voc") == 0
    (row,) = annotations(folder)
    assert (row["score"], row["pose"], row["parts"]) == (0.25, "Left", [{"name": "head", "bbox": [2, 3, 3, 5]}])
    assert row["segmentation"] == [[1.5, 2.5, 10.5, 2.5, 10.5, 21.5]]
    assert row["area"] == pytest.approx(9 * 19 / 2, rel=0.05)


def test_an_outline_on_a_line_is_listed(folder: Path) -> None:
    outline = "<polygon><x1>2</x1><y1>3</y1><x2>11</x2><y2>3</y2><x3>7</x3><y3>3</y3></polygon>"
    (folder / "labels" / "a.xml").write_text(xml(thing(outline) + thing()))
    assert convert(folder, "voc") == 3
    assert reasons(folder) == [("a.xml:object 1", "BAD_ROW")]
    assert len(annotations(folder)) == 1


@pytest.mark.parametrize(
    ("size", "exit_code"),
    [
        ("abc ", 3),
        (" 50", 0),
        ("80 ", 0),
        ("416 ", 3),
        ("0 99", 3),
        ("8_0 50", 3),
        ("80.0 50", 0),
        ("0 0", 0),
        (" ", 0),
        ("50 80", 3),
        ("81 50", 3),
        ("wide high", 3),
        ("-80 50", 3),
        ("80.5 50", 3),
    ],
)
def test_a_stated_size_must_be_that_of_the_image(folder: Path, size: str, exit_code: int) -> None:
    width, _, height = size.partition(" ")
    stated = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    (folder / "labels" / "a.xml").write_text(xml(thing(), size=stated))
    assert convert(folder, "voc") == exit_code


def test_a_document_of_another_kind_is_listed(folder: Path) -> None:
    (folder / "labels" / "a.xml").write_text("<annotations><image><box/></image></annotations>")
    assert convert(folder, "voc") == 3
    assert reasons(folder) == [("a.xml", "BAD_FILE")]


@pytest.mark.parametrize(("angle", "exit_code"), [("0", 0), ("0.5", 3)])
def test_a_rotated_box_is_refused_by_name_or_taken_upright(folder: Path, angle: str, exit_code: int) -> None:
    box = f"<robndbox><cx>30</cx><cy>20</cy><w>20</w><h>10</h><angle>{angle}</angle></robndbox>"
    (folder / "labels" / "a.xml").write_text(xml(f"<object><name>ship</name>{box}</object>"))
    assert convert(folder, "voc") == exit_code
    if exit_code:
        assert reasons(folder) == [("a.xml:object 1", "BOX_ROTATED")]
        assert convert(folder, "voc", "--rotated-boxes", "upright") == 0
        (row,) = annotations(folder)
        x, y, w, h = row["bbox"]
        assert (x + w / 2, y + h / 2) == pytest.approx((30, 20))
        # Half the extent of a box at an angle: w |cos| + h |sin|.
        assert (w, h) == pytest.approx((22.3459, 18.3643), abs=1e-3)
        assert len(row["rotated_box"]) == 8
    else:
        assert boxes(folder) == {"a.png": [("ship", [20, 15, 20, 10])]}


def test_an_image_set_selects_the_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(folder, "b.png", "c.png")
    for name in "abc":
        (folder / "labels" / f"{name}.xml").write_text(xml(thing(name=name)))
    (folder / "train.txt").write_text("a\nb\n", encoding="utf-8-sig")
    (folder / "cat_train.txt").write_text("a  1\nb -1\nc  0\n")
    (folder / "test.txt").write_text("c\nabsent\n")
    assert convert(folder, "voc", "--image-set", str(folder / "train.txt")) == 0
    assert boxes(folder) == {"a.png": [("a", BOX)], "b.png": [("b", BOX)]}
    assert convert(folder, "voc", "--image-set", str(folder / "cat_train.txt")) == 0
    assert sorted(boxes(folder)) == ["a.png", "c.png"]
    assert "1 left out" in capsys.readouterr().out
    assert convert(folder, "voc", "--image-set", str(folder / "test.txt")) == 3
    assert reasons(folder) == [("test.txt:2", "BAD_FILE")]


def test_a_list_without_flags_mentions_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "labels" / "a.xml").write_text(xml(thing()))
    (folder / "train.txt").write_text("a\n")
    assert convert(folder, "voc", "--image-set", str(folder / "train.txt")) == 0
    assert "left out" not in capsys.readouterr().out


def test_a_listed_image_without_a_file_is_not_an_image_without_boxes(folder: Path) -> None:
    make_images(folder, "b.png")
    (folder / "labels" / "a.xml").write_text(xml(thing()))
    (folder / "train.txt").write_text("a\nb\n")
    assert convert(folder, "voc", "--image-set", str(folder / "train.txt")) == 3
    assert reasons(folder) == [("train.txt:2", "BAD_FILE")]
    assert boxes(folder) == {"a.png": [("cup", BOX)]}


def test_each_line_of_a_list_needs_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(folder, "photo 0.png", "photo -1.png")
    for name in ("photo 0", "photo -1"):
        (folder / "labels" / f"{name}.xml").write_text(xml(thing()))
    (folder / "train.txt").write_text("photo 0\nphoto 1\nphoto -1\nother -1\n")
    assert convert(folder, "voc", "--image-set", str(folder / "train.txt")) == 3
    assert reasons(folder) == [("train.txt:2", "BAD_FILE")]
    assert sorted(boxes(folder)) == ["photo -1.png", "photo 0.png"]
    assert "1 left out" in capsys.readouterr().out


def test_a_list_without_a_name_is_refused(folder: Path) -> None:
    (folder / "labels" / "a.xml").write_text(xml(thing()))
    (folder / "train.txt").write_text("\n")
    assert convert(folder, "voc", "--image-set", str(folder / "train.txt")) == 2


@pytest.mark.parametrize("text", ["a 7\n", "a 1 1\n", "a.png;b.png c\n"])
def test_a_line_that_is_no_name_of_a_file_is_listed(folder: Path, text: str) -> None:
    (folder / "labels" / "a.xml").write_text(xml(thing()))
    (folder / "train.txt").write_text(text)
    assert convert(folder, "voc", "--image-set", str(folder / "train.txt")) == 3
    assert reasons(folder) == [("train.txt:1", "BAD_FILE")]


@pytest.mark.parametrize("line", ["été 1", "été 1 0", unicodedata.normalize("NFD", "été 1")])
def test_listed_names_may_have_spaces_and_accents_in_either_form(folder: Path, line: str) -> None:
    name = unicodedata.normalize("NFD", "été 1")
    make_images(folder, f"{name}.png")
    (folder / "labels" / f"{name}.xml").write_text(xml(thing()))
    (folder / "labels" / "a.xml").write_text(xml(thing()))
    (folder / "train.txt").write_text(f"{line}\n")
    assert convert(folder, "voc", "--image-set", str(folder / "train.txt")) == 0
    assert boxes(folder) == {f"{name}.png": [("cup", BOX)]}


def test_names_in_other_bytes_suffixes_and_gzip_are_read(folder: Path) -> None:
    latin = os.fsdecode(b"\xe9t\xe9.png")
    make_images(folder, latin, "e\u0301.png", "zipped.png")
    (folder / "labels" / latin).with_suffix(".xml").write_text(xml(thing()))
    (folder / "labels" / "\u00e9.XML").write_text(xml(thing()))
    (folder / "labels" / "zipped.xml.gz").write_bytes(gzip.compress(xml(thing()).encode()))
    (folder / "labels" / "a.xml").write_text(xml())
    assert convert(folder, "voc") == 0
    assert {name: len(rows) for name, rows in boxes(folder).items()} == {
        **{latin: 1, "e\u0301.png": 1, "zipped.png": 1},
        "a.png": 0,
    }


def test_the_names_of_an_image_set_may_have_a_suffix(folder: Path) -> None:
    make_images(folder, "b.jpg", "c.jpg.png", "c.png", "d.png")
    for name in ("a", "b", "c", "c.jpg", "d"):
        (folder / "labels" / f"{name}.xml").write_text(xml(thing()))
    (folder / "train.txt").write_text("a.png\nb.JPG 1\nc.jpg\nd.png -1\n")
    assert convert(folder, "voc", "--image-set", str(folder / "train.txt")) == 0
    assert sorted(boxes(folder)) == ["a.png", "b.jpg", "c.jpg.png"]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf \n", "empty"),
        (b"<annotation><object>", "line 1"),
        ("<annotation>é".encode("latin-1"), "--encoding"),
    ],
)
def test_a_damaged_file_is_listed_with_its_cause(folder: Path, data: bytes, word: str) -> None:
    make_images(folder, "b.png")
    (folder / "labels" / "a.xml").write_text(xml(thing()))
    (folder / "labels" / "b.xml").write_bytes(data)
    assert convert(folder, "voc") == 3
    assert reasons(folder) == [("b.xml", "BAD_FILE")]
    message = errors(folder)[0]["message"]
    assert word in message
    assert ("--encoding" in message) == (word == "--encoding")
