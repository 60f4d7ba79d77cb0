import pytest

from mal_train.core.settings import Compat
from mal_train.training.schedule import CosineSchedule, ramp


def test_the_rate_starts_small_and_ends_at_the_floor() -> None:
    schedule = CosineSchedule(peak=1.0, floor=0.1, warmup_epochs=1, num_epochs=4)
    rates = [schedule.at_step(step, 10, Compat.NONE) for step in range(40)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_warm_up_may_be_a_fraction_of_an_epoch() -> None:
    schedule = CosineSchedule(peak=1.0, floor=0.0, warmup_epochs=0.5, num_epochs=4)
    assert schedule.at_epoch(0.25) == pytest.approx(0.5)
    assert schedule.at_epoch(0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [1, 3])
def test_a_warm_up_as_long_as_the_training_does_not_divide_by_zero(warmup: float) -> None:
    schedule = CosineSchedule(peak=1.0, floor=0.1, warmup_epochs=warmup, num_epochs=1)
    assert 0 < schedule.at_step(9, 10, Compat.NONE) <= 1.0


def test_two_half_waves_fall_and_rise() -> None:
    schedule = CosineSchedule(peak=1.0, floor=0.0, warmup_epochs=0, num_epochs=2, num_wave=2)
    assert schedule.at_epoch(1) == pytest.approx(0.0)
    assert schedule.at_epoch(2) == pytest.approx(1.0)


def test_ramps_continue_over_epochs() -> None:
    assert [ramp(step, 4, 2, Compat.NONE) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert ramp(0, 0, 2, Compat.NONE) == 1.0


def test_published_ramps_start_at_zero_and_end_with_epoch_0() -> None:
    assert [ramp(step, 4, 2, Compat.TAO) for step in range(3)] == [0.0, 0.25, 1.0]
