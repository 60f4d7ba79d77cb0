from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mal_train.core.errors import BadDataset
from mal_train.core.masks.images import read_image
from mal_train.core.settings import Compat
from mal_train.data import datamodule
from mal_train.data.annotations import TrainingBoxes, read_training_boxes
from mal_train.data.augment import Cropping
from mal_train.data.datamodule import BoxDataModule, BoxDataset, EpochOrder, LoaderSettings, collate
from tests.scenes import write_scenes

CROPPING = Cropping(32, (0.0, 1.2), Compat.NONE)


@pytest.fixture
def boxes(tmp_path: Path) -> TrainingBoxes:
    return read_training_boxes(*write_scenes(tmp_path, images=5), min_area=0, max_area=1e9, compat=Compat.NONE)


def test_a_sample_depends_on_seed_epoch_and_index_alone(boxes: TrainingBoxes) -> None:
    one, other = BoxDataset(boxes, CROPPING, seed=3), BoxDataset(boxes, CROPPING, seed=3)
    for index in (9, 0, 4):
        other[0, index]
    assert np.array_equal(one[2, 4].views.student, other[2, 4].views.student)
    assert not np.array_equal(one[2, 4].views.student, one[3, 4].views.student)


def test_each_picture_is_decoded_once_an_epoch(boxes: TrainingBoxes, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counted(path: Path, **options: Any) -> Any:
        opened.append(path)
        return read_image(path, **options)

    monkeypatch.setattr(datamodule, "read_image", counted)
    dataset = BoxDataset(boxes, CROPPING, seed=0)
    for key in EpochOrder(boxes, seed=0):
        dataset[key]
    assert sorted(opened) == sorted(boxes.paths)


def test_decoded_pictures_take_no_more_than_their_share(boxes: TrainingBoxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datamodule, "CACHE_BYTES", 2 * 96 * 80 * 3)
    dataset = BoxDataset(boxes, CROPPING, seed=0)
    for index in range(len(boxes)):
        dataset[0, index]
    assert len(dataset._decoded) == 2
    assert dataset._decoded_bytes == 2 * 96 * 80 * 3


def test_an_unreadable_picture_is_replaced_and_named(boxes: TrainingBoxes) -> None:
    boxes.paths[0].write_bytes(b"no picture")
    sample = BoxDataset(boxes, CROPPING, seed=0)[0, 0]
    assert str(boxes.paths[0]) in sample.bad_images[0]
    assert sample.views.student.shape == (32, 32, 3)
    assert collate([sample, sample]).bad_images == sample.bad_images * 2


def test_no_readable_picture_is_an_error(boxes: TrainingBoxes) -> None:
    for path in boxes.paths:
        path.write_bytes(b"no picture")
    with pytest.raises(BadDataset, match="pictures in a row cannot be read"):
        BoxDataset(boxes, CROPPING, seed=0)[0, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_bytes_and_the_last_one_may_be_small(boxes: TrainingBoxes, workers: int) -> None:
    module = BoxDataModule(boxes, CROPPING, LoaderSettings(batch_size=4, num_workers=workers, seed=0))
    batches = list(module.train_dataloader())
    assert [len(batch.branch_N) for batch in batches] == [4, 4, 2]
    batch = batches[0]
    assert batch.student_NHWC.shape == batch.teacher_NHWC.shape == (4, 32, 32, 3)
    assert batch.student_NHWC.dtype == batch.box_mask_NHW.dtype == torch.uint8
    assert batch.branch_N.dtype == torch.int64


def test_a_run_that_goes_on_sees_the_rest_of_the_epoch(boxes: TrainingBoxes) -> None:
    def student_views(module: BoxDataModule) -> list[torch.Tensor]:
        return [batch.student_NHWC for batch in module.train_dataloader()]

    settings = LoaderSettings(batch_size=4, num_workers=0, seed=0)
    whole, rest = BoxDataModule(boxes, CROPPING, settings), BoxDataModule(boxes, CROPPING, settings)
    whole.resume_from(epoch=5, batches=0)
    rest.resume_from(epoch=5, batches=1)
    expected = student_views(whole)[1:]
    found = student_views(rest)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(student_views(rest)) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_processes_together_see_every_box_once(boxes: TrainingBoxes, batch_size: int, size: int) -> None:
    orders = [EpochOrder(boxes, 5, batch_size, rank, size) for rank in range(size)]
    for order in orders:
        order.set_epoch(2)
    places = [list(order) for order in orders]
    assert [len(part) for part in places] == [len(order) for order in orders]
    counted = [place.box for part in places for place in part if place.weight > 0]
    assert sorted(counted) == list(range(len(boxes)))
    # All make the same number of steps, and over the processes each stretch's weights are those of a mean over it.
    batches = [[part[n : n + batch_size] for n in range(0, len(part), batch_size)] for part in places]
    assert len({len(part) for part in batches}) == 1
    for stretch in zip(*batches, strict=True):
        boxes_in_it = sum(len(batch) for batch in stretch if batch[0].weight)
        for batch in stretch:
            share = len(batch) if batch[0].weight else 0
            assert batch[0].weight == pytest.approx(share * size / boxes_in_it)


def test_the_stretch_of_a_step_does_not_depend_on_how_many_share_it(boxes: TrainingBoxes) -> None:
    def steps(batch_size: int, size: int) -> list[set[int]]:
        parts = [list(EpochOrder(boxes, 5, batch_size, rank, size)) for rank in range(size)]
        count = -(-len(parts[0]) // batch_size)
        return [{p.box for part in parts for p in part[n * batch_size : (n + 1) * batch_size]} for n in range(count)]

    assert steps(4, 1) == steps(2, 2) == steps(1, 4)


def test_few_processes_open_the_same_picture(tmp_path: Path) -> None:
    many = read_training_boxes(*write_scenes(tmp_path, images=24), min_area=0, max_area=1e9, compat=Compat.NONE)
    orders = [EpochOrder(many, 0, 12, rank, 2) for rank in range(2)]
    opened = [{int(many.image_of_box[place.box]) for place in order} for order in orders]
    assert len(opened[0]) + len(opened[1]) < 24 + 24 * 2 // 3


def test_the_replacement_of_an_unreadable_picture_is_the_same_every_time(boxes: TrainingBoxes) -> None:
    boxes.paths[0].write_bytes(b"no picture")
    one, other = (BoxDataset(boxes, CROPPING, seed=3) for _ in range(2))
    other[1, 5]
    assert np.array_equal(one[1, 0].views.student, other[1, 0].views.student)
    assert one[1, 0].bad_images == other[1, 0].bad_images
