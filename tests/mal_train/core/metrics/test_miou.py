"""Mean IoU by size and by class."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_train.core.metrics.miou import GroupMiou, InstanceIoU, mean_iou


def instance(iou: float, *, category_id: Any = 1, area: int = 100, box_area: float = 100.0) -> InstanceIoU:
    return InstanceIoU(0, 0, category_id, iou, 0.5, area, box_area)


class TestMiou:
    def test_sizes_follow_the_mask_and_published_sizes_the_box(self) -> None:
        result = mean_iou([instance(0.25, area=1024, box_area=1025.0), instance(0.75, area=9217, box_area=9216.0)])
        assert result.by_size == {
            "small": GroupMiou(1, 0.25),
            "medium": GroupMiou(0, None),
            "large": GroupMiou(1, 0.75),
        }
        assert result.class_mean_by_box_size == {"small": None, "medium": 0.5, "large": None}

    def test_overall_is_over_instances_and_class_mean_over_classes(self) -> None:
        result = mean_iou([instance(0.0), instance(1.0), instance(1.0, category_id="b")])
        assert result.overall.miou == pytest.approx(2 / 3)
        assert result.class_mean == 0.75

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 20_000)), min_size=1, max_size=30))
    def test_overall_is_the_count_weighted_mean_of_the_sizes(self, rows: list[tuple[float, int]]) -> None:
        result = mean_iou([instance(iou, area=area) for iou, area in rows])
        weighted = sum((group.miou or 0.0) * group.count for group in result.by_size.values())
        assert weighted / result.overall.count == pytest.approx(result.overall.miou)
