import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as torchvision

from mal_train.core.settings import Compat
from mal_train.data import augment
from mal_train.data.augment import Cropping, color_jitter, make_views, shift_hue


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)


def cropping(compat: Compat = Compat.NONE) -> Cropping:
    return Cropping(32, (0.0, 1.2), compat)


@pytest.mark.parametrize("shift", [-0.1, -0.003, 0.0, 0.07, 0.1])
def test_hue_shifts_as_in_torchvision(pixels: np.ndarray, shift: float) -> None:
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(shift_hue(image, shift)), np.asarray(torchvision.adjust_hue(image, shift)))


def test_both_views_share_the_crop(pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "color_jitter", lambda pixels, _rng: np.asarray(pixels))
    for seed in range(6):
        views = make_views(pixels, (10.0, 10.0, 30.0, 20.0), cropping(), np.random.default_rng(seed))
        assert np.array_equal(views.student, views.teacher)


def test_only_the_student_gets_color_augmentation(pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = make_views(pixels, (10.0, 10.0, 30.0, 20.0), cropping(), np.random.default_rng(3)).teacher
    monkeypatch.setattr(augment, "color_jitter", lambda pixels, _rng: 255 - np.asarray(pixels))
    views = make_views(pixels, (10.0, 10.0, 30.0, 20.0), cropping(), np.random.default_rng(3))
    assert np.array_equal(views.teacher, clean)
    assert np.array_equal(views.student, 255 - clean)


def test_equal_seeds_give_equal_samples(pixels: np.ndarray) -> None:
    first, second = (
        make_views(pixels, (10.0, 10.0, 30.0, 20.0), cropping(), np.random.default_rng(5)) for _ in range(2)
    )
    for name in ("student", "teacher", "box_mask"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert first.mask is second.mask is None


def test_a_flip_mirrors_the_mask_with_the_image() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[10:30, 5:15] = 255
    for seed in range(8):
        views = make_views(image, (5.0, 10.0, 10.0, 20.0), cropping(), np.random.default_rng(seed))
        bright = views.teacher[..., 0] > 128
        assert np.mean(bright == views.box_mask.astype(bool)) > 0.93


def test_the_box_mask_wraps_around_only_under_tao() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    box = (0.0, 0.0, 20.0, 20.0)
    for seed in range(5):
        wrapped = make_views(image, box, cropping(Compat.TAO), np.random.default_rng(seed)).box_mask
        plain = make_views(image, box, cropping(), np.random.default_rng(seed)).box_mask
        assert wrapped.all()
        assert not plain.all()


def test_augmentation_probabilities_are_the_published_ones(pixels: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    results = [color_jitter(pixels, rng) for _ in range(400)]
    unchanged = np.mean([np.array_equal(result, pixels) for result in results])
    gray = np.mean([bool((np.ptp(result, axis=2) == 0).all()) for result in results])
    assert unchanged == pytest.approx(0.5 * 0.8 * 0.5, abs=0.07)
    assert gray == pytest.approx(0.2, abs=0.06)


def test_without_color_augmentation_both_views_are_equal() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    without_colors = Cropping(32, (0.0, 1.2), Compat.NONE, colors=False)
    for seed in range(8):
        views = make_views(pixels, (10.0, 10.0, 40.0, 30.0), without_colors, np.random.default_rng(seed))
        np.testing.assert_array_equal(views.student, views.teacher)
