"""Damaged files of boxes by the thousand: each row becomes a box or an error that names its place; none is lost."""

import base64
import csv
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from mal_client.formats.boxes import ConversionResult, Row, RowError, to_coco
from mal_client.formats.class_names import ClassNames, read_class_names
from mal_client.formats.csv_boxes import CsvTable
from mal_client.formats.dota import read_dota
from mal_client.formats.label_files import ImageNames
from mal_client.formats.labelme_shapes import read_labelme
from mal_client.formats.pascal_voc import read_voc
from mal_client.formats.row_forms import Corners, YoloRows
from mal_client.formats.yolo_boxes import read_yolo

from mal_train.core.errors import BadDataset, ConfigError
from mal_train.core.input_files import decode_text
from mal_train.core.masks.encodings import encode_bitmap
from mal_train.core.settings import RotatedBoxes
from tests.form import Form
from tests.mal_client.formats.conversions import HEIGHT, WIDTH, make_images

Record = Callable[..., None]

MASK_PNG = base64.b64encode(encode_bitmap(np.array([[True, True, False], [False, True, True]]))).decode()

YOLO = [
    b"0 0.5 0.5 0.25 0.4\n1 0.5 0.5 0.25 0.4\n",
    b"0 0.5 0.5 0.25 0.4\n1 0.5 0.5 0.25 0.4 0.75\n\n1 0.1 0.2 0.5 0.2 0.5 0.6\n0 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6\n",
    b"0 0.5 0.5 0.25 0.4 0.5 0.5 2 0 0 0\r\n0 0.5 0.2 0.625 0.44 0.5 0.6 0.375 0.36\r\n",
    "0 0.5 0.5 0.25 0.4\n1 .5 .5 .1 .1\n".encode("utf-16"),
]
VOC = [
    b"""<annotation><filename>a.png</filename><size><width>80</width><height>50</height></size><object><name>cup</name>
<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>11</xmax><ymax>22</ymax></bndbox><part><name>head</name><bndbox><xmin>2</xmin>
<ymin>3</ymin><xmax>5</xmax><ymax>9</ymax></bndbox></part></object><object><name>ant</name><confidence>0.5</confidence>
<bndbox><xmin>1.5</xmin><ymin>3</ymin><xmax>11</xmax><ymax>22</ymax></bndbox></object></annotation>""",
    """<?xml version="1.0" encoding="gbk"?><annotation><object><name>\u5e8a</name><robndbox><cx>30</cx><cy>20</cy>
<w>9</w><h>5</h><angle>0.5</angle></robndbox></object><object><name>a</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>
<ymax>9</ymax></bndbox><polygon><x1>1</x1><y1>1</y1><x2>5</x2><y2>1</y2><x3>5</x3><y3>8</y3></polygon></object>
</annotation>""".encode("gbk"),
]
CSV = [
    b"file_name,label,xmin,ymin,xmax,ymax,width,height,score\na.png,cup,10,5,20,15,80,50,0.5\n\na.png,,,,,,,,\n"
    b'"a.png","ant, red",1,2,3,4,80,50,\nb.png,cup,10,5,20,15,416,416,1\na.png,cup,.1,.2,.3,.4,80,50,1\n',
    b"image;x;y;w;h\r\na.png;1;2;10;20\r\ndeep/c.png;0.5;2;10;20\r\n",
    "file\tx1\ty1\tx2\ty2\na.png\t1\t2\t9\t8\n".encode("utf-16"),
]
OPEN_IMAGES = [
    b"ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
    b"a,xclick,/m/01,1,0.25,0.5,0.5,1,0,1,0,0,-1\nb,xclick,/m/02,1,0,1,0,1,0,0,1,0,0\nc,x,/m/01,1,0,1,0,1,0,0,0,0,0\n"
]
DOTA = [b"imagesource:GoogleEarth\ngsd:0.1\n10 5 30 5 30 25 10 25 plane 0\n40 10 56 22 50 30 34 18 ship 1\n"]
LABELME = [
    json.dumps(
        {
            "imagePath": "../images/a.png",
            "imageWidth": 80,
            "imageHeight": 50,
            "shapes": [
                {
                    "label": "cup",
                    "shape_type": "polygon",
                    "points": [[10, 5], [30, 5], [30.5, 25]],
                    "flags": {"a": True},
                },
                {"label": "ant", "shape_type": "rectangle", "points": [[30, 25], [10, 5]], "description": "score 0.5"},
                {"label": "bee", "shape_type": "circle", "points": [[40, 20], [43, 24]]},
                {"label": "fly", "shape_type": "point", "points": [[40, 20]]},
                {"label": "dog", "shape_type": "mask", "points": [[5, 5], [7, 6]], "mask": MASK_PNG},
            ],
        }
    ).encode(),
    b'{"imagePath": "a.png", "imageWidth": 80, "imageHeight": 50, "shapes": [{"label": "cup", "shape_type": "polygon",'
    b' "points": [[1, 2], [9, 2], [9, 8]], "group_id": null}, {"label": "ant", "points": [[30, 2], [40, 2], [5, 9]]}]}',
]
TOKENS = [
    *(
        b"nan",
        b"inf",
        b"-1",
        b"1e308",
        b"1e999",
        b"9" * 400,
        b"0.5",
        b"1_0",
        b"0x10",
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
    ),
    *(b"\n", b"\r", b",", b";", b"\t", b'"', b" ", b"<", b">", b"&lt;", b"&x;", b"<!--", b"]]>", b"\xc3\xa9", b"\xe9"),
    *(
        b"<object>",
        b"</object>",
        b"<bndbox>",
        b"</bndbox>",
        b"<name>",
        b"/m/02",
        b"../a.png",
        b"/etc/passwd",
        b"\x1f\x8b",
    ),
    *(b"<!DOCTYPE a [<!ENTITY x 'y'>]>", b"encoding='utf-16'", b"encoding='punycode'", "\u2028".encode(), b"\xd9\xa1"),
]


NUMBER = re.compile(rb"-?[0-9.]+")
NUMBERS = [
    *(b"0", b"1", b"-1", b"2", b"0.5", b"0.0", b"7.5", b"80", b"416", b"1e3", b"nan", b"", b"1_0", b"cup", b"12 13")
]


def mutant(seeds: list[bytes], rng: random.Random) -> bytes:
    """Returns a seed with one to six changes: bytes, tokens, numbers, slices that move, vanish or come twice."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 5, 20, 100)))
        piece = bytes(data[at:end])
        change = rng.randrange(12)
        numbers = list(NUMBER.finditer(data))
        if change > 5 and numbers:
            place = rng.choice(numbers)
            data[place.start() : place.end()] = rng.choice(NUMBERS)
        elif change == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif change == 1:
            data[at:at] = rng.choice(TOKENS)
        elif change == 2:
            data[at:end] = rng.choice(TOKENS)
        elif change == 3:
            del data[at:end]
        elif change == 4:
            data[at:at] = piece
        else:
            del data[at:end]
            other = rng.randrange(len(data) + 1)
            data[other:other] = piece
    return bytes(data)


def lines_of(data: bytes) -> int:
    """Returns how many lines of a text are not blank."""
    return sum(bool(line.strip()) for line in decode_text(data).replace("\r\n", "\n").replace("\r", "\n").split("\n"))


def dota_lines(data: bytes) -> int:
    lines = decode_text(data).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return sum(bool(line.strip()) and not line.lower().startswith(("imagesource:", "gsd:")) for line in lines)


def objects_of(data: bytes) -> int:
    """Returns how many objects a document has, as the standard library reads it."""
    return len(list(ElementTree.fromstring(data).iter("object")))


def shapes_of(data: bytes) -> int:
    """Returns how many shapes a file of labelme has, and 1 for its image."""
    return 1 + len(json.loads(decode_text(data))["shapes"])


def rows_of(data: bytes) -> int:
    """Returns how many rows of a table are not blank, without the header, which blank lines may precede."""
    lines = io.StringIO(decode_text(data), newline="")
    first = next((line for line in lines if line.strip()), "")
    text = first + lines.read()
    table = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=first.count), skipinitialspace=True)
    next(table)
    return sum(any(cell.strip() for cell in row) for row in table)


class Case:
    """One format: its seeds, how it is read, and how many rows a file has.

    Args:
        folder: folder with the images and the labels.
        name: the format.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.labels = folder / "labels"
        self.images = ImageNames(["a.png", "b.png", "deep/c.png"])
        self.seeds, suffix, self.count = {
            "yolo": (YOLO, ".txt", lines_of),
            "voc": (VOC, ".xml", objects_of),
            "csv": (CSV, ".csv", rows_of),
            "open images": (OPEN_IMAGES, ".csv", rows_of),
            "dota": (DOTA, ".txt", dota_lines),
            "labelme": (LABELME, ".json", shapes_of),
        }[name]
        self.file = self.labels / f"a{suffix}"
        (folder / "names.yaml").write_text("names: [cup, ant]")
        (folder / "classes.csv").write_text("/m/01,Cup\n/m/02,Ant\n")
        self.names = read_class_names(folder / "names.yaml")
        self.pose = ClassNames(folder / "names.yaml", ["cup", "ant"], keypoints=(2, 3))
        self.descriptions = read_class_names(folder / "classes.csv")

    def rows(self, rng: random.Random) -> Iterator[Row]:
        if self.name == "yolo":
            rows = rng.choice([*YoloRows, *[YoloRows.AUTO] * 5])
            return read_yolo(self.labels, self.images, self.pose if rows is YoloRows.POSE else self.names, rows)
        if self.name == "voc":
            return read_voc(self.labels, self.images, corners=rng.choice(list(Corners)))
        if self.name == "dota":
            return read_dota(self.labels, self.images)
        if self.name == "labelme":
            return read_labelme(self.labels, self.images)
        classes = self.descriptions if self.name == "open images" and rng.random() < 0.5 else None
        return CsvTable(self.file, classes=classes, find_image=self.images.find).rows()


def check(result: ConversionResult, read: list[Row], case: Case, data: bytes) -> None:
    """Asserts that every row is a box, an image or an error with its place, and that each row of the file is one."""
    empty = sum(type(row).__name__ == "EmptyImage" for row in read)
    assert len(read) <= result.boxes + len(result.errors) + empty
    assert all(error.where.startswith(case.file.name) and error.message for error in result.errors), result.errors
    for row in result.coco["annotations"]:
        assert all(math.isfinite(value) for value in row["bbox"])
        assert row["area"] > 0
    json.dumps(result.coco, allow_nan=False).encode()
    is_of_file = len(read) == 1 and isinstance(read[0], RowError) and read[0].where == case.file.name
    if not is_of_file:
        try:
            expected = case.count(data)
        except (ValueError, ElementTree.ParseError):  # of an encoding that only the converter knows
            return
        if not expected and case.name in ("yolo", "voc", "dota"):
            assert empty == len(read) == 1  # a file without rows states an image without boxes
        else:
            assert len(read) == expected


@pytest.mark.parametrize("name", ["yolo", "voc", "csv", "open images", "dota", "labelme"])
@pytest.mark.promise("files", "A damaged file of boxes gives boxes and errors with their places, and loses no row")
def test_no_row_of_a_damaged_file_is_lost(name: str, form: Form, record: Record, tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "b.png", "deep/c.png")
    case, rng = Case(tmp_path, name), random.Random(f"{form.seed} {name}")
    outcomes: Counter[str] = Counter()
    mutants = form.pick(300, 20_000)
    for number in range(mutants):
        data = mutant(case.seeds, rng)
        case.file.write_bytes(data)
        try:
            read = list(case.rows(rng))
            result = to_coco(read, tmp_path / "images", rotated=rng.choice(list(RotatedBoxes)))
        except (BadDataset, ConfigError) as error:
            named = str(tmp_path) in str(error)
            outcomes["refused" if named else f"refused without a place: {error}"] += 1
            continue
        try:
            check(result, read, case, data)
        except AssertionError as error:
            raise AssertionError(f"mutant {number}: {data!r}") from error
        outcomes["errors" if result.errors else "boxes"] += 1
    assert outcomes.keys() <= {"boxes", "errors", "refused"}
    assert min(outcomes["boxes"], outcomes["errors"]) > 0, outcomes
    record(f"{name}: {mutants} damaged files", **outcomes)
    assert (WIDTH, HEIGHT) == (80, 50)  # which the seeds state
