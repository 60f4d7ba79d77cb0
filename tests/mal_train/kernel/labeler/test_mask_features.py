import math

import numpy as np
import pytest

from mal_train.core.masks.geometry import Region
from mal_train.core.score_model import MASK_FEATURES
from mal_train.kernel.labeler.mask_features import mask_features
from mal_train.kernel.labeler.overlaps import MaskClaim

HEIGHT, WIDTH = 48, 80
BOX = (10.0, 20.0, float(WIDTH), float(HEIGHT))
IMAGE_HW = (200, 300)


def features_of(prob: np.ndarray, mask: np.ndarray | None = None, threshold: float = 0.5) -> dict[str, float]:
    claim = MaskClaim(Region(10, 20, 10 + WIDTH, 20 + HEIGHT), prob.astype(np.float32), threshold)
    values = mask_features(claim, claim.mask if mask is None else mask, BOX, IMAGE_HW)
    return dict(zip(MASK_FEATURES, values.tolist(), strict=True))


def left_half(inside: float = 0.9, outside: float = 0.1) -> np.ndarray:
    prob = np.full((HEIGHT, WIDTH), outside)
    prob[:, : WIDTH // 2] = inside
    return prob


def test_the_shape_of_a_mask_is_measured() -> None:
    found = features_of(left_half())
    assert found["fill"] == pytest.approx(0.5)
    assert found["tightness"] == pytest.approx(0.5)
    assert found["largest_part"] == 1.0
    assert found["longest_border"] == 1.0
    assert found["mean_border"] == pytest.approx(0.5)
    assert found["corners"] == pytest.approx(0.5)
    assert found["aspect"] == pytest.approx(math.log(WIDTH / HEIGHT))
    assert found["log_area"] == pytest.approx(math.log(WIDTH * HEIGHT))
    assert found["image_borders"] == 0.0


def test_the_share_of_the_largest_part_is_measured() -> None:
    prob = left_half()
    prob[:, WIDTH // 4 : WIDTH // 4 + 4] = 0.1
    assert features_of(prob)["largest_part"] < 0.6


@pytest.mark.parametrize(
    ("inside", "counts"), [(0.6, (0, 0, 0)), (0.8, (1, 0, 0)), (0.95, (1, 1, 0)), (0.99, (1, 1, 1))]
)
def test_samples_far_above_the_threshold_are_counted(inside: float, counts: tuple[int, int, int]) -> None:
    found = features_of(left_half(inside))
    assert tuple(found[f"inside_{offset}"] for offset in (1, 2, 4)) == counts


def test_samples_just_below_the_threshold_are_counted() -> None:
    found = features_of(left_half(outside=0.2))
    assert found["around_1"] == 1.0
    assert found["around_2"] == pytest.approx(0.5)


def test_pixels_of_other_boxes_are_not_taken_for_unstable_ones() -> None:
    full = np.full((HEIGHT, WIDTH), 0.9)
    kept = np.zeros(full.shape, dtype=np.bool_)
    kept[:, : WIDTH // 2] = True
    found = features_of(full, kept)
    assert found["around_4"] == 1.0
    assert found["fill"] == pytest.approx(0.5)


def test_features_do_not_depend_on_the_resolution_of_the_box() -> None:
    prob = np.random.default_rng(0).random((HEIGHT, WIDTH)).repeat(4, 0).repeat(4, 1)
    large = MaskClaim(Region(0, 0, 4 * WIDTH, 4 * HEIGHT), prob.astype(np.float32), 0.4)
    small = MaskClaim(Region(0, 0, WIDTH, HEIGHT), prob[::4, ::4].astype(np.float32), 0.4)
    a, b = (mask_features(one, one.mask, BOX, IMAGE_HW) for one in (large, small))
    np.testing.assert_allclose(a, b, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (3, 2)])
def test_boxes_of_few_pixels_have_finite_features(shape: tuple[int, int]) -> None:
    claim = MaskClaim(Region(0, 0, shape[1], shape[0]), np.ones(shape, np.float32), 0.5)
    assert np.isfinite(mask_features(claim, claim.mask, (0.0, 0.0, shape[1], shape[0]), IMAGE_HW)).all()
