"""Files of other formats in the place of COCO files: the error names how to convert them."""

from pathlib import Path

import pytest

from mal_train.core.coco.annotations import read_coco
from mal_train.core.coco.plan import read_plan
from mal_train.core.coco.stream import scan_coco
from mal_train.core.errors import BadDataset


@pytest.mark.parametrize(
    ("name", "text", "formats"),
    [
        ("boxes.csv", "file_name,xmin,ymin,xmax,ymax\na.jpg,1,2,3,4\n", ["csv"]),
        ("boxes.csv.gz", "file_name", ["csv"]),
        ("a.XML", "<annotation/>", ["voc", "cvat"]),
        ("a.txt", "0 .5 .5 .1 .1\n", ["yolo", "dota"]),
        ("b.txt", "", ["yolo", "dota"]),
        ("folder", None, ["csv", "yolo", "voc", "dota", "labelme"]),
        ("a.json", "<annotation/>", []),
    ],
)
def test_the_error_names_the_formats_that_are_converted(
    tmp_path: Path, name: str, text: str | None, formats: list[str]
) -> None:
    path = tmp_path / name
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    for read in (read_coco, read_plan, lambda path: scan_coco(path, lambda *_: None)):
        with pytest.raises(BadDataset) as raised:
            read(path)
        _, has_remedy, listed = str(raised.value).partition("mal-client convert --from ")
        assert bool(has_remedy) == bool(formats)
        assert all(word in listed for word in formats)
