"""Names the rows of a COCO file that a command leaves out: how many for each reason, and the first of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from typing import Final

from mal_train.core.coco.annotations import JsonId, Reason, row_name
from mal_train.core.numbers import counted

LISTED: Final = 5
"""Rows that a command names."""


@dataclass
class LeftOut:
    """Rows that are left out.

    >>> rows = LeftOut()
    >>> for number in range(9):
    ...     rows.add("BAD_BOX", f"annotation {number}: 0 x 5 px")
    >>> rows.add("IMAGE_NOT_FOUND", "a.jpg: no such file", 9)
    >>> rows.lines("a.json: not counted")[:3]
    ['a.json: not counted: 9 BAD_BOX, 1 IMAGE_NOT_FOUND', '  BAD_BOX: annotation 0: 0 x 5 px', \
'  IMAGE_NOT_FOUND: annotation 9: a.jpg: no such file']

    Attributes:
        counts: rows by reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    _first: dict[str, dict[str, JsonId | None]] = field(default_factory=dict)
    """By reason: the first LISTED different messages, with the row of each."""

    def add(self, reason: str, message: str, row_id: JsonId | None = None) -> None:
        """Counts a row; its id is added to a message that does not begin with it, such as one about its image."""
        self.counts[str(reason)] += 1
        messages = self._first.setdefault(str(reason), {})
        if len(messages) < LISTED:
            messages.setdefault(message, row_id)

    def summary(self) -> str:
        """Returns the number of rows for each reason, most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())

    def first_messages(self) -> dict[str, str]:
        """Returns the message of the first row of each reason."""
        return {
            reason: next(_named(message, row_id) for message, row_id in messages.items())
            for reason, messages in self._first.items()
        }

    def lines(self, title: str) -> list[str]:
        """Returns a line of counts, and one for the first row of each reason; then for others, up to LISTED rows.

        Crowd regions are at no fault: they are counted beside others, not listed, and give no line alone.
        """
        if not self.counts.keys() - {Reason.CROWD}:
            return []
        return [f"{title}: {self.summary()}", *(f"  {text}" for text in self.examples(Reason.CROWD))]

    def examples(self, *others: str) -> list[str]:
        """Returns the rows that `lines` names; those of `others`, which are reasons, not."""
        named = [
            [f"{reason}: {_named(message, row_id)}" for message, row_id in messages.items()]
            for reason, messages in self._first.items()
            if reason not in others
        ]
        count = max(LISTED, len(named))
        return list(islice(filter(None, chain.from_iterable(zip_longest(*named))), count))


def ignored_rows(notes: Sequence[str], name: str) -> list[str]:
    """Returns lines on the rows of `images` and `categories` that are ignored: the first LISTED, and how many more.

    >>> ignored_rows(["images[1]: a number; it must be an object"], "a.json")
    ['a.json: ignored: images[1]: a number; it must be an object']

    Args:
        notes: `CocoFile.notes`, a sentence for each row.
        name: name of the file.
    """
    more = len(notes) - LISTED
    return [
        *(f"{name}: ignored: {note}" for note in notes[:LISTED]),
        *([f"{name}: ignored: {counted(more, 'further row')} of images or categories"] if more > 0 else []),
    ]


def _named(message: str, row_id: JsonId | None) -> str:
    name = "" if row_id is None else row_name(row_id)
    return message if message.startswith(name) else f"{name}: {message}"
