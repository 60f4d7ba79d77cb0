"""Implements all crop arithmetic: boxes to windows, windows to network inputs, probability maps to image pixels.

A box is x, y, width, height in px of the stored image, float64. A window is integer x0, y0, x1, y1 with an exclusive
end; it may extend beyond the image, which is repeated periodically there (§2.3 of the method).
"""

import math
import reprlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mal_train.core.errors import BadBox
from mal_train.core.settings import Compat

Box = tuple[float, float, float, float]
"""x, y, width, height."""

Pixels = NDArray[np.uint8]

STRIP_PIXELS = 2**20
"""Pixels of a strip in `paste`."""
STRIP_ALIGNMENT = 32
_BAND_PIXELS = 2**18
"""Pixels of a window that `resized_window` copies at a time: 1 MB in Pillow, which fits into the cache of a core."""
_PILLOW_BYTES = 4
"""Memory of a pixel in Pillow, gray images apart."""

_BILINEAR_REACH = 2.0
"""Pixels of the crop beyond the box that `paste` reads at most, one of them for rounding."""
_BICUBIC_REACH = 2.0
"""Half the width of the kernel of `resize_crop`, in pixels of the coarser of window and crop."""

_FAR = 1e18
"""Coordinates beyond this are taken as this, so that areas do not exceed the range of float32."""


class Window(NamedTuple):
    """Integer pixel window with an exclusive end; may extend beyond the image."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.y1 - self.y0


class Region(NamedTuple):
    """Half-open ranges of columns and rows inside an image; empty if an end does not exceed its start."""

    col0: int
    row0: int
    col1: int
    row1: int

    @property
    def is_empty(self) -> bool:
        """True if the region has no pixels."""
        return self.col1 <= self.col0 or self.row1 <= self.row0

    def contains(self, column: int, row: int) -> bool:
        """Returns True if the region has this pixel."""
        return self.col0 <= column < self.col1 and self.row0 <= row < self.row1


def check_box(box_xywh: Sequence[float], image_hw: tuple[int, int], name: str = "box") -> tuple[Box, bool]:
    """Clips a box to its image; returns the clipped box and True if it differs from the box.

    >>> check_box((-2, 0, 6, 4), (10, 10))
    ((0.0, 0.0, 4.0, 4.0), True)

    Raises:
        BadBox: not four finite numbers, no positive size, outside the image, or less than 1 px² inside.
    """
    height, width = image_hw
    if len(box_xywh) != 4 or not all(abs(v) <= sys.float_info.max for v in box_xywh):
        raise BadBox(f"{reprlib.repr(list(box_xywh))}; it must be four finite numbers x, y, width, height", name)
    x, y, w, h = (float(v) for v in box_xywh)
    if w <= 0 or h <= 0:
        raise BadBox(f"{w:g} x {h:g} px; width and height must be positive (a box is x, y, width, height)", name)
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if x1 <= x0 or y1 <= y0:
        raise BadBox(f"[{x:g}, {y:g}, {w:g}, {h:g}]; it must overlap its image of {width}x{height} px", name)
    if w * h < 1.0:
        raise BadBox(f"{w:g} x {h:g} px; the area must be at least 1 px²", name)
    if x0 == x and y0 == y and x1 == x + w and y1 == y + h:
        return (x, y, w, h), False
    if (x1 - x0) * (y1 - y0) < 1.0:
        raise BadBox(
            f"[{x:g}, {y:g}, {w:g}, {h:g}]; at least 1 px² must lie inside its image of {width}x{height} px", name
        )
    return (x0, y0, x1 - x0, y1 - y0), True


def box_area(box_xywh: Box) -> float:
    """Returns the area in px², computed from float32 corners as in the published code; size classes depend on it."""
    x0, y0, x1, y1 = _corners(box_xywh)
    return float((x1 - x0) * (y1 - y0))


def box_iou(a_xywh: Box, b_xywh: Box) -> float:
    """Returns the IoU of two boxes with positive sides.

    >>> box_iou((0, 0, 2, 2), (1, 0, 2, 2))
    0.3333333333333333
    """
    width = min(a_xywh[0] + a_xywh[2], b_xywh[0] + b_xywh[2]) - max(a_xywh[0], b_xywh[0])
    height = min(a_xywh[1] + a_xywh[3], b_xywh[1] + b_xywh[3]) - max(a_xywh[1], b_xywh[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    return intersection / (a_xywh[2] * a_xywh[3] + b_xywh[2] * b_xywh[3] - intersection)


def inference_window(box_xywh: Box, margin_rate: float) -> Window:
    """Returns the window of inference: the box grown by margin_rate/2 of its half extent on each side.

    >>> inference_window((100, 100, 100, 80), 0.6)
    Window(x0=85, y0=88, x1=216, y1=193)
    """
    side = 0.5 * margin_rate
    return train_window(box_xywh, (side, side, side, side))


def train_window(box_xywh: Box, margins: Sequence[float]) -> Window:
    """Returns the window for margins (left, top, right, bottom), each relative to the half extent (§2.3)."""
    x0, y0, x1, y1 = _corners(box_xywh)
    left, top, right, bottom = (np.float64(m) for m in margins)
    # float32 halves times float64 margins, as NumPy 2 evaluates the published expression.
    cx, cy = (x0 + x1) / np.float32(2), (y0 + y1) / np.float32(2)
    half_w, half_h = cx - x0, cy - y0
    return Window(
        math.floor(cx - half_w * (1 + left)),
        math.floor(cy - half_h * (1 + top)),
        math.ceil(cx + (x1 - cx) * (1 + right) + 1),
        math.ceil(cy + (y1 - cy) * (1 + bottom) + 1),
    )


def random_margins(rng: np.random.Generator, margin_rate: tuple[float, float]) -> tuple[float, float, float, float]:
    """Draws margins (left, top, right, bottom): u ⊙ (g₁, g₂, 1−g₁, 1−g₂), u in margin_rate, g in [0, 1)."""
    return margins_from(rng.random(4), rng.random(2), margin_rate)


def margins_from(
    u: NDArray[np.float64], g: NDArray[np.float64], margin_rate: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Returns the margins for given u (4 numbers) and g (2 numbers) in [0, 1), to replay published random numbers."""
    low, high = margin_rate
    scaled = low + u * (high - low)
    split = np.array([g[0], g[1], 1.0 - g[0], 1.0 - g[1]])
    left, top, right, bottom = (float(m) for m in scaled * split)
    return left, top, right, bottom


class Sliceable(Protocol):
    """Pixels that are read on access, such as `TiffReader`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width, and the number of bands if there are several."""

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        """Always uint8."""

    def __getitem__(self, region: tuple[slice, slice], /) -> Pixels:
        """Returns rows and columns."""


def cut(image: Pixels | Sliceable, window: Window) -> Pixels:
    """Returns the pixels of a window (h, w[, C]); outside the image, the image is repeated periodically.

    Wrapping instead of padding: the mean field compares neighboring pixels, and an artificial border would distort the
    refined mask.
    """
    height, width = image.shape[:2]
    if window.x0 >= 0 and window.y0 >= 0 and window.x1 <= width and window.y1 <= height:
        return image[window.y0 : window.y1, window.x0 : window.x1]
    # Slice by slice: this copies complete rows, unlike indexing with modulo coordinates.
    wrapped: Pixels = np.empty((window.height, window.width, *image.shape[2:]), image.dtype)
    for rows, image_rows in _periodic_slices(window.y0, window.y1, height):
        for columns, image_columns in _periodic_slices(window.x0, window.x1, width):
            wrapped[rows, columns] = image[image_rows, image_columns]
    return wrapped


def resize_crop(pixels: Pixels, size: int) -> Pixels:
    """Resizes pixels (h, w[, 3]) to (size, size[, 3]); ignores the aspect ratio (§2.3).

    Antialiased bicubic of Pillow in two passes, each with weights of 22 bits and rounded to uint8: first along the
    rows, or first along the columns if h > size and h − size > 2 (w − size). This is the order of Pillow 13; earlier
    versions always begin with the rows, so the passes are separate calls here.
    """
    return resized_window(pixels, Window(0, 0, pixels.shape[1], pixels.shape[0]), size)


def resized_window(image: Pixels, window: Window, size: int) -> Pixels:
    """Returns `resize_crop(cut(image, window), size)` without a copy of the window.

    Takes `resizing_bytes` of memory.
    """
    columns_first = _columns_first(window, size)
    half_wh = (window.width, size) if columns_first else (size, window.height)
    half = Image.new("RGB" if image.ndim == 3 else "L", half_wh, color=None)
    for band in _bands(window, columns_first=columns_first):
        pixels = Image.fromarray(np.ascontiguousarray(cut(image, band)))
        band_wh = (band.width, size) if columns_first else (size, band.height)
        half.paste(pixels.resize(band_wh, Image.Resampling.BICUBIC), (band.x0 - window.x0, band.y0 - window.y0))
    return np.asarray(half.resize((size, size), Image.Resampling.BICUBIC))


def resizing_bytes(window: Window, size: int) -> int:
    """Returns an upper bound of the memory of `resized_window`: a band before and after, and the passes' results."""
    columns_first = _columns_first(window, size)
    across, along = (window.width, window.height) if columns_first else (window.height, window.width)
    band_pixels = min(_lines_of_band(along), across) * (2 * along + size)
    return _PILLOW_BYTES * (band_pixels + size * (across + 2 * size))


def _columns_first(window: Window, size: int) -> bool:
    return window.height > size and window.height - size > 2 * (window.width - size)


def _bands(window: Window, *, columns_first: bool) -> Iterator[Window]:
    """Splits a window into bands of complete columns or of complete rows."""
    x0, y0, x1, y1 = window
    if columns_first:
        step = _lines_of_band(window.height)
        yield from (Window(x, y0, min(x + step, x1), y1) for x in range(x0, x1, step))
    else:
        step = _lines_of_band(window.width)
        yield from (Window(x0, y, x1, min(y + step, y1)) for y in range(y0, y1, step))


def _lines_of_band(length: int) -> int:
    return max(_BAND_PIXELS // length, 1)


def box_pixels(box_xywh: Box, image_hw: tuple[int, int]) -> Region:
    """Returns the pixels whose centers lie in the box: columns ceil(x − ½) … ceil(x + w − ½) − 1, rows likewise.

    >>> box_pixels((0.6, 0.0, 2.0, 1.4), (10, 10))
    Region(col0=1, row0=0, col1=3, row1=1)
    """
    x, y, w, h = box_xywh
    height, width = image_hw
    return Region(
        max(math.ceil(x - 0.5), 0),
        max(math.ceil(y - 0.5), 0),
        min(math.ceil(x + w - 0.5), width),
        min(math.ceil(y + h - 0.5), height),
    )


def inclusive_pixels(box_xywh: Box, image_hw: tuple[int, int]) -> Region:
    """Returns the box pixels of the published code: truncated corners, both ends inclusive (§2.2)."""
    x0, y0, x1, y1 = (int(v) for v in _corners(box_xywh))
    height, width = image_hw
    return Region(max(x0, 0), max(y0, 0), min(x1 + 1, width), min(y1 + 1, height))


def box_mask_in_window(
    box_xywh: Box, window: Window, image_hw: tuple[int, int], size: int, compat: Compat, *, wrap: bool = False
) -> Pixels:
    """Returns the box as a 0/1 mask of the crop, (size, size) uint8.

    Args:
        box_xywh: box inside the image.
        window: window of the crop.
        image_hw: height and width of the image.
        size: side of the crop in px.
        compat: clip rule: pixel centers (none) or inclusive truncated corners (tao).
        wrap: include periodic copies of the box, as the published training does.
    """
    region = (inclusive_pixels if compat is Compat.TAO else box_pixels)(box_xywh, image_hw)
    columns = _membership(window.x0, window.x1, region.col0, region.col1, image_hw[1] if wrap else None)
    rows = _membership(window.y0, window.y1, region.row0, region.row1, image_hw[0] if wrap else None)
    return resize_crop(rows[:, None] & columns[None, :], size)


def pixels_of_mask(box_xywh: Box, window: Window, image_hw: tuple[int, int], size: int, compat: Compat) -> Region:
    """Returns a region of the crop (size, size) that contains all pixels on which the mask of a box depends.

    These are the pixels of `box_mask_in_window` and those that `paste` reads for the mask's region.
    """
    if compat is Compat.TAO:
        box, reach_px = inclusive_pixels(box_xywh, image_hw), _BICUBIC_REACH
    else:
        box, reach_px = box_pixels(box_xywh, image_hw), 0.0

    def bounds(start: int, stop: int, length: int) -> tuple[int, int]:
        scale = size / length
        reach = reach_px * max(scale, 1.0) + _BILINEAR_REACH
        first = min(max(math.floor(start * scale - reach), 0), size - 1)
        return first, max(min(math.ceil(stop * scale + reach), size), first + 1)

    col0, col1 = bounds(box.col0 - window.x0, box.col1 - window.x0, window.width)
    row0, row1 = bounds(box.row0 - window.y0, box.row1 - window.y0, window.height)
    return Region(col0, row0, col1, row1)


def paste(prob: NDArray[np.float32], window: Window, region: Region) -> NDArray[np.float32]:
    """Returns the probabilities (rows, columns) of an image region from the map (S, S) of a window that covers it.

    Bilinear without antialias; INTER_LINEAR of OpenCV and torch agree to 1e-5 (§2.5). Inverse of `cut` and
    `resize_crop` up to that interpolation.
    """
    left, top = region.col0 - window.x0, region.row0 - window.y0
    columns, rows = slice(left, region.col1 - window.x0), slice(top, region.row1 - window.y0)
    is_stretched = window.height > len(prob) and window.width > len(prob)
    if not is_stretched or window.width * window.height <= STRIP_PIXELS:
        return _resized(prob, window.height, window.width)[rows, columns]
    # Bilinear is separable: stretching the rows first and then a strip of columns at a time gives the same values to
    # the bit, without the whole window in memory.
    stretched = _resized(prob, len(prob), window.width)
    pasted = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
    for start, stop in _strips(window):
        first, last = max(start, columns.start), min(stop, columns.stop)
        if first < last:
            strip = _resized(np.ascontiguousarray(stretched[:, start:stop]), window.height)
            pasted[:, first - left : last - left] = strip[rows, first - start : last - start]
    return pasted


def _strips(window: Window) -> Iterator[tuple[int, int]]:
    """Yields the first column and the end of each strip of a window.

    OpenCV rounds columns differently that fill no vector register, and a single column. So strips begin at multiples of
    STRIP_ALIGNMENT, and none is one column wide.
    """
    width = max(STRIP_PIXELS // window.height // STRIP_ALIGNMENT, 1) * STRIP_ALIGNMENT
    starts = range(0, max(window.width - 1, 1), width)
    yield from zip(starts, (*starts[1:], window.width), strict=True)


def _resized(prob: NDArray[np.float32], height: int, width: int | None = None) -> NDArray[np.float32]:
    size = (prob.shape[1] if width is None else width, height)
    return np.asarray(cv2.resize(prob, size, interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def _periodic_slices(start: int, stop: int, period: int) -> Iterator[tuple[slice, slice]]:
    """Splits start … stop − 1 at multiples of `period`; yields (slice of that range, slice of 0 … period − 1)."""
    position = start
    while position < stop:
        source = position % period
        length = min(stop - position, period - source)
        yield slice(position - start, position - start + length), slice(source, source + length)
        position += length


def _corners(box_xywh: Box) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    x, y, w, h = box_xywh
    x0, y0, x1, y1 = (np.float32(min(max(corner, -_FAR), _FAR)) for corner in (x, y, x + w, y + h))
    return x0, y0, x1, y1


def _membership(start: int, stop: int, first: int, end: int, period: int | None) -> Pixels:
    index = np.arange(start, stop)
    if period is not None:
        index %= period
    return ((index >= first) & (index < end)).astype(np.uint8)
