"""The demo's scenes: repeatable, boxes only where they should be, and neither trivial nor hopeless."""

import json
from pathlib import Path

import numpy as np
import pytest

from deploy.demo import baselines
from deploy.demo.synthetic import SHAPES, Scene, SceneSettings, draw_scene, write_split
from mal_train.core.coco.annotations import read_coco
from mal_train.core.errors import OutputError
from mal_train.core.images.files import read_image
from mal_train.core.masks import rle
from mal_train.core.masks.run_lengths import run_lengths


def scenes(count: int) -> list[Scene]:
    return [draw_scene(np.random.default_rng([7, index])) for index in range(count)]


def test_equal_seeds_draw_equal_scenes() -> None:
    one, other = (draw_scene(np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(one.image, other.image)
    assert [o.box_xywh() for o in one.objects] == [o.box_xywh() for o in other.objects]


def test_scenes_hold_one_to_six_visible_objects_that_do_not_share_pixels() -> None:
    settings = SceneSettings()
    for scene in scenes(20):
        assert scene.image.shape == (240, 320, 3)
        assert scene.image.dtype == np.uint8
        assert 1 <= len(scene.objects) <= settings.max_objects
        assert np.sum([one.visible for one in scene.objects], axis=0).max() == 1
        assert all(one.visible.sum() >= settings.min_area for one in scene.objects)


def test_some_objects_are_cut_by_the_edge_and_some_are_covered() -> None:
    drawn = [one for scene in scenes(20) for one in scene.objects]
    boxes = np.array([one.box_xywh() for one in drawn])
    at_edge = (boxes[:, 0] == 0) | (boxes[:, 1] == 0) | (boxes[:, 0] + boxes[:, 2] == 320)
    assert 0.1 < at_edge.mean() < 0.7
    assert any(len(run_lengths(rle.encode_mask(one.visible).counts)) > 4 for one in drawn)
    assert {one.category_id for one in drawn} == set(range(1, len(SHAPES) + 1))


def test_box_is_tight_around_the_visible_part() -> None:
    for scene in scenes(5):
        for one in scene.objects:
            assert one.box_xywh() == rle.to_box(rle.encode_mask(one.visible))


def test_a_filled_box_is_right_above_half_and_color_alone_does_not_find_the_objects() -> None:
    ious: dict[str, list[float]] = {"box": [], "ellipse": [], "color": []}
    for scene in scenes(25):
        for one in scene.objects:
            truth, box, hw = rle.encode_mask(one.visible), one.box_xywh(), scene.image.shape[:2]
            ious["box"].append(rle.iou(baselines.box_filled(box, (hw[0], hw[1])), truth))
            ious["ellipse"].append(rle.iou(baselines.ellipse(box, (hw[0], hw[1])), truth))
            ious["color"].append(rle.iou(baselines.color_clustering(scene.image, box), truth))
    means = {name: float(np.mean(values)) for name, values in ious.items()}
    assert means["box"] >= 0.55
    assert max(means.values()) <= 0.70
    assert means["color"] < means["ellipse"]


def test_training_split_holds_boxes_and_no_segmentation(tmp_path: Path) -> None:
    split = write_split(tmp_path, "train", 3, seed=1, masks=False)
    assert "segmentation" not in split.annotations.read_text()
    coco = read_coco(split.annotations)
    assert not coco.problem_counts()
    for info in coco.images.values():
        assert read_image(split.images / info.file_name, expected_wh=(320, 240)).shape == (240, 320, 3)


def test_held_out_split_holds_masks_that_fit_their_boxes(tmp_path: Path) -> None:
    split = write_split(tmp_path, "heldout", 3, seed=1, masks=True)
    for row in json.loads(split.annotations.read_text())["annotations"]:
        mask = rle.Rle.from_coco(row["segmentation"])
        assert list(rle.to_box(mask) or ()) == row["bbox"]
        assert rle.area(mask) == row["area"]


def test_a_longer_split_begins_with_the_shorter_one_and_splits_differ(tmp_path: Path) -> None:
    short = write_split(tmp_path / "a", "train", 1, seed=1, masks=False)
    long = write_split(tmp_path / "b", "train", 2, seed=1, masks=False)
    other = write_split(tmp_path / "c", "heldout", 1, seed=1, masks=False)
    first = [(split.images / "00001.jpg").read_bytes() for split in (short, long, other)]
    assert first[0] == first[1] != first[2]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_split(tmp_path / "file", "train", 1, seed=1, masks=False)
