from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mal_train.core.coco.annotations import Annotation, CocoFile, by_image, read_coco
from mal_train.core.errors import DeviceError, OutOfDeviceMemory
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Crop, Labeler, Prediction, PredictOptions
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.offline.dataset_labeler import LabelFailure, label_boxes, prefetch_map
from tests.scenes import write_scenes


class Counting(Labeler):
    """A labeler without a network's work: the map is the crop's area; it remembers its batches."""

    def __init__(self, fits: int = 100, fault: type[DeviceError] = OutOfDeviceMemory) -> None:
        model = ModelConfig("vit-micro/16", mask_head_hidden_channel=4, mask_head_out_channel=4)
        super().__init__(MalNetwork(model), LabelerConfig(crop_size=16), precision="float32")
        self.fits = fits
        self.fault = fault
        self.batches: list[int] = []

    def predict(self, crops: Sequence[Crop], options: PredictOptions | None = None) -> list[Prediction]:
        if len(crops) > self.fits:
            raise self.fault(f"{len(crops)} crops")
        self.batches.append(len(crops))
        return [Prediction(np.full((16, 16), crop.area, np.float32)) for crop in crops]


def area(_annotation: Annotation, crop: Crop, probability: Prediction) -> float:
    assert probability.prob[0, 0] == np.float32(crop.area)
    return crop.area


@pytest.fixture
def coco(tmp_path: Path) -> tuple[CocoFile, Path]:
    annotations, images = write_scenes(tmp_path, images=5, masks=False)
    return read_coco(annotations), images


def test_answers_come_in_order_and_batches_mix_images(coco: tuple[CocoFile, Path]) -> None:
    labeler = Counting()
    answers = list(label_boxes(labeler, by_image(coco[0]), coco[1], area, batch_size=4))
    assert [annotation.id for annotation, _ in answers] == [row.id for row in coco[0].annotations]
    assert [value for _, value in answers] == [row.box_xywh[2] * row.box_xywh[3] for row in coco[0].annotations]
    assert labeler.batches == [4, 4, 2]


def test_a_batch_that_does_not_fit_is_halved(coco: tuple[CocoFile, Path]) -> None:
    labeler = Counting(fits=3)
    answers = list(label_boxes(labeler, by_image(coco[0]), coco[1], area, batch_size=8))
    assert not any(isinstance(value, LabelFailure) for _, value in answers)
    assert labeler.batches == [2, 2, 2, 2, 2]


@pytest.mark.parametrize(("fault", "reason"), [(OutOfDeviceMemory, "OUT_OF_MEMORY"), (DeviceError, "DEVICE_FAILED")])
def test_what_the_device_cannot_do_fails_for_the_boxes_concerned(
    coco: tuple[CocoFile, Path], fault: type[DeviceError], reason: str
) -> None:
    answers = list(label_boxes(Counting(fits=0, fault=fault), by_image(coco[0]), coco[1], area))
    assert {value.reason for _, value in answers if isinstance(value, LabelFailure)} == {reason}
    assert len(answers) == len(coco[0].annotations)


def test_giving_up_early_leaves_nothing_running(coco: tuple[CocoFile, Path]) -> None:
    stream = label_boxes(Counting(), by_image(coco[0]), coco[1], area, batch_size=2)
    next(stream)
    stream.close()


def test_only_so_many_items_are_begun_ahead() -> None:
    begun: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        results = prefetch_map(pool, lambda value: value * value, (begun.append(n) or n for n in range(100)), 4)  # type: ignore[func-returns-value]
        assert next(results) == 0
        assert len(begun) <= 4
        assert list(results) == [n * n for n in range(1, 100)]


def test_the_network_is_left_in_evaluation_mode() -> None:
    assert not Counting().network.student.training
    assert torch.is_grad_enabled()
