"""Tests of the export of the worst masks to Label Studio and CVAT."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
from mal_client.cli.common import EXIT_SOME_FAILED
from mal_client.cli.main import main
from mal_client.integrations.label_studio.images import ImageFetcher
from mal_client.integrations.label_studio.label_config import read_label_config
from mal_client.integrations.label_studio.regions import read_rectangle

from deploy.demo.baselines import box_filled
from mal_train.core.masks.rle import decode_mask
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset
from tests.mal_client.integrations.cvat.test_job import decoded
from tests.mal_client.integrations.label_studio.rle_pack import decode_brush
from tests.mal_client.review.test_queue import with_scores


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return with_scores(tmp_path)


def exported(dataset: Dataset, *more: str) -> tuple[Any, ElementTree.Element]:
    """Exports the worst four (103, which failed, 104, 101, 102); returns (Label Studio tasks, CVAT annotations)."""
    given = ["review", "--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), "--worst", "4"]
    files = ["--label-studio", str(dataset.folder / "tasks.json"), "--cvat", str(dataset.folder / "cvat")]
    assert main([*given, *files, *more]) == 0
    root = ElementTree.fromstring((dataset.folder / "cvat" / "annotations.xml").read_text())
    return json.loads((dataset.folder / "tasks.json").read_text()), root


def expected(dataset: Dataset, annotation: int) -> Any:
    row = next(row for row in dataset.coco["annotations"] if row["id"] == annotation)
    return decode_mask(box_filled(tuple(map(float, row["bbox"])), (HEIGHT, WIDTH)))  # type: ignore[arg-type]


def test_label_studio_gets_a_task_per_image_worst_first(dataset: Dataset) -> None:
    tasks, _ = exported(dataset, "--image-prefix", "/data/local-files/?d=set/")
    assert [task["data"]["review_rank"] for task in tasks] == [1, 2, 3]
    assert tasks[0]["data"]["image"] == "/data/local-files/?d=set/image_1.png"
    assert tasks[0]["data"]["reasons"] == "1: no such file; 4: low score"
    regions = {row["id"]: row for task in tasks for row in task["predictions"][0]["result"]}
    assert sorted(regions) == ["1-box", "2-box", "2-mask", "3-box", "3-mask", "4-box", "4-mask"], "103 has no mask"
    assert (decode_brush(regions["2-mask"]["value"]["rle"], HEIGHT, WIDTH) == expected(dataset, 104)).all()
    assert read_rectangle(regions["2-box"]).box == tuple(dataset.coco["annotations"][4]["bbox"])
    assert tasks[2]["predictions"][0]["score"] == 0.2


def test_the_configuration_beside_the_tasks_has_controls_for_their_regions(dataset: Dataset) -> None:
    tasks, _ = exported(dataset)
    config = read_label_config((dataset.folder / "tasks.config.xml").read_text())
    for region in tasks[0]["predictions"][0]["result"]:
        assert region["to_name"] in config.image_fields
        assert region["from_name"] in {*config.boxes, config.masks["image"].name}
    assert config.boxes["box"].labels == config.masks["image"].labels == ("cup",)


def test_cvat_gets_boxes_and_exact_masks(dataset: Dataset) -> None:
    _, root = exported(dataset)
    assert [image.get("name") for image in root.iter("image")] == ["image_1.png", "image_2.png", "image_0.png"]
    masks = list(root.iter("mask"))
    assert [mask.get("group_id") for mask in masks] == ["4", "2", "3"]
    numbers = [[int(mask.get(key, "")) for key in ("left", "top", "width", "height")] for mask in masks]
    for mask, (left, top, width, height), annotation in zip(masks, numbers, (102, 104, 101), strict=True):
        runs = [int(run) for run in re.split(", ", mask.get("rle", ""))]
        points = [*runs, left, top, left + width - 1, top + height - 1]
        assert (decoded(points, HEIGHT, WIDTH) == expected(dataset, annotation)).all()
    box = next(root.iter("box"))
    assert [float(box.get(key, "")) for key in ("xtl", "ytl", "xbr", "ybr")] == [2.0, 2.0, 12.0, 11.0]
    assert json.loads((dataset.folder / "cvat" / "labels.json").read_text())[0]["name"] == "cup"
    listed = (dataset.folder / "cvat" / "images.txt").read_text().splitlines()
    assert listed[0] == str(dataset.images_dir / "image_1.png")


@pytest.mark.parametrize("end", ["\n", "\n/etc/hostname", "\r/etc/hostname", "\x1b", "\udce9"])
def test_an_image_whose_name_cvat_cannot_get_is_left_out_and_named(
    dataset: Dataset, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.coco["images"][1]["file_name"] += end
    dataset.save()
    folder = dataset.folder / "cvat"
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), "--cvat", str(folder)]
    assert main(["review", *given, "--output", str(dataset.folder / "queue.json")]) == EXIT_SOME_FAILED
    assert "image_1.png" in capsys.readouterr().err
    names = [str(dataset.images_dir / f"image_{number}.png") for number in (0, 2)]
    assert sorted((folder / "images.txt").read_text().splitlines()) == names
    root = ElementTree.fromstring((folder / "annotations.xml").read_text())
    assert sorted(str(image.get("name")) for image in root.iter("image")) == ["image_0.png", "image_2.png"]


@pytest.mark.parametrize("name", ["cup\x1b", "cup\udce9", "a < b & 'c' \"d\" é"])
def test_a_category_is_escaped_where_xml_cannot_hold_it(dataset: Dataset, name: str) -> None:
    dataset.coco["categories"][0]["name"] = name
    dataset.save()
    tasks, root = exported(dataset)
    label = name.replace("\x1b", "\\x1b").replace("\udce9", "\\udce9")
    config = read_label_config((dataset.folder / "tasks.config.xml").read_text())
    assert config.boxes["box"].labels == (label,)
    assert tasks[0]["predictions"][0]["result"][0]["value"]["rectanglelabels"] == [label]
    assert {box.get("label") for box in root.iter("box")} == {label}
    assert json.loads((dataset.folder / "cvat" / "labels.json").read_text())[0]["name"] == label


ODD_NAMES = (
    *("Capture_d\u00e9cran de 2021.png", "Gru\u0308\u00dfe.png", "plus+name.png", "50%25 a%.png", "#1?a=b&c;d.png"),
    *(
        'it\'s "quoted" `x` $HOME.png',
        "-rf.png",
        "日本/\u3000語.png",
        "a//b.png",
        f"{'x' * 240}.png",
        "back\\slash.png",
    ),
)


def with_names(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Gives the images other names, in the file and on the disk."""
    template = dict(dataset.coco["annotations"][0])
    content = (dataset.images_dir / "image_0.png").read_bytes()
    dataset.coco["images"] = [
        {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT} for number, name in enumerate(names)
    ]
    dataset.coco["annotations"] = [template | {"id": n, "image_id": n} for n in range(len(names))]
    for name in names:
        (dataset.images_dir / name).parent.mkdir(exist_ok=True)
        (dataset.images_dir / name).write_bytes(content)
    dataset.save()
    return dataset


def test_odd_names_reach_label_studio_as_its_server_reads_them(dataset: Dataset) -> None:
    names = (*ODD_NAMES, "latin\udce9.png")
    with_names(dataset, names)
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), "--worst", "99"]
    urls: dict[str, list[str]] = {}
    for prefix in ("/data/local-files/?d=images/", "https://images.example/a/", "s3://bucket/a/"):
        output = dataset.folder / "tasks.json"
        assert main(["review", *given, "--label-studio", str(output), "--image-prefix", prefix]) == 0
        urls[prefix] = [task["data"]["image"] for task in json.loads(output.read_text())]
    local, web, objects = urls.values()
    assert all(url.isascii() and " " not in url for url in local + web)
    # As Django reads a query, and as servers read a path.
    assert [parse_qs(urlsplit(url).query, errors="surrogateescape")["d"] for url in local] == [
        [f"images/{name}"] for name in names
    ]
    assert [unquote(urlsplit(url).path, errors="surrogateescape") for url in web] == [f"/a/{name}" for name in names]
    assert objects == [f"s3://bucket/a/{name}" for name in names]
    # Our backend, which reads the same folder.
    fetcher = ImageFetcher(None, folder=dataset.folder)
    assert all(fetcher.read(url) == (dataset.images_dir / "image_0.png").read_bytes() for url in local)
    fetcher.close()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_odd_names_reach_cvat_and_a_shell(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with_names(dataset, ODD_NAMES)
    monkeypatch.chdir(dataset.images_dir)
    given = ["--annotations", str(dataset.json_path), "--images", ".", "--worst", "99", "--cvat", "../cvat"]
    assert main(["review", *given]) == 0
    root = ElementTree.fromstring((dataset.folder / "cvat" / "annotations.xml").read_text())
    assert [image.get("name") for image in root.iter("image")] == list(ODD_NAMES)
    # The command of docs/integrations.md.
    script = 'mapfile -t images < ../cvat/images.txt && cat "${images[@]}" | wc -c'
    size = (dataset.images_dir / "image_0.png").stat().st_size
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == size * len(ODD_NAMES)


def test_tight_boxes_take_the_place_of_those_of_the_file(dataset: Dataset) -> None:
    row = next(row for row in dataset.coco["annotations"] if row["id"] == 104)
    tight = list(row["bbox"])
    row["bbox"] = [0, 0, WIDTH, HEIGHT]
    dataset.save()
    for more, expected_box in (((), [0, 0, WIDTH, HEIGHT]), (("--tight-boxes",), tight)):
        tasks, root = exported(dataset, *more)
        regions = {row["id"]: row for task in tasks for row in task["predictions"][0]["result"]}
        assert list(read_rectangle(regions["2-box"]).box) == expected_box
        box = next(box for box in root.iter("box") if box.get("group_id") == "2")
        x0, y0, x1, y1 = (float(box.get(key, "")) for key in ("xtl", "ytl", "xbr", "ybr"))
        assert [x0, y0, x1 - x0, y1 - y0] == expected_box


def test_missing_sizes_are_read_from_the_image_files(dataset: Dataset) -> None:
    for image in dataset.coco["images"]:
        del image["width"], image["height"]
    dataset.save()
    tasks, root = exported(dataset)
    assert tasks[0]["predictions"][0]["result"][0]["original_width"] == WIDTH
    assert next(root.iter("image")).get("height") == str(HEIGHT)


def test_annotations_without_an_image_are_omitted_and_counted(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.coco["annotations"][3]["image_id"] = 77
    dataset.save()
    tasks, _ = exported(dataset)
    assert "1 annotation without an image in the file omitted" in capsys.readouterr().out
    assert tasks[0]["data"]["review_rank"] == 2


def test_polygons_of_the_labeled_file_are_exported(dataset: Dataset) -> None:
    dataset.coco["annotations"][4]["segmentation"] = [[3, 3, 9, 3, 9, 8, 3, 8]]
    dataset.save()
    tasks, _ = exported(dataset)
    region = next(row for task in tasks for row in task["predictions"][0]["result"] if row["id"] == "2-mask")
    mask = decode_brush(region["value"]["rle"], HEIGHT, WIDTH)
    assert mask.sum() == 30
    assert np.array_equal(np.argwhere(mask)[0], [3, 3])
