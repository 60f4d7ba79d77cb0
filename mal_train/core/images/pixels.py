"""Defines how stored values become the RGB pixels (H, W, 3) uint8 that networks see; the only such rule.

    8 bits                  as stored
    more bits, signed,      stretched: the range of the values, without 0.01 % of them at each end, becomes 0 to 255;
    floating point          values outside it become 0 or 255, NaN and a file's "no data" become 0
    1 band                  gray, repeated three times
    3 or 4 bands            the first three
    2 or more than 4        refused, unless the further bands are alpha or the file declares them extra bands of RGB
    alpha                   dropped; the color below it is kept

The mapping depends on the values alone, so the server, the trainer and the client give the same pixels for a file, an
array and a Pillow image of the same values.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mal_train.core.errors import BadImage
from mal_train.core.numbers import counted

Values = NDArray[Any]
"""Stored values, (H, W) or (H, W, bands): unsigned or signed integers, or floating-point numbers."""

TAIL_DENOMINATOR = 10_000
"""Values of which one is cut off at each end of the range, so that some dead or hot pixels do not decide it."""

STRIP_PIXELS = 1 << 18
"""Pixels converted at a time: 1 MB of 8-bit colors, which fits into the cache of a core."""

STRETCHING_BYTES = 32 * STRIP_PIXELS
"""Memory of a strip of three bands of 16 bits while it is stretched."""


@dataclass(frozen=True)
class PixelFormat:
    """Format of a file's stored values.

    Attributes:
        bits: of a value.
        kind: unsigned, signed or float.
        bands: number of bands, alpha included.
        dropped_bands: number of bands that are neither used nor alpha.
    """

    bits: int = 8
    kind: str = "unsigned"
    bands: int = 3
    dropped_bands: int = 0

    @property
    def is_stretched(self) -> bool:
        """True for values that have no place in 0 to 255, so that their range is stretched to it."""
        return self.bits > 8 or self.kind != "unsigned"

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.kind}, {counted(self.bands, 'band')}"


RGB_8_BIT = PixelFormat()
"""Format of most files."""


@dataclass
class FormatCounts:
    """Counts images of a run whose values are stretched or whose bands are dropped; safe in threads.

    Attributes:
        stretched: their names.
        dropped: names of images with bands that are not used.
    """

    stretched: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)

    def add(self, name: str, pixel_format: PixelFormat) -> None:
        """Records an image; more than once has no effect."""
        if pixel_format.is_stretched:
            self.stretched.add(name)
        if pixel_format.dropped_bands:
            self.dropped.add(name)

    def update(self, stretched: Iterable[str], dropped: Iterable[str]) -> None:
        """Adds the names that `take` of another process returned."""
        self.stretched.update(stretched)
        self.dropped.update(dropped)

    def take(self) -> tuple[list[str], list[str]]:
        """Returns the names of stretched images and those with dropped bands, and forgets them."""
        # Copied in one step, and only the copy is forgotten: other threads add names meanwhile.
        stretched, dropped = set(self.stretched), set(self.dropped)
        self.stretched -= stretched
        self.dropped -= dropped
        return sorted(stretched), sorted(dropped)

    def notes(self) -> list[str]:
        """Returns one sentence for each kind of image."""
        kinds = (
            (self.stretched, "with values beyond 8 bits; the range of each file became 0 to 255"),
            (self.dropped, "with further bands; the first three were used"),
        )
        return [f"{counted(len(names), 'image')} {text}; mal-client check lists them" for names, text in kinds if names]


@dataclass(frozen=True)
class ValueRange:
    """Range of stored values that becomes 0 to 255.

    Attributes:
        low: becomes 0.
        high: becomes 255; equal to `low` for an image of one value, which becomes 0.
        nodata: value that stands for none, and becomes 0; None if there is none.
        is_inverted: True if `low` becomes 255 and `high` 0.
    """

    low: float
    high: float
    nodata: float | None = None
    is_inverted: bool = False

    def stretch(self, values: Values) -> NDArray[np.uint8]:
        """Returns values of any shape as uint8 of that shape."""
        if values.dtype.kind not in "ui" or values.dtype.itemsize > 2:
            return self._stretch(values)
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        unsigned = native.view(f"u{native.itemsize}")
        if native.dtype not in self._tables:
            every = np.arange(1 << 8 * native.itemsize, dtype=unsigned.dtype)
            self._tables[native.dtype] = self._stretch(every.view(native.dtype))
        return np.take(self._tables[native.dtype], unsigned)

    @cached_property
    def _tables(self) -> dict[np.dtype[Any], NDArray[np.uint8]]:
        """Results for all values of a type of at most 16 bits."""
        return {}

    def _stretch(self, values: Values) -> NDArray[np.uint8]:
        numbers = _numbers(values).astype(np.float64)
        is_none = np.isnan(numbers)
        if self.nodata is not None:
            is_none |= numbers == self.nodata
        if self.high <= self.low:
            return np.zeros(numbers.shape, np.uint8)
        np.clip(numbers, self.low, self.high, out=numbers)
        numbers -= self.low
        numbers /= self.high - self.low
        numbers *= 255.0
        np.rint(numbers, out=numbers)
        if self.is_inverted:
            np.subtract(255.0, numbers, out=numbers)
        numbers[is_none] = 0.0
        return numbers.astype(np.uint8)


class RangeFinder:
    """Finds the range of an image's values, of which it sees a part at a time.

    Holds 0.02 % of them.

    >>> finder = RangeFinder(4)
    >>> finder.add(np.array([[7.0, np.nan], [3.0, 5.0]]))
    >>> finder.range()
    ValueRange(low=3.0, high=7.0, nodata=None, is_inverted=False)

    Args:
        count: number of values that will be added, at most.
        nodata: value that stands for none.
    """

    def __init__(self, count: int, nodata: float | None = None) -> None:
        self._size = count // TAIL_DENOMINATOR + 1
        self._nodata = nodata
        self._count = 0
        self._lowest: Values | None = None
        self._highest: Values | None = None

    def add(self, values: Values) -> None:
        """Records values of any shape. NaN, infinities and "no data" do not count."""
        numbers = _numbers(values).ravel()
        if numbers.dtype.kind == "f":
            numbers = numbers[np.isfinite(numbers)]
        if self._nodata is not None:
            numbers = numbers[numbers != self._nodata]
        if not numbers.size:
            return
        self._count += numbers.size
        low, high, size = numbers, numbers, self._size
        if self._lowest is not None and self._highest is not None:
            low = np.concatenate([self._lowest, _beyond(numbers, self._lowest, size, np.less, np.max)])
            high = np.concatenate([self._highest, _beyond(numbers, self._highest, size, np.greater, np.min)])
        self._lowest = low if low.size <= size else np.partition(low, size - 1)[:size]
        self._highest = high if high.size <= size else np.partition(high, -size)[-size:]

    def range(self, name: str = "image") -> ValueRange:
        """Returns the range without the tails; from end to end if the tails hold all values but one.

        Args:
            name: name of the image in messages.

        Raises:
            BadImage: no value counts (reason IMAGE_FORMAT).
        """
        if self._lowest is None or self._highest is None:
            raise BadImage(
                f'{name}: no value is a finite number: all are NaN, infinite or "no data"; give an image with values',
                "IMAGE_FORMAT",
            )
        tail = self._count // TAIL_DENOMINATOR
        low, high = np.sort(self._lowest)[tail], np.sort(self._highest)[-1 - tail]
        if low >= high:
            low, high = self._lowest.min(), self._highest.max()
        return ValueRange(float(low), float(high), self._nodata)


def _beyond(
    numbers: Values, kept: Values, size: int, compare: Callable[..., NDArray[np.bool_]], worst: Callable[..., Any]
) -> Values:
    """Returns the numbers that may belong to the `size` most extreme ones, of which some are kept."""
    return numbers if kept.size < size else numbers[compare(numbers, worst(kept))]


def _numbers(values: Values) -> Values:
    """Returns floating-point values as float32, in which Pillow holds them, too; others unchanged."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False) if values.dtype.kind == "f" else values


def stretched(
    strips: Callable[[], Iterable[Values]], size_wh: tuple[int, int], bands: int, name: str = "image"
) -> NDArray[np.uint8]:
    """Returns (H, W, 3) uint8 of values that are stretched. Raises BadImage, as `RangeFinder.range`.

    Args:
        strips: returns the image's values from top to bottom, as (rows, W) or (rows, W, bands); called twice.
        size_wh: width and height in px.
        bands: 1 or 3, number of bands of a strip.
        name: name of the image in messages.
    """
    width, height = size_wh
    finder = RangeFinder(width * height * bands)
    for strip in strips():
        finder.add(strip)
    value_range = finder.range(name)
    pixels = np.empty((height, width, 3), np.uint8)
    row = 0
    for strip in strips():
        pixels[row : row + len(strip)] = value_range.stretch(strip).reshape(len(strip), width, bands)
        row += len(strip)
    return pixels


def rows_of_strips(size_wh: tuple[int, int]) -> Iterable[slice]:
    """Yields the rows of an image in strips of about `STRIP_PIXELS`.

    >>> list(rows_of_strips((STRIP_PIXELS, 2)))
    [slice(0, 1, None), slice(1, 2, None)]
    """
    width, height = size_wh
    rows = max(STRIP_PIXELS // width, 1)
    return (slice(row, min(row + rows, height)) for row in range(0, height, rows))


def divided_by_alpha(colors: Values, alpha: Values, opaque: int, nodata: float | None = None) -> Values:
    """Returns colors that were multiplied by alpha as they were before, of the same type; 0 where alpha is 0.

    Fractions of integers are cut off, as Pillow does.

    >>> divided_by_alpha(np.uint8([[[90, 60, 30]]]), np.uint8([[[120]]]), 255)
    array([[[191, 127,  63]]], dtype=uint8)

    Args:
        colors: (H, W, bands), unsigned integers of 32 bits at most, or floating-point numbers.
        alpha: (H, W, 1) of that type.
        opaque: alpha of a pixel that is not transparent.
        nodata: value that stands for none, and stays.
    """
    height, width, _ = colors.shape
    divided = np.empty(colors.shape, colors.dtype)
    for rows in rows_of_strips((width, height)):
        numbers, weights = colors[rows].astype(np.float64), alpha[rows].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            found = np.divide(numbers * opaque, weights, out=np.zeros_like(numbers), where=weights > 0)
            if colors.dtype.kind == "u":
                np.minimum(found, opaque, out=found)
            divided[rows] = found if nodata is None else np.where(numbers == nodata, numbers, found)
    return divided


def used_bands(bands: int) -> int | None:
    """Returns how many bands of an image without alpha are used: the first, or the first three; None if it has others.

    >>> [used_bands(bands) for bands in (1, 2, 3, 4, 5)]
    [1, None, 3, 3, None]
    """
    return {1: 1, 3: 3, 4: 3}.get(bands)


def rgb_of_values(values: Values, name: str = "image") -> NDArray[np.uint8]:
    """Returns (H, W, 3) uint8 of the values of an array.

    Args:
        values: (H, W) or (H, W, bands) of any real type; bool becomes 0 and 255.
        name: name of the image in messages.

    Raises:
        BadImage: another shape, no pixels, complex values, values that are no numbers, or no finite one (reason
            IMAGE_FORMAT).
    """
    bands = used_bands(values.shape[2] if values.ndim == 3 else 1) if values.ndim in (2, 3) else None
    if bands is None or not values.size or values.dtype.kind not in "buif":
        raise BadImage(
            f"{name}: {values.dtype} array of shape {values.shape}; real numbers of shape (H, W), (H, W, 3) RGB or "
            f"(H, W, 4) are needed{_remedy(values.shape)}",
            "IMAGE_FORMAT",
        )
    if values.dtype.kind == "b":
        values = values.astype(np.uint8) * np.uint8(255)
    table = values if values.ndim == 3 else values[:, :, None]
    table, size_wh = table[:, :, :bands], (table.shape[1], table.shape[0])
    if values.dtype == np.uint8:
        return np.ascontiguousarray(np.broadcast_to(table, (*table.shape[:2], 3)))
    return stretched(lambda: (table[rows] for rows in rows_of_strips(size_wh)), size_wh, bands, name)


def _remedy(shape: tuple[int, ...]) -> str:
    """Returns what to do with an array of a shape that no image has, as the end of a message.

    >>> _remedy((3, 480, 640)), _remedy((480, 640, 2))
    ('; its bands come first: np.moveaxis(array, 0, -1)', '; give one band: array[:, :, 0]')
    """
    if len(shape) == 4:
        return "; give one image: array[0]"
    if len(shape) != 3 or not all(shape) or used_bands(shape[2]) is not None:
        return ""
    if shape[0] <= 4 < shape[2]:
        return "; its bands come first: np.moveaxis(array, 0, -1)"
    return "; give one band: array[:, :, 0]" if shape[2] == 2 else "; give three of its bands: array[:, :, [2, 1, 0]]"
