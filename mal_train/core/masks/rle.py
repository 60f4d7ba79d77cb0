"""Encodes masks as COCO RLE and validates untrusted RLE.

pycocotools defines the format, and its C code compresses. It trusts what it reads: runs count modulo 2^32, runs of no
pixels end a comparison early, and a code of another sum hangs it or makes it read beyond its memory. So a code from
outside is decoded and checked here first, and rewritten if it has runs of no pixels. An `Rle` is such a checked code.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from mal_train.core.errors import BadDataset
from mal_train.core.images.header import MAX_FRAME_PIXELS
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.rasterize import TooManyCrossings, polygon_bounds, union
from mal_train.core.masks.run_lengths import RUN_BYTES, joined_run_lengths, run_lengths

MAX_PIXELS = MAX_FRAME_PIXELS
"""Maximum height·width of untrusted RLE."""
MAX_DECODED_PIXELS = 400_000_000
"""Maximum pixels of a decoded mask, a byte each; masks of larger images are decoded to their tight crop."""
MAX_RUNS = 1 << 19
"""Maximum runs of an untrusted mask, and pixel columns that its polygons cross; real masks have thousands."""
MAX_POINTS = 1 << 18
"""Maximum points of the polygons of an untrusted mask."""

_JOINED_BYTES = 1 << 18
"""Bytes of codes that are checked together, some megabytes of memory; a single code may exceed it."""
_DRAWN_POINTS = 1 << 20
"""Maximum points, estimated from above, that pycocotools draws for a polygon: 16 MB and some milliseconds."""


@dataclass(frozen=True)
class Rle:
    """COCO RLE of a mask of height x width px; `counts` is the compressed column-major run-length string.

    Its runs fill the frame, and only the first may be 0. `from_coco` checks codes from outside.
    """

    height: int
    width: int
    counts: bytes

    def to_coco(self) -> dict[str, Any]:
        """Returns the JSON object of COCO files: `{"size": [h, w], "counts": str}`."""
        return {"size": [self.height, self.width], "counts": self.counts.decode("ascii")}

    def packed(self) -> dict[str, Any]:
        """Returns the argument of pycocotools' functions; shares the bytes of `counts`."""
        return {"size": [self.height, self.width], "counts": self.counts}

    @classmethod
    def from_coco(cls, code: Any, name: str = "mask") -> "Rle":
        """Reads compressed or uncompressed RLE and checks that its runs fill the frame exactly.

        Raises:
            BadDataset: not RLE, a frame above MAX_PIXELS, more than MAX_RUNS runs, or runs that do not sum to
                height·width.
        """
        if not isinstance(code, dict) or "counts" not in code or "size" not in code:
            raise BadDataset(f"{name}: not COCO RLE; it must be an object with 'size' and 'counts'")
        height, width = _checked_size(code["size"], name)
        counts = code["counts"]
        if isinstance(counts, list):
            return encode_runs(counts, height, width, name)
        if isinstance(counts, str):
            try:
                counts = counts.encode("ascii")
            except UnicodeEncodeError:
                raise BadDataset(f"{name}: counts has characters outside the RLE alphabet") from None
        if not isinstance(counts, bytes):
            raise BadDataset(f"{name}: counts is {type(counts).__name__}; it must be a string or a list of runs")
        runs = _checked_runs(counts, height, width, name, MAX_RUNS)
        return cls(height, width, counts) if runs[1:].all() else _merged(runs, height, width)


@dataclass(frozen=True, eq=False)
class MaskPatch:
    """Tight crop of a mask.

    Attributes:
        mask: (h, w) bool; (0, 0) for an empty mask.
        row0: first image row of the crop.
        col0: first image column of the crop.
    """

    mask: NDArray[np.bool_]
    row0: int
    col0: int


def encode_mask(mask: NDArray[Any]) -> Rle:
    """Encodes a full-frame mask (H, W); non-zero is foreground.

    >>> encode_mask(np.eye(2)).to_coco()
    {'size': [2, 2], 'counts': '0120'}
    """
    height, width = mask.shape
    return encode_region(mask.astype(bool), 0, 0, (height, width))


def encode_region(mask_bool: NDArray[np.bool_], row0: int, col0: int, image_hw: tuple[int, int]) -> Rle:
    """Encodes a mask (h, w) bool at (row0, col0) of an image, without building the full frame.

    The result equals pycocotools' encoding of the full frame.

    Raises:
        ValueError: the region is not inside the image.
    """
    height, width = image_hw
    rows, columns = mask_bool.shape
    if row0 < 0 or col0 < 0 or row0 + rows > height or col0 + columns > width:
        raise ValueError(f"region {rows}x{columns} at row {row0}, column {col0} is not inside {height}x{width}")
    # A zero before each column and after the last ends the runs of every column, so that starts and ends pair up.
    guarded = np.zeros(columns * (rows + 1) + 1, dtype=np.bool_)
    guarded[:-1].reshape(columns, rows + 1)[:, 1:] = mask_bool.T
    edges = np.flatnonzero(guarded[1:] != guarded[:-1]) + 1
    # Starts and ends alternate; positions are column-major in the full frame.
    starts = _frame_position(edges[0::2], rows, row0, col0, height)
    ends = _frame_position(edges[1::2] - 1, rows, row0, col0, height) + 1
    if rows == height and starts.size:
        # A run that reaches the bottom continues in the next column if that begins with foreground.
        joined = starts[1:] == ends[:-1]
        starts = starts[np.concatenate(([True], ~joined))]
        ends = ends[np.concatenate((~joined, [True]))]
    return encode_bounds(starts, ends, height, width)


def encode_runs(runs: Sequence[int], height: int, width: int, name: str = "mask") -> Rle:
    """Encodes column-major run lengths in px; the first run is background.

    Raises:
        BadDataset: a run is no integer of 0 … height·width, more than MAX_RUNS runs, or they do not sum to
            height·width.
    """
    pixels = height * width
    _check_run_count(len(runs), min(MAX_RUNS, pixels + 1), name)
    if not all(isinstance(run, int) and not isinstance(run, bool) and 0 <= run <= pixels for run in runs):
        raise BadDataset(f"{name}: runs must be integers from 0 to the {pixels} px of the frame")
    _check_sum(sum(runs), pixels, name)
    checked = np.asarray(runs, dtype=np.int64)
    return _compress(checked, height, width) if checked[1:].all() else _merged(checked, height, width)


def decode_mask(rle: Rle) -> NDArray[np.bool_]:
    """Decodes to the full frame, (H, W) bool.

    Raises:
        BadDataset: a code that `Rle.from_coco` rejects, or a frame above MAX_DECODED_PIXELS.
    """
    _check_decoded(rle.height, rle.width, "use the tight crop (BoxLabel.png_crop) or the code")
    patch = decode_patch(rle)
    rows, columns = patch.mask.shape
    mask = np.zeros((rle.height, rle.width), dtype=np.bool_)
    mask[patch.row0 : patch.row0 + rows, patch.col0 : patch.col0 + columns] = patch.mask
    return mask


def decode_patch(rle: Rle) -> MaskPatch:
    """Decodes to the tight crop, without building the full frame.

    Raises:
        BadDataset: a code that `Rle.from_coco` rejects, or a crop above MAX_DECODED_PIXELS.
    """
    height, width = _checked_size((rle.height, rle.width), "mask")
    bounds = np.cumsum(_checked_runs(rle.counts, height, width, "mask", height * width + 1))
    starts, ends = bounds[0:-1:2], bounds[1::2]
    starts, ends = starts[starts < ends], ends[starts < ends]
    if not starts.size:
        return MaskPatch(np.zeros((0, 0), dtype=np.bool_), 0, 0)
    (first_column, first_row), (last_column, last_row) = np.divmod(starts, rle.height), np.divmod(ends - 1, rle.height)
    row0, row1 = int(first_row.min()), int(last_row.max()) + 1
    if np.any(first_column != last_column):
        # A run that continues in the next column reaches the bottom and restarts at the top.
        row0, row1 = 0, rle.height
    col0, col1, rows = int(first_column[0]), int(last_column[-1]) + 1, row1 - row0
    _check_decoded(rows, col1 - col0, "use the code")
    # Each bound flips all later pixels in column-major order.
    flips = np.zeros((col1 - col0) * rows + 1, dtype=np.uint8)
    flips[(first_column - col0) * rows + first_row - row0] ^= 1
    flips[(last_column - col0) * rows + last_row - row0 + 1] ^= 1
    columns = np.bitwise_xor.accumulate(flips[:-1]).reshape(col1 - col0, rows)
    return MaskPatch(np.ascontiguousarray(columns.T).view(np.bool_), row0, col0)


def _check_decoded(height: int, width: int, remedy: str) -> None:
    if height * width > MAX_DECODED_PIXELS:
        raise BadDataset(f"mask: {width}x{height} px; {MAX_DECODED_PIXELS} px are decoded at most; {remedy}")


def area(rle: Rle) -> int:
    """Returns the number of foreground pixels."""
    return int(coco_mask.area(rle.packed()))


def to_box(rle: Rle) -> Box | None:
    """Returns the tight box of the mask; None for an empty mask."""
    x, y, w, h = (float(v) for v in coco_mask.toBbox(rle.packed()))
    return (x, y, w, h) if w > 0 and h > 0 else None


def iou(a: Rle, b: Rle) -> float:
    """Returns the intersection over union in [0, 1] of two masks of one image; 0 if both are empty."""
    if (a.height, a.width) != (b.height, b.width):
        raise ValueError(f"masks of different frames: {a.height}x{a.width} and {b.height}x{b.width}")
    return float(coco_mask.iou([a.packed()], [b.packed()], [0])[0, 0])


def from_segmentation(segmentation: Any, height: int, width: int, name: str = "annotation") -> Rle:
    """Encodes any COCO `segmentation`: polygons (their union), uncompressed or compressed RLE.

    Polygons of fewer than three points, which some exporters leave behind, are ignored beside others.

    Raises:
        BadDataset: empty, malformed, or a frame other than height x width; the message begins with `name`.
    """
    if isinstance(segmentation, dict):
        rle = Rle.from_coco(segmentation, name)
        if (rle.height, rle.width) != (height, width):
            raise BadDataset(f"{name}: mask of {rle.width}x{rle.height} px on an image of {width}x{height} px")
        return rle
    if not isinstance(segmentation, list) or not segmentation:
        found = reprlib.repr(segmentation) if segmentation else "empty"
        raise BadDataset(f"{name}: segmentation is {found}; it must be polygons or RLE")
    _checked_size([height, width], name)
    # Before any point is looked at; other types are rejected below.
    if sum(len(polygon) for polygon in segmentation if isinstance(polygon, list)) > 2 * MAX_POINTS:
        raise BadDataset(f"{name}: polygons of more than {MAX_POINTS} points")
    polygons = [_checked_polygon(polygon, name) for polygon in segmentation if not _is_too_short(polygon)]
    if not polygons:
        raise BadDataset(f"{name}: no polygon has three points")
    points = sum(map(len, polygons)) // 2
    if len(polygons) == 1 and points * 5 * (max(polygons[0]) - min(polygons[0])) <= _DRAWN_POINTS:
        # The usual case, ten times faster there; the result is the same.
        return Rle(height, width, coco_mask.frPyObjects(polygons, height, width)[0]["counts"])
    try:
        return encode_bounds(*polygon_bounds(polygons, height, width, MAX_RUNS), height, width)
    except TooManyCrossings as error:
        raise BadDataset(f"{name}: polygons cross {error} pixel columns; the limit is {MAX_RUNS}") from None


def ignored_polygons(segmentation: Any) -> int:
    """Returns the number of polygons that `from_segmentation` ignores, since they have fewer than three points."""
    return sum(map(_is_too_short, segmentation)) if isinstance(segmentation, list) else 0


def read_codes(codes: Sequence[tuple[int, int, bytes]], name: str = "mask") -> list[Rle | BadDataset]:
    """Reads and checks compressed codes as `Rle.from_coco` does, many in a fraction of the time.

    Args:
        codes: (height, width, counts) of each mask.
        name: begins the text of an error.

    Returns:
        The mask of each code, or its error.
    """
    results: list[Rle | BadDataset] = []
    start = 0
    while start < len(codes):
        end, size = start, 0
        while end < len(codes) and (end == start or size + len(codes[end][2]) <= _JOINED_BYTES):
            size += len(codes[end][2])
            end += 1
        part = codes[start:end]
        results += _plain(part) or [_read_code(*code, name) for code in part]
        start = end
    return results


def _plain(codes: Sequence[tuple[int, int, bytes]]) -> list[Rle | BadDataset]:
    """Checks codes together; returns none of them if one is wrong or has runs of no pixels."""
    if len(codes) == 1 or not all(
        height > 0 and width > 0 and height * width <= MAX_PIXELS and 0 < len(counts) <= RUN_BYTES * MAX_RUNS
        for height, width, counts in codes
    ):
        return []
    try:
        runs, starts = joined_run_lengths([counts for _, _, counts in codes])
    except BadDataset:
        return []
    pixels = np.array([height * width for height, width, _ in codes], dtype=np.int64)
    has_pixels = runs > 0
    has_pixels[starts[:-1]] = True  # only the first run may be 0
    is_right = (
        (np.add.reduceat(runs, starts[:-1], dtype=np.float64) == pixels)
        & (np.diff(starts) <= np.minimum(MAX_RUNS, pixels + 1))
    ).all() and has_pixels.all()
    return [Rle(*code) for code in codes] if is_right else []


def _read_code(height: int, width: int, counts: bytes, name: str) -> Rle | BadDataset:
    try:
        return Rle.from_coco({"size": [height, width], "counts": counts}, name)
    except BadDataset as error:
        return error


def _checked_runs(counts: bytes, height: int, width: int, name: str, max_runs: int) -> NDArray[np.int64]:
    """Decodes a compressed string; raises BadDataset if it has more than `max_runs` runs or does not fill the frame."""
    pixels = height * width
    limit = min(max_runs, pixels + 1)
    if len(counts) > RUN_BYTES * limit:
        raise BadDataset(f"{name}: counts has {len(counts)} bytes; {limit} runs on {pixels} px need fewer")
    runs = run_lengths(counts, name)
    _check_run_count(runs.size, limit, name)
    # As floats, which cannot wrap around to the right number and are exact up to 2^53, far above MAX_PIXELS.
    _check_sum(int(runs.sum(dtype=np.float64)), pixels, name)
    return runs


def _check_run_count(runs: int, limit: int, name: str) -> None:
    if runs > limit:
        raise BadDataset(f"{name}: {runs} runs; a mask of this size may have {limit}")


def _check_sum(total: int, pixels: int, name: str) -> None:
    if total != pixels:
        raise BadDataset(f"{name}: runs sum to {total} px; the frame has {pixels} px")


def _frame_position(
    guarded_index: NDArray[np.int64], rows: int, row0: int, col0: int, height: int
) -> NDArray[np.int64]:
    column, row_after_guard = np.divmod(guarded_index, rows + 1)
    return (column + col0) * height + row_after_guard - 1 + row0


def _merged(runs: NDArray[np.int64], height: int, width: int) -> Rle:
    """Encodes runs some of which have no pixels: joins their neighbors."""
    bounds = np.cumsum(runs)
    return encode_bounds(*union(bounds[0:-1:2], bounds[1::2]), height, width)


def encode_bounds(starts: NDArray[np.int64], ends: NDArray[np.int64], height: int, width: int) -> Rle:
    """Encodes foreground runs from `starts` to `ends`, column-major positions, ascending and apart from each other."""
    bounds = np.empty(2 * starts.size + 2, dtype=np.int64)
    bounds[0], bounds[-1] = 0, height * width
    bounds[1:-1:2], bounds[2:-1:2] = starts, ends
    runs = np.diff(bounds)
    if runs[-1] == 0 and runs.size > 1:
        runs = runs[:-1]
    return _compress(runs, height, width)


def _compress(runs: NDArray[np.int64], height: int, width: int) -> Rle:
    packed = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return Rle(height, width, packed["counts"])


def _checked_size(size: Any, name: str) -> tuple[int, int]:
    if (
        not isinstance(size, Sequence)
        or len(size) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size)
    ):
        raise BadDataset(f"{name}: size {reprlib.repr(size)}; it must be two positive integers, height and width")
    height, width = size
    if height * width > MAX_PIXELS:
        raise BadDataset(f"{name}: a frame above the limit of {MAX_PIXELS} px")
    return height, width


def _is_too_short(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) in (0, 2, 4) and not any(isinstance(v, list) for v in polygon)


def _checked_polygon(polygon: Any, name: str) -> list[float]:
    rule = "each polygon must be a flat list x, y, x, y, … of at least three points"
    if not isinstance(polygon, list):
        raise BadDataset(f"{name}: segmentation has {reprlib.repr(polygon)} in place of a polygon; {rule}")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e6 for v in polygon):
        raise BadDataset(f"{name}: polygon {reprlib.repr(polygon)} has a value that is no coordinate in px; {rule}")
    if len(polygon) < 6 or len(polygon) % 2:
        raise BadDataset(f"{name}: a polygon of {len(polygon)} values; {rule}")
    return [float(v) for v in polygon]
