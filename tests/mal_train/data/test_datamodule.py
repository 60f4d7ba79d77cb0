from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mal_train.core.coco.annotations import read_coco
from mal_train.core.errors import BadDataset
from mal_train.core.images.files import ImageFolder, read_image
from mal_train.core.images.header import ImageLimits
from mal_train.core.settings import Compat
from mal_train.data import datamodule
from mal_train.data.annotations import TrainingBoxes, read_training_boxes, select_boxes
from mal_train.data.augment import Cropping
from mal_train.data.datamodule import BoxDataModule, BoxDataset, EpochOrder, LoaderSettings, collate
from tests.mal_train.core.images.tiffs import tiff_of
from tests.scenes import write_scenes

CROPPING = Cropping(32, (0.0, 1.2), Compat.NONE)


@pytest.fixture
def boxes(tmp_path: Path) -> TrainingBoxes:
    return read_training_boxes(*write_scenes(tmp_path, images=5), min_area=0, max_area=1e9, compat=Compat.NONE)


def test_a_sample_depends_only_on_seed_epoch_and_box(boxes: TrainingBoxes) -> None:
    one, other = BoxDataset(boxes, CROPPING, seed=3), BoxDataset(boxes, CROPPING, seed=3)
    for index in (9, 0, 4):
        other[0, index]
    assert np.array_equal(one[2, 4].views.student, other[2, 4].views.student)
    assert not np.array_equal(one[2, 4].views.student, one[3, 4].views.student)


def test_a_data_set_can_be_pickled_for_processes_that_are_not_forked(tmp_path: Path) -> None:
    annotations, folder = write_scenes(tmp_path, images=3)
    coco = read_coco(annotations)
    images = ImageFolder(folder).of_names(coco.file_names)
    boxes = select_boxes(coco, images, min_area=0, max_area=1e9, compat=Compat.NONE)
    dataset = BoxDataset(boxes, CROPPING, seed=3)
    copy: BoxDataset = ForkingPickler.loads(ForkingPickler.dumps(dataset))
    assert np.array_equal(copy[2, 4].views.student, dataset[2, 4].views.student)


def test_each_image_is_decoded_once_per_epoch(boxes: TrainingBoxes, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counted(path: Path, **options: Any) -> Any:
        opened.append(path)
        return read_image(path, **options)

    monkeypatch.setattr(datamodule, "read_image", counted)
    dataset = BoxDataset(boxes, CROPPING, seed=0)
    for key in EpochOrder(boxes, seed=0):
        dataset[key]
    assert sorted(opened) == sorted(boxes.paths)


def test_the_cache_of_decoded_images_is_bounded(boxes: TrainingBoxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datamodule, "CACHE_BYTES", 2 * 96 * 80 * 3)
    dataset = BoxDataset(boxes, CROPPING, seed=0)
    for index in range(len(boxes)):
        dataset[0, index]
    assert len(dataset._decoded) == 2
    assert dataset._decoded_bytes == 2 * 96 * 80 * 3


def test_a_sample_of_an_unreadable_image_is_replaced_and_the_image_is_named(boxes: TrainingBoxes) -> None:
    Path(boxes.paths[0]).write_bytes(b"not an image")
    sample = BoxDataset(boxes, CROPPING, seed=0)[0, 0]
    assert str(boxes.paths[0]) in sample.bad_images[0]
    assert sample.views.student.shape == (32, 32, 3)
    assert collate([sample, sample]).bad_images == sample.bad_images * 2


def test_a_set_without_readable_images_is_rejected(boxes: TrainingBoxes) -> None:
    for path in boxes.paths:
        Path(path).write_bytes(b"not an image")
    with pytest.raises(BadDataset, match=str(datamodule.MAX_REPLACEMENTS)):
        BoxDataset(boxes, CROPPING, seed=0)[0, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_uint8_and_the_last_one_may_be_smaller(boxes: TrainingBoxes, workers: int) -> None:
    module = BoxDataModule(boxes, CROPPING, LoaderSettings(batch_size=4, num_workers=workers, seed=0))
    batches = list(module.train_dataloader())
    assert [len(batch.size_class_N) for batch in batches] == [4, 4, 2]
    batch = batches[0]
    assert batch.student_NHWC.shape == batch.teacher_NHWC.shape == (4, 32, 32, 3)
    assert batch.student_NHWC.dtype == batch.box_mask_NHW.dtype == torch.uint8
    assert batch.size_class_N.dtype == torch.int64


def test_a_resumed_run_gets_the_rest_of_the_epoch(boxes: TrainingBoxes) -> None:
    def student_views(module: BoxDataModule) -> list[torch.Tensor]:
        return [batch.student_NHWC for batch in module.train_dataloader()]

    settings = LoaderSettings(batch_size=4, num_workers=0, seed=0)
    full, rest = BoxDataModule(boxes, CROPPING, settings), BoxDataModule(boxes, CROPPING, settings)
    full.resume_from(epoch=5, batches=0)
    rest.resume_from(epoch=5, batches=1)
    expected = student_views(full)[1:]
    found = student_views(rest)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(student_views(rest)) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_all_processes_together_use_every_box_once(boxes: TrainingBoxes, batch_size: int, world_size: int) -> None:
    orders = [EpochOrder(boxes, 5, batch_size, rank, world_size) for rank in range(world_size)]
    for order in orders:
        order.set_epoch(2)
    samples = [list(order) for order in orders]
    assert [len(part) for part in samples] == [len(order) for order in orders]
    counted = [sample.box for part in samples for sample in part if sample.weight > 0]
    assert sorted(counted) == list(range(len(boxes)))
    # Processes make equally many steps, and the weights of a global batch are those of a mean over it.
    batches = [[part[n : n + batch_size] for n in range(0, len(part), batch_size)] for part in samples]
    assert len({len(part) for part in batches}) == 1
    for global_batch in zip(*batches, strict=True):
        n_boxes = sum(len(batch) for batch in global_batch if batch[0].weight)
        for batch in global_batch:
            n_local = len(batch) if batch[0].weight else 0
            assert batch[0].weight == pytest.approx(n_local * world_size / n_boxes)


def test_global_batches_do_not_depend_on_the_number_of_processes(boxes: TrainingBoxes) -> None:
    def steps(batch_size: int, world_size: int) -> list[set[int]]:
        parts = [list(EpochOrder(boxes, 5, batch_size, rank, world_size)) for rank in range(world_size)]
        count = -(-len(parts[0]) // batch_size)
        return [
            {sample.box for part in parts for sample in part[n * batch_size : (n + 1) * batch_size]}
            for n in range(count)
        ]

    assert steps(4, 1) == steps(2, 2) == steps(1, 4)


def test_few_images_are_opened_by_two_processes(tmp_path: Path) -> None:
    many = read_training_boxes(*write_scenes(tmp_path, images=24), min_area=0, max_area=1e9, compat=Compat.NONE)
    orders = [EpochOrder(many, 0, 12, rank, 2) for rank in range(2)]
    opened = [{int(many.image_of_box[sample.box]) for sample in order} for order in orders]
    assert len(opened[0]) + len(opened[1]) < 24 + 24 * 2 // 3


@pytest.fixture
def tiff_scenes(tmp_path: Path) -> tuple[Path, Path]:
    """Returns scenes as TIFFs of 8 and of 16 bits in tiles, without stated sizes, one with a box of the whole image."""

    def as_tiffs(coco: dict[str, Any]) -> None:
        for number, image in enumerate(coco["images"]):
            path = tmp_path / "images" / image["file_name"]
            pixels = np.asarray(Image.open(path))
            image["file_name"] = f"{number}.tif"
            path.with_suffix(".tif").write_bytes(
                tiff_of(pixels.astype(np.uint16) * 9 if number % 2 else pixels, tile=16)
            )
            del image["width"], image["height"]
        coco["annotations"].append({**coco["annotations"][0], "id": 900, "bbox": [0, 0, 96, 80]})

    return write_scenes(tmp_path, images=4, change=as_tiffs)


def test_samples_by_windows_are_those_of_the_complete_images(tiff_scenes: tuple[Path, Path]) -> None:
    def dataset(limits: ImageLimits) -> BoxDataset:
        images = ImageFolder(tiff_scenes[1], limits=limits)
        coco = read_coco(tiff_scenes[0])
        boxes = select_boxes(coco, images, min_area=0, max_area=1e9, compat=Compat.TAO, supervision="auto")
        return BoxDataset(boxes, CROPPING, seed=3)

    whole, parts = dataset(ImageLimits()), dataset(ImageLimits(max_side=95, max_pixels=80 * 95))
    assert len(whole) == len(parts) == 9
    for index in range(9):
        expected, found = whole[1, index], parts[1, index]
        if whole.boxes.box(index) == (0.0, 0.0, 96.0, 80.0):
            assert "0.tif" in found.bad_images[0]
            continue
        assert found.bad_images == ()
        for name in ("student", "teacher", "box_mask", "mask"):
            assert np.array_equal(getattr(found.views, name), getattr(expected.views, name))
    assert np.array_equal(whole.formats, parts.formats)
    assert parts.formats.tolist() == [0, datamodule.STRETCHED, 0, datamodule.STRETCHED]


def test_one_image_that_is_read_by_windows_is_open_at_a_time(tiff_scenes: tuple[Path, Path]) -> None:
    images = ImageFolder(tiff_scenes[1], limits=ImageLimits(max_side=95))
    boxes = select_boxes(read_coco(tiff_scenes[0]), images, min_area=0, max_area=2000, compat=Compat.NONE)
    dataset = BoxDataset(boxes, CROPPING, seed=3)
    for index in range(len(boxes)):
        dataset[0, index]
        assert len(dataset._decoded) == 1


def test_the_replacement_of_an_unreadable_image_is_deterministic(boxes: TrainingBoxes) -> None:
    Path(boxes.paths[0]).write_bytes(b"not an image")
    one, other = (BoxDataset(boxes, CROPPING, seed=3) for _ in range(2))
    other[1, 5]
    assert np.array_equal(one[1, 0].views.student, other[1, 0].views.student)
    assert one[1, 0].bad_images == other[1, 0].bad_images
