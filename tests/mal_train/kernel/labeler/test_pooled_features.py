"""Features of the backbone, averaged over the mask."""

import numpy as np
import pytest
import torch

from mal_train.core.masks.geometry import Region
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.crop_predictor import pooled_features
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop, PredictOptions
from tests.networks import spread_network

IMAGE = np.random.default_rng(5).integers(0, 256, (90, 140, 3), dtype=np.uint8)
BOXES = [(5, 5, 30, 30), (60, 10, 70, 75), (100.25, 60.5, 50, 40)]


def test_features_are_averaged_by_probability_within_the_needed_region() -> None:
    feat = torch.arange(4.0).view(1, 1, 2, 2)
    prob = torch.ones(1, 8, 8)
    prob[0, :4, 4:] = 0.5
    assert pooled_features(feat, prob, [Region(0, 0, 8, 8)]).item() == pytest.approx((0.5 + 2 + 3) / 3.5)
    assert pooled_features(feat, prob, [Region(0, 0, 8, 4)]).item() == pytest.approx(0.5 / 1.5)


def test_an_empty_mask_has_no_features() -> None:
    assert pooled_features(torch.ones(1, 3, 2, 2), torch.zeros(1, 8, 8), [Region(0, 0, 8, 8)]).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("flip", [False, True])
def test_features_of_a_crop_depend_on_no_other_crop_and_not_on_the_rest_of_its_map(flip: bool) -> None:
    labeler = Labeler(spread_network(), LabelerConfig(crop_size=64), precision="float32")
    crops = [crop for crop in labeler.prepare(IMAGE, BOXES) if isinstance(crop, Crop)]
    together = labeler.predict(crops, PredictOptions(flip=flip))
    for crop, prediction in zip(crops, together, strict=True):
        for options in (PredictOptions(flip=flip), PredictOptions(flip=flip, whole_map=True)):
            (alone,) = labeler.predict([crop], options)
            assert alone.pooled is not None
            assert prediction.pooled is not None
            np.testing.assert_array_equal(alone.pooled, prediction.pooled)
