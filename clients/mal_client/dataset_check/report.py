"""The result of a dataset check: issues with counts and examples, as text, JSON and HTML.

Contains no rules; `check` does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from mal_train.core.numbers import counted
from mal_train.core.report.page import bars, section, side_by_side, table
from mal_train.core.size_class import SIZE_NAMES
from mal_train.core.storage.addresses import Location, redact

if TYPE_CHECKING:
    from mal_train.core.report.page import Html

EXAMPLES: Final = 10
"""Examples kept of each issue; all occurrences are counted."""

NO_ISSUES: Final = "no issues found"

_COMMON_SIZES: Final = 12


class Severity(StrEnum):
    """Consequence of an issue."""

    FATAL = "fatal"
    """`label` refuses the file."""
    ERROR = "error"
    """The annotations concerned get no mask."""
    WARNING = "warning"
    """The annotations are labeled, but may not be what was intended."""
    NOTE = "note"
    """No consequence for labeling."""


@dataclass
class Issue:
    """One type of problem: its severity, number of occurrences and first examples."""

    severity: Severity
    meaning: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class CheckReport:
    """Issues and statistics of a dataset.

    Attributes:
        file: the COCO file.
        images: rows of `images`.
        annotations: rows of `annotations`.
        issues: by code, in the order of their first occurrence.
        boxes_by_size: usable boxes by size class.
        box_sides: usable boxes by floor(log2(side)); the side is the square root of the area, in px.
        image_sizes: images by "width × height".
        by_category: annotations by category name; includes categories without annotations.
    """

    file: Location
    images: int = 0
    annotations: int = 0
    issues: dict[str, Issue] = field(default_factory=dict)
    boxes_by_size: Counter[str] = field(default_factory=Counter)
    box_sides: Counter[int] = field(default_factory=Counter)
    image_sizes: Counter[str] = field(default_factory=Counter)
    by_category: Counter[str] = field(default_factory=Counter)

    def add(self, code: str, severity: Severity, meaning: str, example: str, count: int = 1) -> None:
        """Counts `count` occurrences of an issue with one example; keeps the first EXAMPLES examples."""
        issue = self.issues.setdefault(code, Issue(severity, meaning))
        issue.count += count
        if len(issue.examples) < EXAMPLES:
            issue.examples.append(example)

    def take(self, other: CheckReport) -> None:
        """Takes over the issues and the statistics of boxes of a report without any of these issues."""
        self.issues.update(other.issues)
        self.boxes_by_size += other.boxes_by_size
        self.box_sides += other.box_sides

    def count(self, severity: Severity) -> int:
        """Returns the number of occurrences of all issues of a severity."""
        return sum(issue.count for issue in self.issues.values() if issue.severity is severity)

    def sorted_issues(self) -> list[tuple[str, Issue]]:
        """Returns (code, issue) pairs by severity, worst first, then by count, largest first."""
        order = list(Severity)
        return sorted(self.issues.items(), key=lambda item: (order.index(item[1].severity), -item[1].count))

    def side_histogram(self) -> dict[str, int]:
        """Returns the number of boxes by side, in bins that double in width; empty bins between others are included."""
        if not self.box_sides:
            return {}
        steps = range(min(self.box_sides), max(self.box_sides) + 1)
        return {f"{2**step}–{2 ** (step + 1)} px": self.box_sides[step] for step in steps}

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            "file": redact(self.file),
            "images": self.images,
            "annotations": self.annotations,
            "counts": {str(severity): self.count(severity) for severity in Severity},
            "findings": [
                {
                    "kind": code,
                    "level": str(issue.severity),
                    "count": issue.count,
                    "meaning": issue.meaning,
                    "examples": issue.examples,
                }
                for code, issue in self.sorted_issues()
            ],
            "boxes_by_size": {name: self.boxes_by_size[name] for name in SIZE_NAMES},
            "box_sides": self.side_histogram(),
            "image_sizes": dict(self.image_sizes.most_common(_COMMON_SIZES)),
            "annotations_by_category": dict(self.by_category),
        }

    def _size(self) -> str:
        return f"{counted(self.images, 'image')}, {counted(self.annotations, 'annotation')}"

    def lines(self) -> list[str]:
        """Returns the report as lines of text, with the meaning and the first example of each issue."""
        head = f"{redact(self.file)}: {self._size()}"
        if not self.issues:
            return [f"{head}; {NO_ISSUES}"]
        return [head] + [
            f"{issue.severity:<8}{issue.count:>8}  {code:<24}{issue.meaning}; first: {issue.examples[0]}"
            for code, issue in self.sorted_issues()
        ]

    def sections(self) -> list[Html]:
        """Returns the report as sections of an HTML page."""
        rows: list[list[str | int]] = [
            [str(issue.severity), code, issue.count, issue.meaning] for code, issue in self.sorted_issues()
        ]
        examples = [[code, example] for code, issue in self.sorted_issues() for example in issue.examples]
        classes = dict(self.by_category.most_common(40))
        return [
            section(
                "Issues",
                table(["severity", "issue", "count", "meaning"], rows) if rows else f"<p>{NO_ISSUES}</p>",
                f"{self._size()}.",
            ),
            section(
                "Statistics",
                side_by_side(
                    "<p>Boxes by side</p>" + bars(self.side_histogram()),
                    "<p>Boxes by size class</p>" + bars({name: self.boxes_by_size[name] for name in SIZE_NAMES}),
                    "<p>Most common image sizes</p>" + bars(dict(self.image_sizes.most_common(_COMMON_SIZES))),
                    "<p>Annotations by category</p>" + bars(classes),
                ),
                "The side of a box is the square root of its area inside the image.",
            ),
            *(
                [section("Examples", table(["issue", "example"], examples), f"At most {EXAMPLES} per issue.")]
                if examples
                else []
            ),
        ]
