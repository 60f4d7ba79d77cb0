import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as published

from mal_train.core.settings import Compat
from mal_train.data import augment
from mal_train.data.augment import Cropping, color_jitter, make_views, shift_hue


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)


def cropping(compat: Compat = Compat.NONE) -> Cropping:
    return Cropping(32, (0.0, 1.2), compat)


@pytest.mark.parametrize("turn", [-0.1, -0.003, 0.0, 0.07, 0.1])
def test_hue_turns_as_in_torchvision(picture: np.ndarray, turn: float) -> None:
    image = Image.fromarray(picture)
    assert np.array_equal(np.asarray(shift_hue(image, turn)), np.asarray(published.adjust_hue(image, turn)))


def test_both_views_show_the_same_place(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "disturb", lambda pixels, _rng: np.asarray(pixels))
    for seed in range(6):
        views = make_views(picture, (10.0, 10.0, 30.0, 20.0), cropping(), np.random.default_rng(seed))
        assert np.array_equal(views.student, views.teacher)


def test_only_the_student_is_disturbed(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = make_views(picture, (10.0, 10.0, 30.0, 20.0), cropping(), np.random.default_rng(3)).teacher
    monkeypatch.setattr(augment, "disturb", lambda pixels, _rng: 255 - np.asarray(pixels))
    views = make_views(picture, (10.0, 10.0, 30.0, 20.0), cropping(), np.random.default_rng(3))
    assert np.array_equal(views.teacher, clean)
    assert np.array_equal(views.student, 255 - clean)


def test_the_same_draws_give_the_same_sample(picture: np.ndarray) -> None:
    first, again = (
        make_views(picture, (10.0, 10.0, 30.0, 20.0), cropping(), np.random.default_rng(5)) for _ in range(2)
    )
    for name in ("student", "teacher", "box_mask"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.mask is again.mask is None


def test_a_flip_turns_the_mask_with_the_picture() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[10:30, 5:15] = 255
    for seed in range(8):
        views = make_views(image, (5.0, 10.0, 10.0, 20.0), cropping(), np.random.default_rng(seed))
        bright = views.teacher[..., 0] > 128
        assert np.mean(bright == views.box_mask.astype(bool)) > 0.93


def test_only_the_published_mask_wraps_round_with_the_picture() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    box = (0.0, 0.0, 20.0, 20.0)
    for seed in range(5):
        full = make_views(image, box, cropping(Compat.TAO), np.random.default_rng(seed)).box_mask
        cut = make_views(image, box, cropping(), np.random.default_rng(seed)).box_mask
        assert full.all()
        assert not cut.all()


def test_shares_of_the_disturbances_are_the_published_ones(picture: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    results = [color_jitter(picture, rng) for _ in range(400)]
    same = np.mean([np.array_equal(result, picture) for result in results])
    gray = np.mean([bool((np.ptp(result, axis=2) == 0).all()) for result in results])
    assert same == pytest.approx(0.5 * 0.8 * 0.5, abs=0.07)
    assert gray == pytest.approx(0.2, abs=0.06)


def test_without_color_augmentation_the_student_sees_what_the_teacher_sees() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    plain = Cropping(32, (0.0, 1.2), Compat.NONE, colors=False)
    for seed in range(8):
        views = make_views(picture, (10.0, 10.0, 40.0, 30.0), plain, np.random.default_rng(seed))
        np.testing.assert_array_equal(views.student, views.teacher)
