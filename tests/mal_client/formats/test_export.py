"""Tests of the export of masks, with independent decoders and, if installed, with the tools themselves.

The tools pin the versions of many packages. `make tools` makes an environment with labelme and Ultralytics;
MAL_EXPORT_TOOLS names the interpreter of another one, for example with FiftyOne.
"""

import base64
import io
import json
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mal_client.cli.main import main
from numpy.typing import NDArray
from PIL import Image

from mal_train.core.errors import OutputError
from mal_train.core.masks.encodings import to_polygons
from mal_train.core.masks.polygons import fill, merge_holes
from mal_train.core.masks.rle import Rle, decode_mask, encode_mask, iou
from tests.mal_client.dataset.test_mask_encodings import ring
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset, make_dataset
from tests.reader_tools import in_tool


@pytest.fixture
def labeled(tmp_path: Path) -> Dataset:
    """Makes a labeled file: a ring with an island, a square, an empty mask, a failed row, a crowd region."""
    dataset = make_dataset(tmp_path)
    square, empty = np.zeros((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)
    square[4:9, 20:30] = True
    for row, mask in zip(dataset.coco["annotations"], [ring(), square, square, empty, square, square], strict=True):
        row |= {"segmentation": encode_mask(mask).to_coco(), "score": 0.75, "flags": ["MULTI_PART"]}
    dataset.coco["annotations"][4]["error"] = {"reason": "BAD_BOX", "message": "annotation 104: no area"}
    dataset.coco["annotations"][5]["iscrowd"] = 1
    dataset.coco["categories"] = [{"id": 9, "name": "ant"}, {"id": 1, "name": "cup: large"}]
    dataset.save()
    return dataset


def export(dataset: Dataset, form: str, *more: str) -> Path:
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    target = dataset.folder / form
    assert main(["export", "--to", form, *given, "--output", str(target), *more]) == 3
    return target


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return iou(encode_mask(a), encode_mask(b))


def test_annotations_without_a_mask_are_counted_and_listed(
    labeled: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    export(labeled, "labelme")
    printed = capsys.readouterr()
    assert re.search(r": 3 masks, 1 crowd .*, 2 failed", printed.out)
    assert "annotation 103: " in printed.err
    assert "annotation 104: not labeled (BAD_BOX: no area)" in printed.err


def test_labelme_polygons_fill_to_the_mask_with_components_in_one_group(labeled: Dataset) -> None:
    folder = export(labeled, "labelme")
    assert sorted(path.name for path in folder.iterdir()) == ["image_0.json", "image_1.json", "image_2.json"]
    content = json.loads((folder / "image_0.json").read_text())
    assert (folder / content["imagePath"]).resolve() == (labeled.images_dir / "image_0.png").resolve()
    assert (content["imageHeight"], content["imageWidth"], content["imageData"]) == (HEIGHT, WIDTH, None)
    first, second, third = content["shapes"]
    assert (first["label"], first["shape_type"], first["flags"]) == ("cup: large", "polygon", {"MULTI_PART": True})
    assert [shape["group_id"] for shape in content["shapes"]] == [1, 1, None]
    filled = fill([np.array(first["points"]), np.array(second["points"])], HEIGHT, WIDTH)
    np.testing.assert_array_equal(filled, ring())
    assert third["description"] == "score 0.750"


@pytest.mark.parametrize("form", ["labelme", "yolo-seg", "fiftyone"])
def test_sizes_that_the_rows_do_not_state_are_those_of_the_files(labeled: Dataset, form: str) -> None:
    def written() -> dict[str, bytes]:
        folder = export(labeled, form)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    expected = written()
    del labeled.coco["images"][0]["width"], labeled.coco["images"][0]["height"]
    labeled.coco["images"][1] |= {"width": 0, "height": 0}
    labeled.save()
    assert written() == expected


def test_an_image_of_unknown_size_whose_file_is_missing_is_listed(
    labeled: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    labeled.coco["images"][0] |= {"width": None, "file_name": "gone.png"}
    labeled.save()
    folder = export(labeled, "labelme")
    assert "IMAGE_NOT_FOUND" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["image_1.json", "image_2.json"]


@pytest.mark.parametrize("flags", [5, {"a": 1}, "text"])
def test_flags_that_are_no_list_are_no_flags_of_a_shape(labeled: Dataset, flags: Any) -> None:
    labeled.coco["annotations"][1]["flags"] = flags
    labeled.save()
    shapes = json.loads((export(labeled, "labelme") / "image_0.json").read_text())["shapes"]
    assert shapes[-1]["flags"] == {}


@pytest.mark.parametrize(("form", "name", "code"), [("labelme", "image_0.json", 3), ("fiftyone", "labels.json", 2)])
def test_no_export_replaces_the_file_that_it_reads(labeled: Dataset, form: str, name: str, code: int) -> None:
    source = labeled.json_path.rename(labeled.folder / name)
    before = source.read_bytes()
    given = ["--annotations", str(source), "--images", str(labeled.images_dir), "--output", str(labeled.folder)]
    assert main(["export", "--to", form, *given]) == code
    assert source.read_bytes() == before


@pytest.mark.parametrize("form", ["labelme", "yolo-seg"])
def test_an_image_whose_name_no_file_can_have_is_listed(
    labeled: Dataset, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labeled.coco["images"][0]["file_name"] = "half \ud800.png"
    labeled.save()
    export(labeled, form)
    assert "IMAGE_UNUSABLE" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["labelme", "yolo-seg"])
@pytest.mark.parametrize("name", ["a" * 252 + ".png", "é" * 128 + "/a.png"])
def test_an_image_whose_label_file_has_too_long_a_name_is_listed_and_the_others_are_written(
    labeled: Dataset, form: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labeled.coco["images"][0]["file_name"] = name
    labeled.save()
    folder, count = export(labeled, form), len(labeled.coco["images"])
    assert "NAME_TOO_LONG" in capsys.readouterr().err
    assert len(list(folder.rglob("image_*.json" if form == "labelme" else "image_*.txt"))) == count - 1


def test_labelme_masks_are_the_pixels(labeled: Dataset) -> None:
    folder = export(labeled, "labelme", "--shape", "mask")
    shape = json.loads((folder / "image_0.json").read_text())["shapes"][0]
    (x0, y0), (x1, y1) = shape["points"]
    with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
        pixels = np.asarray(image)
    frame = np.zeros((HEIGHT, WIDTH), bool)
    frame[y0 : y1 + 1, x0 : x1 + 1] = pixels
    np.testing.assert_array_equal(frame, ring())


def test_yolo_rows_fill_to_the_mask_and_classes_are_numbered(labeled: Dataset) -> None:
    folder = export(labeled, "yolo-seg")
    assert (folder / "data.yaml").read_text().endswith('names:\n  0: "ant"\n  1: "cup: large"\n')
    first, second = (folder / "labels" / "image_0.txt").read_text().splitlines()
    assert first.split()[0] == second.split()[0] == "1"
    line = np.reshape([float(value) for value in first.split()[1:]], (-1, 2)) * [WIDTH, HEIGHT]
    np.testing.assert_array_equal(fill([np.rint(line)], HEIGHT, WIDTH), ring())
    np.testing.assert_allclose(line, np.rint(line), atol=1e-4)
    assert (folder / "labels" / "image_2.txt").read_text() == ""


@pytest.mark.parametrize(
    ("images", "output", "named"),
    [
        ("images", ".", None),
        ("images", "yolo", "labels"),
        ("set/images/train", "set", "set/labels/train"),
        ("photos", "yolo", "yolo/images"),
    ],
)
def test_yolo_labels_where_ultralytics_does_not_look_are_pointed_out(
    labeled: Dataset, capsys: pytest.CaptureFixture[str], images: str, output: str, named: str | None
) -> None:
    folder = labeled.folder / images
    folder.parent.mkdir(exist_ok=True, parents=True)
    labeled.images_dir.rename(folder)
    given = ["--annotations", str(labeled.json_path), "--images", str(folder)]
    main(["export", "--to", "yolo-seg", *given, "--output", str(labeled.folder / output)])
    lines = [line for line in capsys.readouterr().err.splitlines() if "Ultralytics" in line]
    assert len(lines) == (named is not None)
    assert named is None or str(labeled.folder / named) in lines[0]


@pytest.mark.parametrize(("form", "below", "suffix"), [("labelme", "", "json"), ("yolo-seg", "labels", "txt")])
def test_images_whose_label_files_would_share_a_name_are_listed(
    labeled: Dataset, capsys: pytest.CaptureFixture[str], form: str, below: str, suffix: str
) -> None:
    labeled.coco["images"][1]["file_name"] = "image_0.jpg"
    labeled.save()
    folder = export(labeled, form) / below
    assert sorted(path.name for path in folder.iterdir()) == [f"image_0.{suffix}", f"image_2.{suffix}"]
    message = next(line for line in capsys.readouterr().err.splitlines() if "image_0.jpg: " in line)
    assert "image_0.png" in message


@pytest.mark.parametrize("form", ["labelme", "yolo-seg"])
@pytest.mark.parametrize("name", ["../outside.png", "{folder}/outside.png", "a/../../../outside.png", "."])
def test_no_file_name_leads_out_of_the_output(labeled: Dataset, form: str, name: str) -> None:
    labeled.coco["images"][0]["file_name"] = name.format(folder=labeled.folder)
    labeled.save()
    before = {path for path in labeled.folder.rglob("*") if path.is_file()}
    target = export(labeled, form)
    written = {path for path in labeled.folder.rglob("*") if path.is_file()} - before
    assert {path for path in written if not path.is_relative_to(target)} == set()
    assert {path.stem for path in written if path.suffix != ".yaml"} == {"image_1", "image_2"}


@pytest.mark.parametrize(
    ("form", "name"), [("labelme", "image_0.json"), ("yolo-seg", "labels/image_0.txt"), ("fiftyone", "labels.json")]
)
def test_no_export_is_written_through_a_link(labeled: Dataset, form: str, name: str) -> None:
    victim, path = labeled.folder / "victim", labeled.folder / form / name
    victim.write_text("precious")
    path.parent.mkdir(parents=True)
    path.symlink_to(victim)
    given = ["--annotations", str(labeled.json_path), "--images", str(labeled.images_dir)]
    assert main(["export", "--to", form, *given, "--output", str(labeled.folder / form)]) == OutputError.exit_code
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("form", ["labelme", "yolo-seg"])
def test_no_linked_folder_leads_out_of_the_output(labeled: Dataset, form: str) -> None:
    victim, target = labeled.folder / "victim", labeled.folder / form
    labels = target / "labels" if form == "yolo-seg" else target
    victim.mkdir()
    labels.mkdir(parents=True)
    (labels / "deeper").symlink_to(victim)
    (labeled.images_dir / "deeper").mkdir()
    (labeled.images_dir / "image_0.png").rename(labeled.images_dir / "deeper" / "image_0.png")
    labeled.coco["images"][0]["file_name"] = "deeper/image_0.png"
    labeled.save()
    export(labeled, form)
    assert list(victim.iterdir()) == []


def test_an_export_keeps_the_mode_of_a_file_that_it_replaces(labeled: Dataset) -> None:
    path = labeled.folder / "fiftyone" / "labels.json"
    path.parent.mkdir()
    path.touch(0o600)
    export(labeled, "fiftyone")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("form", ["labelme", "yolo-seg", "fiftyone"])
@pytest.mark.parametrize("is_crowd", [False, True])
def test_an_export_without_a_mask_is_no_success(
    labeled: Dataset, form: str, is_crowd: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    labeled.coco["annotations"] = labeled.coco["annotations"][5:] if is_crowd else []
    labeled.save()
    export(labeled, form)
    printed = capsys.readouterr().err
    assert "no mask was written" in printed
    assert ("CROWD" in printed, "no annotations" in printed) == (is_crowd, not is_crowd)


def test_a_negative_tolerance_is_refused(labeled: Dataset) -> None:
    given = ["--annotations", str(labeled.json_path), "--images", str(labeled.images_dir), "--output", "x"]
    assert main(["export", "--to", "yolo-seg", *given, "--polygon-tolerance", "-1"]) == 2


LABELME = """
import json, sys
import numpy as np
try:
    from labelme._label_file import LabelFile
except ImportError:
    from labelme.label_file import LabelFile
import labelme.utils as utils
file = LabelFile(sys.argv[1])
height, width = int(sys.argv[2]), int(sys.argv[3])
results = []
for shape in file.shapes:
    if shape["shape_type"] == "mask":
        frame = np.zeros((height, width), bool)
        (x0, y0), (x1, y1) = np.asarray(shape["points"]).astype(int)
        frame[y0:y1 + 1, x0:x1 + 1] = shape["mask"]
    else:
        frame = utils.shape_to_mask((height, width), shape["points"], shape_type=shape["shape_type"])
    results.append({"label": shape["label"], "group": shape["group_id"], "mask": frame.astype(int).tolist()})
print(json.dumps(results))
"""


@pytest.mark.parametrize(("shape", "least"), [("mask", 1.0), ("polygon", 0.75)])
def test_labelme_reads_the_exported_files(labeled: Dataset, shape: str, least: float) -> None:
    folder = export(labeled, "labelme", "--shape", shape)
    results = in_tool("labelme", LABELME, folder / "image_0.json", HEIGHT, WIDTH)
    assert {result["label"] for result in results} == {"cup: large"}
    parts = [np.array(result["mask"], bool) for result in results[:-1]]
    # labelme also fills the pixels under an outline, which are many for a ring of 20 px.
    assert overlap(np.any(parts, axis=0), ring()) >= least


ULTRALYTICS = """
import json, sys
from pathlib import Path
import numpy as np
from ultralytics.data.dataset import YOLODataset
from ultralytics.data.utils import check_det_dataset, polygon2mask
names = {0: "ant", 1: "cup: large"}
data = YOLODataset(img_path=sys.argv[1], data={"names": names, "nc": 2, "channels": 3}, task="segment", augment=False)
results = {}
for label in data.labels:
    masks = []
    for segment in label["segments"]:
        points = segment * np.array(label["shape"][::-1])
        masks.append(polygon2mask(label["shape"], [points.reshape(-1)]).astype(int).tolist())
    results[Path(label["im_file"]).name] = {"classes": label["cls"].ravel().tolist(), "masks": masks}
print(json.dumps(results))
"""


def test_ultralytics_reads_the_exported_files(labeled: Dataset) -> None:
    folder = export(labeled, "yolo-seg")
    (folder / "images").symlink_to(labeled.images_dir)
    results = in_tool("ultralytics", ULTRALYTICS, folder / "images")
    assert results["image_0.png"]["classes"] == [1.0, 1.0]
    assert results["image_2.png"]["masks"] == []
    # cv2.fillPoly also fills the pixels under an outline: bridges become one pixel wide and edges half a pixel.
    assert overlap(np.array(results["image_0.png"]["masks"][0], bool), ring()) > 0.7


ODD_NAMES = ("Gru\u0308\u00dfe +50%25 #1?.png", "-rf \u65e5 'a' \"b\".png", f"{'x' * 240}.png")


@pytest.mark.parametrize("tool", ["labelme", "ultralytics"])
def test_tools_find_images_of_odd_names_with_their_classes(labeled: Dataset, tool: str) -> None:
    for image, name in zip(labeled.coco["images"], ODD_NAMES, strict=True):
        (labeled.images_dir / image["file_name"]).rename(labeled.images_dir / name)
        image["file_name"] = name
    odd = "cup \U0001f600 é: {#}"
    labeled.coco["categories"][1]["name"] = odd
    labeled.save()
    if tool == "labelme":
        folder = export(labeled, "labelme")
        for name in ODD_NAMES[:2]:
            results = in_tool("labelme", LABELME, folder / Path(name).with_suffix(".json"), HEIGHT, WIDTH)
            assert {result["label"] for result in results} == {odd}
        return
    folder = export(labeled, "yolo-seg")
    (folder / "images").symlink_to(labeled.images_dir)
    assert set(in_tool("ultralytics", ULTRALYTICS, folder / "images")) == set(ODD_NAMES)
    classes = "import json, sys; from ultralytics.utils import YAML; print(json.dumps(YAML.load(sys.argv[1])['names']))"
    assert in_tool("ultralytics", classes, folder / "data.yaml")["1"] == odd


FIFTYONE = """
import json, sys
from fiftyone.utils.coco import load_coco_detection_annotations
_, classes, _, images, annotations = load_coco_detection_annotations(sys.argv[1])
image = images[1]
results = []
for annotation in annotations[1]:
    read = annotation.to_detection((image["width"], image["height"]), classes_map=classes, load_segmentation=True)
    results.append({
        "label": read.label, "box": list(read.bounding_box), "mask": read.mask.astype(int).tolist(),
        "score": read.confidence, "flags": list(read["flags"]),
    })
print(json.dumps(results))
"""


def test_the_fiftyone_file_has_tight_boxes_and_the_original_ones(labeled: Dataset) -> None:
    original_box = [float(v) for v in labeled.coco["annotations"][0]["bbox"]]
    content = json.loads((export(labeled, "fiftyone") / "labels.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [row["file_name"] for row in labeled.coco["images"]]
    first = content["annotations"][0]
    assert (first["id"], first["annotation_id"], first["score"], first["flags"]) == (1, 100, 0.75, ["MULTI_PART"])
    assert first["prompt_box"] == original_box
    rows, columns = np.nonzero(ring())
    left, top = columns.min(), rows.min()
    assert first["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
    assert (decode_mask(Rle.from_coco(first["segmentation"])) == ring()).all()
    names = {row["id"]: row["name"] for row in content["categories"]}
    assert names == {1: "ant", 2: "cup: large"}
    assert [names[row["category_id"]] for row in content["annotations"]] == ["cup: large"] * 3


@pytest.mark.slow
def test_fiftyone_reads_the_exported_file_exactly(labeled: Dataset) -> None:
    # FiftyOne rounds this box to other pixels than those of the mask.
    labeled.coco["annotations"][0]["bbox"] = [3.6, 2.6, 9.7, 9.7]
    labeled.save()
    first, second = in_tool("fiftyone", FIFTYONE, export(labeled, "fiftyone") / "labels.json")
    assert (first["label"], first["score"], first["flags"]) == ("cup: large", 0.75, ["MULTI_PART"])
    square = np.zeros((HEIGHT, WIDTH), bool)
    square[4:9, 20:30] = True
    for read, expected in ((first, ring()), (second, square)):
        frame = np.zeros((HEIGHT, WIDTH), bool)
        x, y = (round(value * side) for value, side in zip(read["box"][:2], (WIDTH, HEIGHT), strict=True))
        mask = np.array(read["mask"], bool)
        frame[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
        np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize("form", ["yolo-seg", "fiftyone"])
def test_an_image_pattern_is_refused_for_formats_that_need_a_folder(
    labeled: Dataset, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--annotations", str(labeled.json_path), "--image-glob", str(labeled.images_dir / "*.png")]
    assert main(["export", "--to", form, *given, "--output", str(labeled.folder / form)]) == 2
    message = capsys.readouterr().err
    assert "--image-glob: " in message
    assert "--images" in message


def test_labelme_export_finds_images_by_a_pattern_and_lists_missing_ones(
    labeled: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = labeled.folder / "deep" / "er"
    deep.mkdir(parents=True)
    (labeled.images_dir / "image_0.png").rename(deep / "image_0.png")
    given = ["--annotations", str(labeled.json_path), "--image-glob", str(labeled.folder / "deep" / "**" / "*.png")]
    target = labeled.folder / "labelme"
    assert main(["export", "--to", "labelme", *given, "--output", str(target)]) == 3
    content = json.loads((target / "image_0.json").read_text())
    assert (target / content["imagePath"]).resolve() == deep / "image_0.png"
    assert [path.name for path in target.iterdir()] == ["image_0.json"]
    assert "image_1.png: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["rle", "polygons"])
def test_fiftyone_reads_a_labeled_file(labeled: Dataset, form: str) -> None:
    """Uses the reader of its importer, which needs no FiftyOne database."""
    if form == "polygons":
        for row in labeled.coco["annotations"][:3]:
            lines = merge_holes(to_polygons(Rle.from_coco(row["segmentation"])).rings)
            row["segmentation"] = [line.ravel().tolist() for line in lines]
    for row, mask in zip(labeled.coco["annotations"], [ring()] * 2, strict=False):
        rows, columns = np.nonzero(mask)
        row["bbox"] = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
    labeled.save()
    first, _ = in_tool("fiftyone", FIFTYONE, labeled.json_path)
    assert (first["label"], first["score"], first["flags"]) == ("cup: large", 0.75, ["MULTI_PART"])
    frame = np.zeros((HEIGHT, WIDTH), bool)
    x, y = (round(value * side) for value, side in zip(first["box"][:2], (WIDTH, HEIGHT), strict=True))
    mask = np.array(first["mask"], bool)
    frame[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    np.testing.assert_array_equal(frame, ring())
