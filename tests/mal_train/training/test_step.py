"""The losses of a step from the part of the teacher's map that they need."""

import pytest
import torch

from mal_train.core.masks.geometry import Region
from mal_train.core.settings import Branch, Compat
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.losses.crf import MeanField
from mal_train.training.step import LossWeights, step_losses, target_regions

SIDE = 64
BOXES = ((20, 30, 37, 41), (0, 0, 64, 64), (5, 50, 6, 64), (12, 16, 40, 48))
"""Columns and rows x0, y0, x1, y1 of the box on each crop."""


def box_masks() -> torch.Tensor:
    masks = torch.zeros(len(BOXES), SIDE, SIDE, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, BOXES, strict=True):
        mask[y0:y1, x0:x1] = 1
    return masks


def test_regions_are_the_boxes_and_one_pixel_around_them() -> None:
    assert target_regions(box_masks()) == [
        Region(19, 29, 38, 42),
        Region(0, 0, 64, 64),
        Region(4, 49, 7, 64),
        Region(11, 15, 41, 49),
    ]


def test_a_crop_without_a_box_has_a_region() -> None:
    (region,) = target_regions(torch.zeros(1, SIDE, SIDE))
    assert not region.is_empty


@pytest.mark.parametrize("crf_size_ratio", [1, 2, 3])
@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 2, 3]])
def test_the_losses_do_not_depend_on_the_teacher_outside_the_boxes(chosen: list[int], crf_size_ratio: int) -> None:
    torch.manual_seed(0)
    network = MalNetwork(ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=8))
    for parameter in network.teacher.parameters():
        parameter.mul_(3.0)  # a map with clear foreground and background
    view, box_mask = torch.randn(len(chosen), 3, SIDE, SIDE), box_masks()[chosen]
    size_classes = torch.tensor([2, 1, 0])[: len(chosen)]
    student = network.logits(view, size_classes, Branch.STUDENT).detach()
    complete = network.logits(view, size_classes, Branch.TEACHER)
    part = network.logits(view, size_classes, Branch.TEACHER, target_regions(box_mask))
    losses = [
        step_losses(
            student,
            teacher,
            view,
            box_mask,
            refine=MeanField(num_iter=5, compiled=False),
            weights=LossWeights(4.0, 0.5),
            compat=Compat.NONE,
            crf_size_ratio=crf_size_ratio,
        )
        for teacher in (complete, part)
    ]
    assert torch.equal(losses[0].crf, losses[1].crf)
