"""Requests of every method with any content: fields by the descriptors, values that are valid, extreme or random."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

INTEGERS = (0, 1, 2, 3, 40, 60, 1000, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))
DOUBLES = (0.0, 1.0, 0.5, 8.0, 24.0, 60.0, -1.0, -0.0, 1e-300, 1e9, 1e300, -1e300, math.nan, math.inf, -math.inf)
STRINGS = ("", "a", "disc", "x" * 65, "x" * 256, "é" * 200, "../..", "a/b", "sets/", "\0", "%s{}", "名\n前", "y" * 5000)
VALUES: Mapping[int, Sequence[Any]] = {
    FieldDescriptor.CPPTYPE_STRING: STRINGS,
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_DOUBLE: DOUBLES,
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 3, 4, 7, -1, 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT32: [number for number in INTEGERS if -(2**31) <= number < 2**31],
    FieldDescriptor.CPPTYPE_INT64: INTEGERS,
}
SET = 0.6
VALID = 0.98
DAMAGED = 0.25
"""Chances that a field is set, that its value is a valid one where some are known, and that an encoded message is
damaged."""

Values = Mapping[str, Sequence[Any]]
"""Full name of a field -> valid values."""


class RandomMessages:
    """Makes messages; equal seeds give equal messages.

    Args:
        seed: of all choices.
        valid: values that reach the code behind the checks.
        always: full names of fields that are always set.
    """

    def __init__(self, seed: int, valid: Values, always: Sequence[str] = ()) -> None:
        self.chance = random.Random(seed)
        self._valid = valid
        self._always = frozenset(always)

    def message(self, message_type: Descriptor) -> Any:
        """Returns a message of a type."""
        message = GetMessageClass(message_type)()
        for field in message_type.fields:
            if field.full_name in self._always or self.chance.random() < SET:
                self._set(message, field)
        return message

    def encoded(self, message_type: Descriptor) -> bytes:
        """Returns an encoded message, some of them damaged."""
        data = bytearray(self.message(message_type).SerializeToString())
        if data and self.chance.random() < DAMAGED:
            for _ in range(self.chance.randint(1, 3)):
                at = self.chance.randrange(len(data))
                data[at : at + self.chance.randint(0, 4)] = self.chance.randbytes(self.chance.randint(0, 4))
                if not data:
                    break
        return bytes(data)

    def _set(self, message: Any, field: FieldDescriptor) -> None:
        if hasattr(getattr(message, field.name), "extend"):
            is_scalar = field.message_type is None
            count = self.chance.choice((0, 0, 0, 0, 0, 1, 1, 2, 30) if is_scalar else (0, 1, 1, 2, 3, 5, 30))
            getattr(message, field.name).extend(self._value(field) for _ in range(count))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(self._value(field))
        else:
            setattr(message, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        valid = self._valid.get(field.full_name)
        if valid and self.chance.random() < VALID:
            return self.chance.choice(valid)
        if field.message_type is not None:
            return self.message(field.message_type)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self.chance.randbytes(self.chance.choice((0, 1, 5, 32, 40, 300)))
        return self.chance.choice(VALUES[field.cpp_type])
