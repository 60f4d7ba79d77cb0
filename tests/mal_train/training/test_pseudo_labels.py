"""Pseudo-labels: masks of an earlier model in addition to the boxes (train.supervision: pseudo)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mal_train.commands.train import train
from mal_train.config.spec import load_spec
from mal_train.core.coco.annotations import read_coco
from mal_train.core.console import Console
from mal_train.core.masks import rle
from mal_train.core.settings import Compat
from mal_train.data.annotations import TrainingBoxes, pseudo_label_weight, select_boxes
from mal_train.data.augment import Cropping
from mal_train.data.datamodule import BoxDataset, collate
from mal_train.losses.crf import MeanField
from mal_train.losses.mask import mask_loss
from mal_train.training.step import LossWeights, StepLosses, pseudo_label_losses, step_losses
from tests.mal_train.training.runs import SMALL
from tests.scenes import write_scenes


def scored(coco: dict[str, Any]) -> None:
    for number, annotation in enumerate(coco["annotations"]):
        annotation["score"] = 0.9 if number % 2 else 0.3
    del coco["annotations"][2]["segmentation"]


def pseudo_labeled(folder: Path) -> TrainingBoxes:
    annotations, images = write_scenes(folder, change=scored)
    return select_boxes(
        read_coco(annotations), images, min_area=0, max_area=1e9, compat=Compat.NONE, supervision="pseudo"
    )


def test_a_pseudo_label_is_weighted_by_its_score_and_the_extent_of_its_box() -> None:
    half = np.zeros((20, 20), bool)
    half[5:15, 5:10] = True
    code = rle.encode_mask(half)
    assert pseudo_label_weight(0.8, code, (5.0, 5.0, 5.0, 10.0)) == pytest.approx(0.8)
    assert pseudo_label_weight(0.8, code, (5.0, 5.0, 10.0, 10.0)) == pytest.approx(0.4)
    assert pseudo_label_weight(None, code, (5.0, 5.0, 10.0, 10.0)) == pytest.approx(0.5)
    assert pseudo_label_weight(7, code, (5.0, 5.0, 5.0, 10.0)) == 1.0


@pytest.mark.parametrize("mask", [None, np.zeros((20, 20), bool)])
def test_a_missing_or_empty_mask_has_weight_0(mask: np.ndarray[Any, Any] | None) -> None:
    assert pseudo_label_weight(0.9, None if mask is None else rle.encode_mask(mask), (5.0, 5.0, 5.0, 5.0)) == 0.0


@pytest.mark.parametrize("score", [math.nan, math.inf, True, "0.9", [0.9]])
def test_an_invalid_score_counts_as_1(score: object) -> None:
    square = np.zeros((20, 20), bool)
    square[5:15, 5:15] = True
    assert pseudo_label_weight(score, rle.encode_mask(square), (5.0, 5.0, 10.0, 10.0)) == 1.0


def test_a_detection_is_weighted_by_the_score_of_its_mask(tmp_path: Path) -> None:
    def detected(coco: dict[str, Any]) -> None:
        for number, annotation in enumerate(coco["annotations"]):
            annotation |= {"score": 0.3 if number % 2 else 0.9, "mask_score": 0.9 if number % 2 else 0.3}

    annotations, images = write_scenes(tmp_path, change=detected)
    boxes = select_boxes(
        read_coco(annotations), images, min_area=0, max_area=1e9, compat=Compat.NONE, supervision="pseudo"
    )
    assert boxes.mask_weights is not None
    assert boxes.mask_weights[1::2].min() > boxes.mask_weights[::2].max()


def test_the_score_of_a_corrected_mask_counts_as_1(tmp_path: Path) -> None:
    def corrected(coco: dict[str, Any]) -> None:
        for number, annotation in enumerate(coco["annotations"]):
            annotation["score"] = 0.2
            if number % 2:
                annotation["corrected"] = True

    annotations, images = write_scenes(tmp_path, change=corrected)
    boxes = select_boxes(
        read_coco(annotations), images, min_area=0, max_area=1e9, compat=Compat.NONE, supervision="pseudo"
    )
    assert boxes.mask_weights is not None
    assert boxes.mask_weights[1::2].min() > 4 * boxes.mask_weights[::2].max()


def test_weights_have_mean_1_and_increase_with_the_scores(tmp_path: Path) -> None:
    boxes = pseudo_labeled(tmp_path)
    assert boxes.mask_weights is not None
    known = boxes.mask_weights > 0
    assert len(boxes) == 8
    assert known.sum() == 7
    assert boxes.mask_weights[known].mean() == pytest.approx(1.0)
    assert boxes.mask_weights[1] > boxes.mask_weights[0]


def test_a_batch_has_the_weight_of_each_of_its_masks(tmp_path: Path) -> None:
    boxes = pseudo_labeled(tmp_path)
    data = BoxDataset(boxes, Cropping(32, (0.0, 1.2), Compat.NONE), seed=3)
    batch = collate([data[0, 1], data[0, 2], data[0, 3]])
    assert batch.masked_M is not None
    assert batch.masked_M.tolist() == [0, 2]
    assert boxes.mask_weights is not None
    assert batch.mask_weight_M is not None
    assert batch.mask_weight_M.tolist() == boxes.mask_weights[[1, 3]].tolist()


def test_pseudo_labels_add_their_weighted_loss_to_the_box_losses() -> None:
    logits = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    boxes = StepLosses(*(torch.tensor(value) for value in (5.0, 2.0, 3.0, 0.0, 0.0)))
    mask = torch.zeros(2, 8, 8)
    mask[:, 2:6, 2:6] = 1
    both = pseudo_label_losses(
        logits, mask, torch.tensor([0, 2]), mask_weight_M=torch.tensor([1.5, 0.5]), weight=4.0, boxes=boxes
    )
    each = mask_loss(logits[[0, 2], 0], mask)
    expected = 4.0 * (1.5 * each[0] + 0.5 * each[1]) / 3
    assert both.mask == pytest.approx(float(expected), rel=1e-5)
    assert both.total == pytest.approx(5.0 + float(expected), rel=1e-5)
    assert (float(both.mil), float(both.crf)) == (2.0, 3.0)


def test_the_other_losses_do_not_depend_on_the_teacher() -> None:
    student = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    box = torch.zeros(2, 32, 32)
    box[:, 4:28, 6:26] = 1
    arguments: dict[str, Any] = {
        "refine": MeanField(num_iter=2, compiled=False),
        "weights": LossWeights(4.0, 0.0, 0.01),
        "compat": Compat.NONE,
    }
    guide = torch.zeros(2, 3, 32, 32)
    alone = step_losses(student, None, guide, box, **arguments)
    together = step_losses(student, student.clone(), guide, box, **arguments)
    assert torch.equal(torch.stack(alone), torch.stack(together))


def test_a_loss_with_weight_0_gives_no_nan_for_an_overflowed_logit() -> None:
    student = torch.zeros(1, 1, 8, 8)
    student[..., 3, 3] = torch.inf
    student.requires_grad_()
    box = torch.zeros(1, 32, 32)
    box[:, 4:28, 6:26] = 1
    losses = step_losses(
        student,
        None,
        torch.zeros(1, 3, 32, 32),
        box,
        refine=MeanField(num_iter=2, compiled=False),
        weights=LossWeights(4.0, 0.0, 0.0),
        compat=Compat.TAO,
    )
    (gradient,) = torch.autograd.grad(losses.total, student)
    assert torch.isfinite(torch.stack(losses)).all()
    assert torch.isfinite(gradient).all()


def test_training_learns_from_pseudo_labels(tmp_path: Path) -> None:
    annotations, images = write_scenes(tmp_path, change=scored)
    spec = load_spec(
        None,
        [
            *SMALL,
            f"results_dir={tmp_path / 'out'}",
            f"dataset.train_ann_path={annotations}",
            f"dataset.train_img_dir={images}",
            "train.supervision=pseudo",
            "train.loss_crf_weight=0",
        ],
    )
    result = train(spec, Console())
    assert result.checkpoint.is_file()
    lines = (tmp_path / "out" / "train" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    trained = [row for row in rows if row["kind"] == "train"]
    assert all(float(row["loss_mask"]) > 0 and float(row["loss_mil"]) > 0 for row in trained)
    assert all(float(row["loss_crf"]) == 0 for row in trained)
