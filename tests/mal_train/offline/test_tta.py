from pathlib import Path

import numpy as np
import pytest
import torch

from mal_train.core.coco.annotations import CocoFile, by_image, read_coco
from mal_train.core.masks import rle
from mal_train.core.masks.geometry import box_mask_in_window
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Crop, Label, Labeler, Prediction, PredictOptions
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.offline.dataset_labeler import LabelFailure, label_boxes
from mal_train.offline.edge_refinement import refine_edges
from mal_train.offline.tta import TtaOptions, label_images
from tests.scenes import write_scenes

Scenes = tuple[CocoFile, Path]


@pytest.fixture
def scenes(tmp_path: Path) -> Scenes:
    annotations, images = write_scenes(tmp_path, images=3, masks=False)
    return read_coco(annotations), images


def labeler(margin_rate: float = 0.6) -> Labeler:
    torch.manual_seed(5)
    model = ModelConfig("vit-micro/16", mask_head_hidden_channel=4, mask_head_out_channel=4)
    return Labeler(MalNetwork(model), LabelerConfig(64, margin_rate, (0.5, 0.5, 0.5)), precision="float32")


def labels(of: Labeler, scenes: Scenes, passes: TtaOptions) -> list[Label]:
    found = [
        label for _, label in label_images(of, list(by_image(scenes[0])), scenes[1], passes, batch_size=3, threads=1)
    ]
    assert not any(isinstance(label, LabelFailure) for label in found)
    return [label for label in found if isinstance(label, Label)]


def test_one_view_without_competition_is_what_everybody_else_gets(scenes: Scenes) -> None:
    of = labeler()
    direct = label_boxes(of, by_image(scenes[0]), scenes[1], lambda _, crop, prob: of.finish(crop, prob), batch_size=3)
    assert labels(of, scenes, TtaOptions()) == [label for _, label in direct]


def test_the_mean_of_one_margin_twice_is_that_margin(scenes: Scenes) -> None:
    once, twice = (labels(labeler(), scenes, TtaOptions(margins=margins)) for margins in ((0.2,), (0.2, 0.2)))
    assert [label.rle for label in once] == [label.rle for label in twice]
    assert once != labels(labeler(), scenes, TtaOptions(margins=(1.0,)))


def test_margins_replace_the_checkpoints_own(scenes: Scenes) -> None:
    assert labels(labeler(1.5), scenes, TtaOptions(margins=(0.2,))) == labels(labeler(0.2), scenes, TtaOptions())


def test_the_mirror_image_is_asked_of_every_view(scenes: Scenes) -> None:
    plain = labels(labeler(), scenes, TtaOptions(margins=(0.2, 0.6)))
    assert plain != labels(labeler(), scenes, TtaOptions(PredictOptions(flip=True), (0.2, 0.6)))


def test_moved_edges_are_those_of_every_view_at_the_thresholds_of_the_checkpoint(scenes: Scenes) -> None:
    of = labeler()

    def by_hand(_: object, crop: Crop, probability: Prediction) -> Label:
        box_mask = box_mask_in_window(crop.box_inside, crop.window, crop.image_hw, 64, of.config.compat)
        return of.finish(crop, Prediction(refine_edges(probability.prob, crop.pixels, box_mask, 0.5)))

    expected = [label for _, label in label_boxes(of, by_image(scenes[0]), scenes[1], by_hand, batch_size=3)]
    moved = labels(of, scenes, TtaOptions(refine_edges=True))
    assert moved == expected
    assert [label.rle for label in moved] != [label.rle for label in labels(of, scenes, TtaOptions())]


def test_shared_out_no_pixel_belongs_to_two_instances_of_an_image(scenes: Scenes) -> None:
    of = labeler()
    owners = {image.id: np.zeros(image.size_wh[::-1], int) for image in scenes[0].images.values() if image.size_wh}
    pairs = label_images(
        of, list(by_image(scenes[0])), scenes[1], TtaOptions(resolve_overlaps=True), batch_size=3, threads=1
    )
    for annotation, label in pairs:
        assert isinstance(label, Label)
        assert annotation.image_id is not None
        owners[annotation.image_id] += rle.decode_mask(label.rle)
    assert all(owner.max() == 1 for owner in owners.values())


def test_a_picture_that_cannot_be_read_fails_its_boxes_and_no_others(scenes: Scenes) -> None:
    first = next(iter(scenes[0].images.values()))
    (scenes[1] / first.file_name).write_bytes(b"no picture")
    found = list(
        label_images(
            labeler(),
            list(by_image(scenes[0])),
            scenes[1],
            TtaOptions(margins=(0.2, 0.6), resolve_overlaps=True),
            batch_size=3,
            threads=1,
        )
    )
    failed = {annotation.image_id for annotation, label in found if isinstance(label, LabelFailure)}
    assert failed == {first.id}
    assert len(found) == len(scenes[0].annotations)
