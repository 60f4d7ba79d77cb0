"""Offline labeling of images above the limits: the masks of the complete image, byte for byte."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mal_train.core.coco.annotations import by_image, read_coco
from mal_train.core.images.files import ImageFolder
from mal_train.core.images.header import MAX_PIXELS, ImageLimits
from mal_train.core.images.tiff_reader import TiffReader
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Label
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.offline import dataset_labeler
from mal_train.offline.dataset_labeler import LabelFailure
from mal_train.offline.tta import TtaOptions, label_images
from mal_train.training.validation import Validator
from tests.mal_train.core.images.tiffs import tiff_of

SIDE = 300
LIMITS = ImageLimits(max_pixels=SIDE * SIDE, max_side=200)


@pytest.fixture
def labeler() -> Labeler:
    torch.manual_seed(0)
    network = MalNetwork(ModelConfig("vit-micro/16", mask_head_hidden_channel=4, mask_head_out_channel=4))
    return Labeler(network, LabelerConfig(crop_size=32), precision="float32")


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4000, (SIDE, SIDE, 3)).astype(np.uint16)
    (tmp_path / "wide.tif").write_bytes(tiff_of(pixels, tile=64))
    (tmp_path / "gray.tif").write_bytes(tiff_of(pixels[:, :, 0].astype(np.uint8), rows_per_strip=9))
    boxes = [[-5, 3, 60, 40], [250.5, 261.25, 49, 38], [100.3, 90.7, 50.1, 70.9], [400, 3, 20, 20], [0, 0, SIDE, SIDE]]
    rows = [
        {"id": 10 * image + number, "image_id": image, "category_id": 1, "bbox": box}
        for image in (1, 2)
        for number, box in enumerate(boxes)
    ]
    images = [{"id": 1, "file_name": "wide.tif"}, {"id": 2, "file_name": "gray.tif", "width": SIDE, "height": SIDE}]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": [{"id": 1, "name": "a"}]}))
    return path


def labels(labeler: Labeler, path: Path, limits: ImageLimits, options: TtaOptions) -> list[Label | LabelFailure]:
    images = ImageFolder(path.parent, limits=limits)
    found = label_images(labeler, by_image(read_coco(path)), images, options, batch_size=3, threads=2)
    return [label for _, label in found]


@pytest.mark.parametrize("options", [TtaOptions(), TtaOptions(margins=(0.4, 1.0), refine_edges=True)])
def test_masks_by_windows_are_those_of_the_complete_image(
    labeler: Labeler, annotations: Path, options: TtaOptions
) -> None:
    whole = labels(labeler, annotations, ImageLimits(), options)
    parts = labels(labeler, annotations, LIMITS, options)
    for index, (part, expected) in enumerate(zip(parts, whole, strict=True)):
        if index % 5 == 4:
            assert isinstance(part, LabelFailure)
            assert part.reason == "IMAGE_TOO_LARGE"
        else:
            assert part == expected
    assert sum(isinstance(label, Label) for label in parts) == 6


def fail(*_: object) -> None:
    raise AssertionError("read")


def test_overlaps_of_images_above_every_limit_are_refused_in_words(
    labeler: Labeler, annotations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TtaOptions(resolve_overlaps=True)
    resolved = labels(labeler, annotations, dataclasses.replace(LIMITS, max_side=201), options)
    assert sum(isinstance(label, Label) for label in resolved) == 6
    monkeypatch.setattr(dataset_labeler, "MAX_PIXELS", SIDE * SIDE - 1)
    monkeypatch.setattr(TiffReader, "__getitem__", fail)
    refused = labels(labeler, annotations, LIMITS, options)
    assert [label.reason for label in refused if isinstance(label, LabelFailure)] == ["IMAGE_TOO_LARGE"] * len(refused)
    assert MAX_PIXELS > SIDE * SIDE


def test_the_score_of_resolved_overlaps_is_not_fitted_to_images_above_every_limit(
    labeler: Labeler, annotations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_labeler, "MAX_PIXELS", SIDE * SIDE - 1)
    monkeypatch.setattr("mal_train.offline.tta.PixelOwners", fail)
    images = ImageFolder(annotations.parent, limits=LIMITS)
    validator = Validator(
        read_coco(annotations), images, 4, fit_thresholds=False, precision="float32", device="cpu", fit_calibration=True
    )
    assert validator.fit_resolved(labeler.network, labeler.config) is None
