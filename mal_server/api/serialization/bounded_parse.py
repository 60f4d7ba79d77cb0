"""Parses messages after a look at their fields, so that a message of millions of them is refused before it is parsed.

Protobuf makes an object for each element of a repeated field and holds the interpreter while it does: a message of
32 MiB in elements of two bytes takes seconds and a gigabyte. No limit that is checked on the parsed message prevents
that, so fields are counted in the encoded one. A content of bytes counts as one field, whatever its length.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from mal_server.errors import InvalidRequest, RefusedItem

MAX_STRING_BYTES: Final = 20_000
"""Limit of a string field; the longest valid one is the path of a file, of `allowed_dirs.MAX_PATH_CHARS` characters."""

FIELDS_PER_BOX: Final = 16
"""Fields counted for the largest element of a request, an object with its ground-truth mask."""

BASE_FIELDS: Final = 16_384
"""Fields allowed beside those of boxes, among them the categories of an evaluation."""

SMALL_MESSAGE_BYTES: Final = 64 * 1024
"""Messages up to this size are parsed without counting: that takes less than a millisecond, whatever they hold."""

SMALL_PART_BYTES: Final = 1024
"""Submessages up to this size count by their size, without a look at their fields: a box, an object with a small
mask."""

BYTES_PER_FIELD: Final = 64
"""Bytes of a small submessage that count as a further field; a box has fewer."""

MAX_ITEM_FIELDS: Final = 16
"""Fields of a refused item among which its id is looked for; an encoder writes two."""

_MAX_VARINT_BYTES: Final = 10
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_Field: TypeAlias = tuple[str, Descriptor | None, bool, bool]
"""Name, type of a submessage, is a string, is packed where its bytes come in one piece."""


def max_fields(max_boxes: int) -> int:
    """Returns the limit of fields in one message of a server whose images have at most `max_boxes` boxes."""
    return FIELDS_PER_BOX * max_boxes + BASE_FIELDS


def bounded(parse: Callable[[bytes], Any], max_fields: int) -> Callable[[bytes], Any]:
    """Returns `parse`, the `FromString` of a message class, with a count of the fields before it.

    The result raises InvalidRequest for more than `max_fields` fields and for a string above MAX_STRING_BYTES; the
    violation names the field. For an item of a bulk stream, whose `item_id` tells the client which one it is, that is a
    RefusedItem. It leaves malformed messages to `parse`.
    """
    message_type: Descriptor = parse.__self__.DESCRIPTOR  # type: ignore[attr-defined]

    def parse_bounded(data: bytes) -> Any:
        if len(data) > SMALL_MESSAGE_BYTES:
            try:
                check_fields(data, message_type, max_fields)
            except InvalidRequest as error:
                item_id = item_id_of(data, message_type)
                if item_id is not None:
                    raise RefusedItem(error.violations, item_id) from None
                raise
        return parse(data)

    return parse_bounded


def item_id_of(data: bytes, message_type: Descriptor) -> str | None:
    """Returns the `item_id` of an encoded message, without parsing anything else of it.

    Returns None if the message type has no such field, and for a message that is malformed or has more than
    MAX_ITEM_FIELDS fields beside each other.
    """
    field = message_type.fields_by_name.get("item_id")
    if field is None:
        return None
    found = b""
    position = 0
    try:
        for _ in range(MAX_ITEM_FIELDS + 1):  # the end comes after the last field
            if position == len(data):
                return found.decode()
            tag, position = _varint(data, position)
            if tag & 7 != _BYTES:
                position = _after_number(data, position, tag & 7)
                continue
            size, position = _varint(data, position)
            if tag >> 3 == field.number:
                found = _cut(data[position : position + min(size, MAX_STRING_BYTES + 1)])
            position += size
    except (IndexError, ValueError):
        return None
    return None


def check_fields(data: bytes, message_type: Descriptor, max_fields: int) -> None:
    """Counts the fields of an encoded message. Raises InvalidRequest, see `bounded`."""
    left = max_fields
    parts = [(0, len(data), message_type, "")]
    try:
        while parts:
            position, end, part_type, path = parts.pop()
            known = _fields_of(part_type)
            while position < end:
                tag, position = _varint(data, position)
                name, submessage, is_string, is_packed = known.get(tag >> 3, _UNKNOWN)
                left -= 1
                if tag & 7 != _BYTES:
                    position = _after_number(data, position, tag & 7)
                else:
                    size, position = _varint(data, position)
                    if submessage is not None and size > SMALL_PART_BYTES:
                        parts.append((position, min(position + size, end), submessage, f"{path}{name}."))
                    elif submessage is not None:
                        left -= size // BYTES_PER_FIELD
                    elif is_packed:
                        left -= size
                    elif is_string and size > MAX_STRING_BYTES:
                        raise InvalidRequest([(f"{path}{name}", f"{size} bytes; at most {MAX_STRING_BYTES}")])
                    position += size
                if left < 0:
                    rule = f"the message has more than {max_fields} fields; send fewer elements"
                    raise InvalidRequest([(f"{path}{name}", rule)])
    except (IndexError, ValueError):
        return  # malformed: the parser ends at the same place and says so


def _cut(text: bytes) -> bytes:
    """Returns a text of UTF-8; a long one without its end, and without the part of a character there."""
    return text if len(text) <= MAX_STRING_BYTES else text.decode(errors="ignore").encode()


_UNKNOWN: Final[_Field] = ("", None, False, False)


@cache
def _fields_of(message_type: Descriptor) -> Mapping[int, _Field]:
    return {
        field.number: (
            field.name,
            field.message_type,
            field.type == FieldDescriptor.TYPE_STRING,
            field.type not in _NEVER_PACKED,
        )
        for field in message_type.fields
    }


_NEVER_PACKED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)


def _after_number(data: bytes, position: int, wire_type: int) -> int:
    """Returns the position after a number, or after the tag of a group, whose fields follow like others."""
    if wire_type == _VARINT:
        return _varint(data, position)[1]
    return position + {_FIXED64: 8, _FIXED32: 4}.get(wire_type, 0)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns the number at a position and the position after it. Raises ValueError or IndexError if malformed."""
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    value = byte & 0x7F
    for index in range(1, _MAX_VARINT_BYTES):
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError("a varint of more than ten bytes")
