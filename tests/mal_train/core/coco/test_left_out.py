"""Tests of the rows that a command names."""

from mal_train.core.coco.left_out import LISTED, LeftOut


def test_every_reason_has_an_example_however_many_there_are() -> None:
    rows = LeftOut()
    reasons = [f"REASON_{number}" for number in range(LISTED + 2)]
    for reason in reasons:
        for number in range(2):
            rows.add(reason, f"annotation {number}: {reason}")
    assert [text.partition(": ")[0] for text in rows.examples()] == reasons
