"""Joins encoded parts to one encoded message, which protobuf would build and encode in a single call.

Such a call holds the interpreter: a tenth of a second for a response of 64 MiB, in which no other call is served. Parts
are built and encoded one by one, and a message is the concatenation of its fields, in any order.
"""

from array import array
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

NUMBERS_AT_ONCE = 50_000
"""Numbers added to a message by one call, in a millisecond."""

_LENGTH_DELIMITED = 2


def extend(field: Any, numbers: "array[int] | NDArray[Any]") -> None:
    """Adds numbers to a repeated field of a message, NUMBERS_AT_ONCE by one call.

    As lists: protobuf takes five times as long for the elements of an array.
    """
    for first in range(0, len(numbers), NUMBERS_AT_ONCE):
        field.extend(numbers[first : first + NUMBERS_AT_ONCE].tolist())


def submessage(number: int, parts: Sequence[bytes]) -> list[bytes]:
    """Returns a field that holds a message, as parts; `parts` are those of the encoded message."""
    size = sum(map(len, parts))
    return [_varint(number << 3 | _LENGTH_DELIMITED) + _varint(size), *parts]


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
