"""Test-time augmentation: several margins, mirrored passes, refined edges and resolved overlaps."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from mal_train.core.coco.annotations import CocoFile, by_image, read_coco
from mal_train.core.masks import rle
from mal_train.core.masks.flags import Flag
from mal_train.core.masks.geometry import box_mask_in_window
from mal_train.core.masks.points import Point
from mal_train.core.score_model import RESOLVED_FEATURES
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions
from mal_train.kernel.networks.backbones import backbone_size
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.offline.dataset_labeler import LabelFailure, label_boxes
from mal_train.offline.edge_refinement import refine_edges
from mal_train.offline.tta import TtaOptions, label_images
from tests.scenes import write_scenes
from tests.score_models import model as score_model
from tests.score_models import with_resolved_score

Scenes = tuple[CocoFile, Path]


@pytest.fixture
def scenes(tmp_path: Path) -> Scenes:
    annotations, images = write_scenes(tmp_path, images=3, masks=False)
    return read_coco(annotations), images


def make_labeler(margin_rate: float = 0.6) -> Labeler:
    torch.manual_seed(5)
    model = ModelConfig("vit-micro/16", mask_head_hidden_channel=4, mask_head_out_channel=4)
    return Labeler(MalNetwork(model), LabelerConfig(64, margin_rate, (0.5, 0.5, 0.5)), precision="float32")


def labels(labeler: Labeler, scenes: Scenes, tta: TtaOptions) -> list[Label]:
    rows = list(by_image(scenes[0]))
    results = [result for _, result in label_images(labeler, rows, scenes[1], tta, batch_size=3, threads=1)]
    assert not any(isinstance(result, LabelFailure) for result in results)
    return [result for result in results if isinstance(result, Label)]


def test_without_options_the_labels_are_those_of_the_labeler(scenes: Scenes) -> None:
    labeler = make_labeler()
    direct = label_boxes(
        labeler, by_image(scenes[0]), scenes[1], lambda _, crop, prob: labeler.finish(crop, prob), batch_size=3
    )
    assert labels(labeler, scenes, TtaOptions()) == [label for _, label in direct]


def test_the_mean_of_the_same_margin_twice_changes_nothing(scenes: Scenes) -> None:
    once, twice = (labels(make_labeler(), scenes, TtaOptions(margins=margins)) for margins in ((0.2,), (0.2, 0.2)))
    assert [label.rle for label in once] == [label.rle for label in twice]
    assert once != labels(make_labeler(), scenes, TtaOptions(margins=(1.0,)))


def test_margins_replace_that_of_the_checkpoint(scenes: Scenes) -> None:
    assert labels(make_labeler(1.5), scenes, TtaOptions(margins=(0.2,))) == labels(
        make_labeler(0.2), scenes, TtaOptions()
    )


def test_every_pass_includes_the_mirrored_crop(scenes: Scenes) -> None:
    plain = labels(make_labeler(), scenes, TtaOptions(margins=(0.2, 0.6)))
    assert plain != labels(make_labeler(), scenes, TtaOptions(PredictOptions(flip=True), (0.2, 0.6)))


def test_edges_are_refined_at_the_thresholds_of_the_checkpoint(scenes: Scenes) -> None:
    labeler = make_labeler()

    def refine_and_finish(_: object, crop: Crop, prediction: Prediction) -> Label:
        box_mask = box_mask_in_window(crop.box_inside, crop.window, crop.image_hw, 64, labeler.config.compat)
        return labeler.finish(crop, Prediction(refine_edges(prediction.prob, crop.pixels, box_mask, 0.5)))

    expected = [label for _, label in label_boxes(labeler, by_image(scenes[0]), scenes[1], refine_and_finish)]
    refined = labels(labeler, scenes, TtaOptions(refine_edges=True))
    assert refined == expected
    assert [label.rle for label in refined] != [label.rle for label in labels(labeler, scenes, TtaOptions())]


@pytest.mark.parametrize("resolve_overlaps", [False, True])
def test_points_correct_the_masks_of_a_data_set(scenes: Scenes, resolve_overlaps: bool) -> None:
    labeler = make_labeler()
    rows = []
    for image, annotations in by_image(scenes[0]):
        first = annotations[0]
        x, y, width, height = first.box_xywh
        middle = Point(x + width / 2, y + height / 2, is_positive=False)
        rows.append((image, [dataclasses.replace(first, points=(middle,))]))
    results = label_images(
        labeler, rows, scenes[1], TtaOptions(resolve_overlaps=resolve_overlaps), batch_size=3, threads=1
    )
    direct = label_boxes(labeler, rows, scenes[1], lambda _, crop, prob: labeler.finish(crop, prob), batch_size=3)
    assert [label for _, label in results] == [label for _, label in direct]


def test_with_resolved_overlaps_no_pixel_belongs_to_two_instances(scenes: Scenes) -> None:
    labeler = make_labeler()
    owner_counts = {
        image.id: np.zeros(image.size_wh[::-1], int) for image in scenes[0].images.values() if image.size_wh
    }
    pairs = label_images(
        labeler, list(by_image(scenes[0])), scenes[1], TtaOptions(resolve_overlaps=True), batch_size=3, threads=1
    )
    for annotation, label in pairs:
        assert isinstance(label, Label)
        assert annotation.image_id is not None
        owner_counts[annotation.image_id] += rle.decode_mask(label.rle)
    assert all(count.max() == 1 for count in owner_counts.values())


def test_of_two_equal_boxes_the_second_is_flagged_as_dominated_if_overlaps_are_resolved(scenes: Scenes) -> None:
    first = scenes[0].annotations[0]
    content = dataclasses.replace(scenes[0], annotations=[first, first])
    for resolve, expected in ((True, [False, True]), (False, [False, False])):
        found = labels(make_labeler(), (content, scenes[1]), TtaOptions(resolve_overlaps=resolve))
        assert all(label.area for label in found)
        assert [Flag.DOMINATED in label.flags for label in found] == expected


def test_labels_with_resolved_overlaps_have_the_score_that_knows_the_other_boxes(scenes: Scenes) -> None:
    width = backbone_size("vit-micro/16").width
    fitted = with_resolved_score(pooled=width)
    assert fitted.resolved_score is not None
    weights = [float(name == "contested") / 4 for name in RESOLVED_FEATURES]
    model = score_model(width, RESOLVED_FEATURES, weight=(*weights, *[0.0] * width))
    resolved = dataclasses.replace(fitted.resolved_score, model=model)
    config = dataclasses.replace(fitted, crop_size=64, mask_thres=(0.5, 0.5, 0.5), resolved_score=resolved)
    labeler = Labeler(make_labeler().network, config, precision="float32")
    first = scenes[0].annotations[0]
    same = dataclasses.replace(first, id="again")
    alone, twice = (dataclasses.replace(scenes[0], annotations=rows) for rows in ([first], [first, same]))
    for content, score in ((alone, 0.5), (twice, 0.75)):
        found = labels(labeler, (content, scenes[1]), TtaOptions(resolve_overlaps=True))
        assert found[0].area > 0
        assert found[0].score == pytest.approx(score)


def test_an_unreadable_image_fails_only_its_own_boxes(scenes: Scenes) -> None:
    first = next(iter(scenes[0].images.values()))
    (scenes[1] / first.file_name).write_bytes(b"not an image")
    results = list(
        label_images(
            make_labeler(),
            list(by_image(scenes[0])),
            scenes[1],
            TtaOptions(margins=(0.2, 0.6), resolve_overlaps=True),
            batch_size=3,
            threads=1,
        )
    )
    failed = {annotation.image_id for annotation, label in results if isinstance(label, LabelFailure)}
    assert failed == {first.id}
    assert len(results) == len(scenes[0].annotations)
