"""COCO RLE: equality with pycocotools, and rejection of malformed RLE."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.masks.rle import Rle
from mal_train.core.masks.run_lengths import joined_run_lengths, run_lengths
from tests.mal_train.core.masks.hostile_runs import compressed, wrapping_runs


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_the_rle_of_a_region_equals_pycocotools_on_the_full_frame(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    rows = height if rng.random() < 0.3 else rng.integers(1, height + 1)
    columns = rng.integers(1, width + 1)
    row0, col0 = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
    mask = rng.random((rows, columns)) < rng.choice([0, 0.1, 0.5, 0.95, 1])
    full = np.zeros((height, width), np.uint8)
    full[row0 : row0 + rows, col0 : col0 + columns] = mask
    code = rle.encode_region(mask, int(row0), int(col0), (int(height), int(width)))
    assert code.counts == coco_mask.encode(np.asfortranarray(full))["counts"]
    np.testing.assert_array_equal(rle.decode_mask(code), full.astype(bool))
    assert rle.area(code) == full.sum()
    runs = run_lengths(code.counts)
    np.testing.assert_array_equal(np.repeat(np.arange(runs.size) % 2, runs), full.T.ravel())


def test_a_region_outside_the_frame_is_rejected() -> None:
    with pytest.raises(ValueError, match="row 2, column 0"):
        rle.encode_region(np.ones((3, 3), bool), 2, 0, (4, 4))


def test_an_empty_mask_has_no_box_and_no_overlap() -> None:
    empty = rle.encode_mask(np.zeros((5, 7)))
    assert rle.to_box(empty) is None
    assert rle.area(empty) == 0
    assert rle.iou(empty, empty) == 0.0


def test_rle_survives_a_round_trip_through_coco_json() -> None:
    code = rle.encode_mask(np.eye(9))
    assert Rle.from_coco(code.to_coco()) == code
    assert Rle.from_coco({"size": [9, 9], "counts": run_lengths(code.counts).tolist()}) == code


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ({"size": [5, 5], "counts": b"\xff\xff\xff"}, "counts"),
        ({"size": [5, 5], "counts": "é"}, "counts"),
        ({"size": [5, 5], "counts": "0120"}, "4 px"),
        ({"size": [5, 5], "counts": "o"}, "truncated"),
        ({"size": [5, 5], "counts": "ooooooo1"}, "longer"),
        ({"size": [5, 5], "counts": "o" * 20 + "1"}, "longer"),
        ({"size": [2, 2], "counts": "61J"}, "negative"),
        ({"size": [100000, 100000], "counts": "0"}, "1073741824 px"),
        ({"size": [5, 5], "counts": [25, -3, 3]}, "runs"),
        ({"size": [5, 5], "counts": [1, 2]}, "3 px"),
        ({"size": [0, 5], "counts": "0"}, r"size \[0, 5\]"),
        ({"size": [5, 5]}, "'size' and 'counts'"),
        ("0120", "'size' and 'counts'"),
        ({"size": [2, 2], "counts": "4" + "0" * 5}, "6 runs"),
        ({"size": [2, 2], "counts": [4] + [0] * 5}, "6 runs"),
        ({"size": [5, 5], "counts": [2**64 + 25]}, "runs"),
        ({"size": [5, 5], "counts": [25.0]}, "runs"),
        ({"size": [5, 5], "counts": [True, 24]}, "runs"),
        ({"size": [5, 5], "counts": []}, "0 px"),
        ({"size": [5, 5], "counts": ""}, "0 px"),
        ({"size": [10**300, 10**300], "counts": [25]}, "1073741824 px"),
        ({"size": [True, 25], "counts": [25]}, "size"),
        ({"size": [math.nan, 25], "counts": [25]}, "size"),
        ({"size": "55", "counts": [25]}, "size"),
        ({"size": [["x"] * 10**5, 5], "counts": "I"}, "size"),
    ],
)
def test_malformed_rle_is_rejected_by_name(code: object, named: str) -> None:
    with pytest.raises(BadDataset, match="annotation 3.*" + named):
        Rle.from_coco(code, "annotation 3")


@pytest.mark.parametrize("seed", range(20))
def test_runs_whose_sum_wraps_around_64_bits_are_rejected(seed: int) -> None:
    runs = wrapping_runs(np.random.default_rng(seed), 16 * 16)
    assert sum(runs) > 2**63
    assert int(np.array(runs).sum()) == 16 * 16
    code = Rle(16, 16, compressed(runs))
    with pytest.raises(BadDataset):
        Rle.from_coco({"size": [16, 16], "counts": code.counts})
    with pytest.raises(BadDataset):
        Rle.from_coco({"size": [16, 16], "counts": runs})
    for decode in (rle.decode_mask, rle.decode_patch):
        with pytest.raises(BadDataset):
            decode(code)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_no_code_with_another_sum_passes_or_breaks_decoding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 12, 2))
    runs = [int(run) << int(rng.choice([0, 0, 0, 20, 32, 40])) for run in rng.integers(0, 9, rng.integers(1, 9))]
    code, fits = compressed(runs), sum(runs) == height * width
    for counts in (code, runs):
        if fits:
            expected = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
            np.testing.assert_array_equal(
                rle.decode_mask(Rle.from_coco({"size": [height, width], "counts": counts})), expected
            )
        else:
            with pytest.raises(BadDataset):
                Rle.from_coco({"size": [height, width], "counts": counts})


def test_a_code_that_cannot_be_decoded_is_an_error_of_the_input() -> None:
    for broken in (Rle(0, 5, b"0"), Rle(5, 5, b"o"), Rle(5, 5, b""), Rle(5, 5, b"\xff"), Rle(2**31, 2**31, b"0")):
        for decode in (rle.decode_mask, rle.decode_patch):
            with pytest.raises(BadDataset):
                decode(broken)


@pytest.mark.parametrize(
    "counts", [[5, 3, 0, 2, 6], [4, 0, 4, 8], [16, 0], [5, 0, 11], [0, 0, 0, 16], [3, 2, 0, 0, 11]]
)
def test_runs_without_pixels_give_the_code_of_the_same_mask_without_them(counts: list[int]) -> None:
    mask = np.repeat(np.arange(len(counts)) % 2, counts).reshape(4, 4).T
    for form in (counts, compressed(counts)):
        code = Rle.from_coco({"size": [4, 4], "counts": form})
        assert code == rle.encode_mask(mask)
        assert rle.iou(code, code) == bool(mask.any())


def test_a_mask_of_too_many_runs_or_points_is_rejected_before_it_is_read() -> None:
    side = 1100
    assert side**2 > rle.MAX_RUNS + 1
    polygon, runs = [0.5] * (2 * rle.MAX_POINTS + 2), [1] * (rle.MAX_RUNS + 1)
    codes = [b"0" * (rle.MAX_RUNS * 7 + 1), runs, polygon]
    tracemalloc.start()
    try:
        for code in codes:
            segmentation = [code] if code is polygon else {"size": [side, side], "counts": code}
            with pytest.raises(BadDataset):
                rle.from_segmentation(segmentation, side, side)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 16


def test_polygons_are_merged_and_malformed_ones_rejected() -> None:
    square = rle.from_segmentation([[0, 0, 4, 0, 4, 4, 0, 4], [6, 6, 8, 6, 8, 8, 6, 8]], 10, 10)
    assert rle.area(square) == 16 + 4
    for broken in ([], [[0, 0, 1, 1]], [[0, 0, 1, 1, 2]], [[0, 0, 1, 1, 2, float("nan")]], None, "x"):
        with pytest.raises(BadDataset):
            rle.from_segmentation(broken, 10, 10)


@pytest.mark.parametrize(
    ("segmentation", "named"),
    [
        ("masks/1.png", "'masks/1.png'"),
        ([[[2, 3], [8, 3], [8, 9]]], "[2, 3]"),
        ([[[2, 3], [8, 3], [8, 9], [2, 9], [1, 5], [1, 4]]], "[2, 3]"),
        ([[2, 3, 8, 3, 8, None]], "None"),
    ],
)
def test_a_segmentation_of_another_form_is_named(segmentation: object, named: str) -> None:
    with pytest.raises(BadDataset) as caught:
        rle.from_segmentation(segmentation, 10, 10)
    assert named in str(caught.value)


def test_a_mask_of_another_frame_is_rejected() -> None:
    with pytest.raises(BadDataset, match=r"4x4 px.* 10x10 px"):
        rle.from_segmentation(rle.encode_mask(np.eye(4)).to_coco(), 10, 10)


def test_a_mask_of_a_frame_that_is_too_large_to_decode_is_decoded_to_its_crop() -> None:
    code = rle.encode_region(np.ones((20, 30), np.bool_), 29_000, 29_900, (30_000, 30_000))
    again = Rle.from_coco(code.to_coco())
    assert again == code
    patch = rle.decode_patch(again)
    assert (patch.mask.shape, patch.row0, patch.col0) == ((20, 30), 29_000, 29_900)
    assert rle.area(again) == 600
    assert rle.to_box(again) == (29_900.0, 29_000.0, 30.0, 20.0)
    with pytest.raises(BadDataset):
        rle.decode_mask(again)
    everything = Rle.from_coco({"size": [30_000, 30_000], "counts": [0, 900_000_000]})
    with pytest.raises(BadDataset):
        rle.decode_patch(everything)


def random_code(rng: np.random.Generator) -> tuple[int, int, bytes]:
    """Returns height, width and counts of a code; some are wrong or have runs of no pixels."""
    height, width = (int(side) for side in rng.integers(1, 40, 2))
    counts = rle.encode_mask(rng.random((height, width)) < rng.choice([0, 0.1, 0.5, 1])).counts
    match int(rng.integers(0, 24)):
        case 0:
            counts = b""
        case 1:
            counts = counts[:-1]
        case 2:
            counts += b"P"
        case 3:
            counts = bytes([*counts[:-1], 255])
        case 4:
            height += 1
        case 5:
            counts = compressed([1, 0, height * width - 1])
        case 6:
            height, width = 0, -3
    return height, width, counts


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_codes_read_together_are_those_read_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = [random_code(rng) for _ in range(int(rng.integers(0, 9)))]
    together = rle.read_codes(codes)
    assert len(together) == len(codes)
    for (height, width, counts), found in zip(codes, together, strict=True):
        code = {"size": [height, width], "counts": counts}
        if isinstance(found, BadDataset):
            with pytest.raises(BadDataset):
                Rle.from_coco(code)
        else:
            assert found == Rle.from_coco(code)


def test_one_wrong_code_spoils_no_other() -> None:
    good = rle.encode_mask(np.eye(9))
    wrong = 9, 9, compressed(wrapping_runs(np.random.default_rng(0), 81))
    results = rle.read_codes([(9, 9, good.counts), wrong, (9, 9, good.counts)])
    assert results[0] == results[2] == good
    assert isinstance(results[1], BadDataset)


def test_codes_are_joined_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    code = rle.encode_mask(np.eye(30))
    joined: list[int] = []

    def counted(codes: list[bytes]) -> object:
        joined.append(len(codes))
        return joined_run_lengths(codes)

    monkeypatch.setattr(rle, "joined_run_lengths", counted)
    monkeypatch.setattr(rle, "_JOINED_BYTES", 3 * len(code.counts))
    assert rle.read_codes([(30, 30, code.counts)] * 8) == [code] * 8
    assert joined == [3, 3, 2]


def test_joined_run_lengths_are_those_of_each_code() -> None:
    rng = np.random.default_rng(0)
    codes = [rle.encode_mask(rng.random((20, 30)) < 0.5).counts for _ in range(7)]
    runs, starts = joined_run_lengths(codes)
    for n, code in enumerate(codes):
        np.testing.assert_array_equal(runs[starts[n] : starts[n + 1]], run_lengths(code))
