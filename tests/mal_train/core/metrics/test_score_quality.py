"""Quality of a score: ranks, calibration, the worst-scored share."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_train.core.metrics.score_quality import bad_in_worst, calibration_error, score_quality, spearman


class TestScoreQuality:
    def test_spearman_gives_ties_their_mean_rank(self) -> None:
        # By hand: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4.
        assert spearman([1, 2, 2, 3], [1, 5, 4, 9]) == pytest.approx(0.9486832980505138)

    def test_a_constant_score_has_no_rank_correlation(self) -> None:
        assert spearman([1, 1, 1], [1, 2, 3]) is None
        assert spearman([1], [1]) is None
        assert spearman([], []) is None

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.lists(st.integers(-50, 50), min_size=2, max_size=30, unique=True))
    def test_spearman_depends_only_on_the_order(self, values: list[int]) -> None:
        assert spearman(values, [math.exp(v / 10) for v in values]) == pytest.approx(1.0)
        assert spearman(values, [-(v**3) for v in values]) == pytest.approx(-1.0)

    def test_calibration_error_weights_bins_by_size(self) -> None:
        assert calibration_error([0.05, 0.95, 0.95, 1.0], [0.05, 0.45, 0.45, 0.5]) == pytest.approx(0.375)
        assert calibration_error([], []) is None

    def test_scores_tied_at_the_border_of_the_worst_fifth_count_in_part(self) -> None:
        scores = [0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
        bad = [True, True, False, False, True, True, False, False, False, False]
        assert bad_in_worst(scores, bad, 0.2) == pytest.approx(0.25)

    def test_without_a_bad_mask_the_share_is_undefined(self) -> None:
        assert bad_in_worst([0.1, 0.2], [False, False], 0.2) is None

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=20), st.randoms())
    def test_the_worst_share_does_not_depend_on_the_order(self, rows: list[tuple[int, bool]], shuffler: Any) -> None:
        shuffled = list(rows)
        shuffler.shuffle(shuffled)
        shares = [bad_in_worst([r[0] for r in o], [r[1] for r in o], 0.2) for o in (rows, shuffled)]
        assert shares[0] == pytest.approx(shares[1]) if shares[0] is not None else shares[1] is None

    def test_bias_is_positive_when_scores_are_too_high(self) -> None:
        quality = score_quality([0.9, 0.8], [0.4, 0.8])
        assert quality.bias == pytest.approx(0.25)
        assert quality.bad_count == 1


def test_scores_outside_the_unit_interval_are_in_its_first_and_last_bin() -> None:
    inside = calibration_error([0.0, 0.05, 1.0, 0.95], [0.5, 0.5, 0.5, 0.5])
    assert inside == pytest.approx(0.475)
    assert calibration_error([-1e9, 1e9], [-1e9, 1e9]) == 0.0
    assert calibration_error([-1e300, 1e300], [-1e300, 1e300]) == 0.0
