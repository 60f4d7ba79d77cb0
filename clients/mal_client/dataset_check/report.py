"""What a look at a data set found: kinds of findings with counts and examples, as lines, as JSON, as parts of a page.

Knows no rule; `check` has those.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mal_train.core.report.page import bars, section, side_by_side, table
from mal_train.core.settings import SIZE_NAMES

if TYPE_CHECKING:
    from mal_train.core.report.page import Html

EXAMPLES: Final = 10
"""Sentences that are kept for each kind of finding; all are counted."""

NO_FAULT: Final = "no fault found"

_COMMON_SIZES: Final = 12


class Severity(StrEnum):
    """How bad a finding is."""

    FATAL = "fatal"
    """The file is refused as a whole."""
    ERROR = "error"
    """What it concerns gets no mask."""
    WARNING = "warning"
    """Labeled, but look whether it is meant so."""
    NOTE = "note"
    """Good to know."""


@dataclass
class Issue:
    """One kind of finding: how often, and the first few in words."""

    level: Severity
    meaning: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class CheckReport:
    """What a data set is like.

    Attributes:
        file: the COCO file.
        images: rows of `images`.
        annotations: rows of `annotations`.
        findings: by kind, in the order in which they were met.
        boxes_by_size: usable boxes by size class.
        box_sides: usable boxes by the square root of their area, px.
        image_sizes: images by width x height, the most common ones.
        by_category: annotations by the name of their category, all categories.
    """

    file: Path
    images: int = 0
    annotations: int = 0
    findings: dict[str, Issue] = field(default_factory=dict)
    boxes_by_size: Counter[str] = field(default_factory=Counter)
    box_sides: Counter[int] = field(default_factory=Counter)
    image_sizes: Counter[str] = field(default_factory=Counter)
    by_category: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, level: Severity, meaning: str, example: str) -> None:
        """Counts a finding."""
        finding = self.findings.setdefault(kind, Issue(level, meaning))
        finding.count += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(example)

    def count(self, level: Severity) -> int:
        """Findings of a level."""
        return sum(finding.count for finding in self.findings.values() if finding.level is level)

    def sorted_findings(self) -> list[tuple[str, Issue]]:
        """Worst level first, then the most frequent."""
        order = list(Severity)
        return sorted(self.findings.items(), key=lambda item: (order.index(item[1].level), -item[1].count))

    def side_histogram(self) -> dict[str, int]:
        """Boxes by side in doubling steps, without gaps."""
        if not self.box_sides:
            return {}
        steps = range(min(self.box_sides), max(self.box_sides) + 1)
        return {f"{2**step}–{2 ** (step + 1)} px": self.box_sides[step] for step in steps}

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "file": str(self.file),
            "images": self.images,
            "annotations": self.annotations,
            "counts": {str(level): self.count(level) for level in Severity},
            "findings": [
                {
                    "kind": kind,
                    "level": str(finding.level),
                    "count": finding.count,
                    "meaning": finding.meaning,
                    "examples": finding.examples,
                }
                for kind, finding in self.sorted_findings()
            ],
            "boxes_by_size": {name: self.boxes_by_size[name] for name in SIZE_NAMES},
            "box_sides": self.side_histogram(),
            "image_sizes": dict(self.image_sizes.most_common(_COMMON_SIZES)),
            "annotations_by_category": dict(self.by_category),
        }

    def lines(self) -> list[str]:
        """For a terminal: a line for each kind of finding, with what it means and its first example."""
        head = f"{self.file}: {self.images} images, {self.annotations} annotations"
        if not self.findings:
            return [f"{head}; {NO_FAULT}"]
        return [head] + [
            f"{finding.level:<8}{finding.count:>8}  {kind:<24}{finding.meaning}; first: {finding.examples[0]}"
            for kind, finding in self.sorted_findings()
        ]

    def sections(self) -> list[Html]:
        """For a page."""
        found: list[list[str | int]] = [
            [str(finding.level), kind, finding.count, finding.meaning] for kind, finding in self.sorted_findings()
        ]
        examples = [[kind, example] for kind, finding in self.sorted_findings() for example in finding.examples]
        classes = dict(self.by_category.most_common(40))
        return [
            section(
                "Findings",
                table(["level", "what", "count", "meaning"], found) if found else f"<p>{NO_FAULT}</p>",
                f"{self.images} images, {self.annotations} annotations.",
            ),
            section(
                "What there is",
                side_by_side(
                    "<p>Boxes by side</p>" + bars(self.side_histogram()),
                    "<p>Boxes by size class</p>" + bars({name: self.boxes_by_size[name] for name in SIZE_NAMES}),
                    "<p>Most common image sizes</p>" + bars(dict(self.image_sizes.most_common(_COMMON_SIZES))),
                    "<p>Annotations by category</p>" + bars(classes),
                ),
                "The side of a box is the square root of its area inside the image.",
            ),
            *(
                [section("Examples", table(["what", "where"], examples), f"At most {EXAMPLES} of each kind.")]
                if examples
                else []
            ),
        ]
