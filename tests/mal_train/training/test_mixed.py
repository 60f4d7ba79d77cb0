"""Supervision by masks where annotations have them, and by boxes elsewhere."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mal_train.commands.train import train
from mal_train.config.spec import load_spec
from mal_train.core.coco.annotations import read_coco
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import encode_mask
from mal_train.core.settings import Compat
from mal_train.data.annotations import Supervision, TrainingBoxes, select_boxes
from mal_train.data.augment import Cropping, make_views
from mal_train.data.datamodule import BoxDataset, collate
from mal_train.losses.crf import MeanField
from mal_train.losses.mask import mask_loss
from mal_train.training.step import StepLosses, mixed_losses
from tests.mal_train.training.runs import SMALL
from tests.scenes import write_scenes


def half_masked(coco: dict[str, Any]) -> None:
    for annotation in coco["annotations"][1::2]:
        del annotation["segmentation"]
    coco["annotations"][3]["segmentation"] = [[1.0, 2.0]]


def boxes_of(folder: Path, supervision: Supervision) -> TrainingBoxes:
    annotations, images = write_scenes(folder, change=half_masked)
    return select_boxes(
        read_coco(annotations), images, min_area=0, max_area=1e9, compat=Compat.NONE, supervision=supervision
    )


def test_each_supervision_keeps_its_boxes_and_their_masks(tmp_path: Path) -> None:
    box, mask, auto = (boxes_of(tmp_path, supervision) for supervision in ("box", "mask", "auto"))
    assert (len(box), box.masks) == (8, ())
    assert [code is None for code in auto.masks] == [False, True] * 4
    assert len(mask) == 4
    assert None not in mask.masks
    assert mask.left_out.counts == {"NO_GROUND_TRUTH": 3, "BAD_GROUND_TRUTH": 1}
    assert re.search(r"\b4 .*masks", auto.summary())


def test_mask_supervision_without_masks_is_refused(tmp_path: Path) -> None:
    annotations, images = write_scenes(tmp_path, masks=False)
    with pytest.raises(BadDataset):
        select_boxes(read_coco(annotations), images, min_area=0, max_area=1e9, compat=Compat.NONE, supervision="mask")


@pytest.mark.parametrize("seed", range(6))
def test_the_mask_is_cropped_as_the_image_and_clipped_to_the_box(seed: int) -> None:
    mask = np.zeros((60, 80), bool)
    mask[10:30, 20:60] = True
    mask[40:50, 5:10] = True
    image = np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255
    box = (20.0, 10.0, 40.0, 20.0)
    cropping = Cropping(64, (0.0, 1.2), Compat.NONE)
    views = make_views(image, box, cropping, np.random.default_rng(seed), encode_mask(mask))
    assert views.mask is not None
    assert np.array_equal(views.mask, (views.teacher[..., 0] > 127) & (views.box_mask > 0))
    assert views.mask.mean() > 0.1


def test_masks_do_not_change_the_rest_of_a_sample(tmp_path: Path) -> None:
    cropping = Cropping(32, (0.0, 1.2), Compat.NONE)
    plain = BoxDataset(boxes_of(tmp_path, "box"), cropping, 1)
    mixed = BoxDataset(boxes_of(tmp_path, "auto"), cropping, 1)
    a, b = (collate([data[(0, n)] for n in range(4)]) for data in (plain, mixed))
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True) if isinstance(x, Tensor))
    assert a.mask_MHW is None
    assert b.masked_M is not None
    assert b.masked_M.tolist() == [0, 2]


def test_crops_have_equal_weight_with_mask_and_with_box_supervision() -> None:
    student = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 16, 16, dtype=torch.uint8)
    masks[0, 4:12, 4:12] = 1
    indices: list[list[int]] = []

    def of_boxes(index: Tensor) -> StepLosses:
        indices.append(index.tolist())
        return StepLosses(*(torch.tensor(v) for v in (7.0, 4.0, 2.0, 1.0, 0.0)))

    losses = mixed_losses(student, masks, torch.tensor([2]), 3.0, of_boxes)
    target = torch.zeros(1, 8, 8)
    target[0, 2:6, 2:6] = 1.0
    alone = mask_loss(student[2], target).item()
    assert indices == [[0, 1, 3]]
    assert losses.mask.item() == pytest.approx(3.0 * alone / 4)
    assert losses.mil.item() == pytest.approx(4.0 * 3 / 4)
    assert losses.total.item() == pytest.approx(7.0 * 3 / 4 + 3.0 * alone / 4)


@pytest.mark.parametrize("supervision", ["mask", "auto"])
def test_training_learns_from_masks(supervision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mal_train.commands.training_setup.MeanField", lambda **settings: MeanField(**settings, compiled=False)
    )
    annotations, images = write_scenes(tmp_path / "scenes", change=half_masked)
    paths = [f"results_dir='{tmp_path}'", f"dataset.train_ann_path='{annotations}'"]
    paths += [f"dataset.train_img_dir='{images}'", "train.num_epochs=40", "train.lr=5e-3"]
    spec = load_spec(None, [*SMALL, *paths, f"train.supervision={supervision}", "train.checkpoint_interval=40"])
    train(spec, Console())
    with (tmp_path / "train" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss_mask"]) for row in rows]
    assert losses[-1] < 0.8 * losses[0]
    assert (float(rows[-1]["loss_mil"]) == 0.0) == (supervision == "mask")
