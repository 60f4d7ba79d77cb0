import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mal_train.core.coco.annotations import Annotation, CocoFile, by_image, read_coco
from mal_train.core.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.offline.dataset_labeler import LabelFailure, Row, label_boxes, prefetch_map
from tests.scenes import write_scenes


class CountingLabeler(Labeler):
    """A labeler that predicts the crop's area and records the size of its batches."""

    def __init__(self, max_batch: int = 100, error: type[DeviceError] = OutOfDeviceMemory) -> None:
        model = ModelConfig("vit-micro/16", mask_head_hidden_channel=4, mask_head_out_channel=4)
        super().__init__(MalNetwork(model), LabelerConfig(crop_size=16), precision="float32")
        self.max_batch = max_batch
        self.error = error
        self.batches: list[int] = []

    def predict(self, crops: Sequence[Crop], options: PredictOptions | None = None) -> list[Prediction]:
        if len(crops) > self.max_batch:
            raise self.error(f"{len(crops)} crops")
        self.batches.append(len(crops))
        return [Prediction(np.full((16, 16), crop.area, np.float32)) for crop in crops]


def area(_annotation: Annotation, crop: Crop, prediction: Prediction) -> float:
    assert prediction.prob[0, 0] == np.float32(crop.area)
    return crop.area


@pytest.fixture
def coco(tmp_path: Path) -> tuple[CocoFile, Path]:
    annotations, images = write_scenes(tmp_path, images=5, masks=False)
    return read_coco(annotations), images


def test_results_are_in_order_and_batches_mix_images(coco: tuple[CocoFile, Path]) -> None:
    labeler = CountingLabeler()
    results = list(label_boxes(labeler, by_image(coco[0]), coco[1], area, batch_size=4))
    assert [annotation.id for annotation, _ in results] == [row.id for row in coco[0].annotations]
    assert [value for _, value in results] == [row.box_xywh[2] * row.box_xywh[3] for row in coco[0].annotations]
    assert labeler.batches == [4, 4, 2]


def test_a_batch_that_does_not_fit_is_halved(coco: tuple[CocoFile, Path]) -> None:
    labeler = CountingLabeler(max_batch=3)
    results = list(label_boxes(labeler, by_image(coco[0]), coco[1], area, batch_size=8))
    assert not any(isinstance(value, LabelFailure) for _, value in results)
    assert labeler.batches == [2, 2, 2, 2, 2]


@pytest.mark.parametrize(("error", "reason"), [(OutOfDeviceMemory, "OUT_OF_MEMORY"), (DeviceError, "DEVICE_FAILED")])
def test_a_device_error_fails_every_box_of_its_batch(
    coco: tuple[CocoFile, Path], error: type[DeviceError], reason: str
) -> None:
    results = list(label_boxes(CountingLabeler(max_batch=0, error=error), by_image(coco[0]), coco[1], area))
    assert {value.reason for _, value in results if isinstance(value, LabelFailure)} == {reason}
    assert len(results) == len(coco[0].annotations)


def test_a_lost_device_ends_the_labeling(coco: tuple[CocoFile, Path]) -> None:
    with pytest.raises(DeviceLost):
        list(label_boxes(CountingLabeler(max_batch=0, error=DeviceLost), by_image(coco[0]), coco[1], area))


def test_closing_the_generator_early_ends_its_threads(coco: tuple[CocoFile, Path]) -> None:
    stream = label_boxes(CountingLabeler(), by_image(coco[0]), coco[1], area, batch_size=2)
    next(stream)
    stream.close()


def test_prefetch_map_starts_a_limited_number_of_items_ahead() -> None:
    started: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        results = prefetch_map(pool, lambda value: value * value, (started.append(n) or n for n in range(100)), 4)  # type: ignore[func-returns-value]
        assert next(results) == 0
        assert len(started) <= 4
        assert list(results) == [n * n for n in range(1, 100)]


def test_the_network_is_left_in_evaluation_mode() -> None:
    assert not CountingLabeler().network.student.training
    assert torch.is_grad_enabled()


def test_failures_do_not_wait_for_a_full_batch(coco: tuple[CocoFile, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_train.offline.dataset_labeler.FAILURES_PER_BATCH", 2)
    for path in coco[1].iterdir():
        path.unlink()
    drawn: list[Row] = []

    def rows() -> Iterator[Row]:
        for row in [*by_image(coco[0])] * 100:
            drawn.append(row)
            yield row

    stream = label_boxes(CountingLabeler(), rows(), coco[1], area, batch_size=4, threads=1)
    for _ in range(10):
        assert isinstance(next(stream)[1], LabelFailure)
    assert len(drawn) < 50
    stream.close()


def test_a_box_without_an_id_fails_without_a_name(coco: tuple[CocoFile, Path]) -> None:
    image, (first, *_) = next(by_image(coco[0]))
    outside = dataclasses.replace(first, id=None, box_xywh=(1000.0, 1000.0, 5.0, 5.0))
    ((_, failure),) = label_boxes(CountingLabeler(), [(image, [outside])], coco[1], area)
    assert isinstance(failure, LabelFailure)
    assert failure.reason == "BAD_BOX"
    assert "annotation" not in failure.message
